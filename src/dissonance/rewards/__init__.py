"""Completions -> rewards, higher is better.

hf.py        a sequence classifier, or a cost model
http.py      one behind a server: vLLM, or whatever OpenRLHF could ask
function.py  any Python callable, `module:callable`
"""

from dissonance.config import RewardConfig
from dissonance.models import RewardModel
from dissonance.rewards.function import FunctionRewardModel
from dissonance.rewards.hf import HFRewardModel
from dissonance.rewards.http import ClassifyRewardModel, GetRewardModel

__all__ = ["ClassifyRewardModel", "FunctionRewardModel", "GetRewardModel", "HFRewardModel", "load_reward_model"]


def load_reward_model(config: RewardConfig) -> RewardModel:
    """The reward model that a config names: behind its server, or `module:callable`, or a Hugging Face classifier."""
    if config.server is not None:
        return GetRewardModel(config) if config.server.protocol == "openrlhf" else ClassifyRewardModel(config)
    return FunctionRewardModel(config) if ":" in config.model else HFRewardModel(config)
