"""Completions -> rewards, higher is better.

hf.py        a sequence classifier, or a cost model
function.py  any Python callable, `module:callable`
"""

from dissonance.config import RewardConfig
from dissonance.models import RewardModel
from dissonance.rewards.function import FunctionRewardModel
from dissonance.rewards.hf import HFRewardModel

__all__ = ["FunctionRewardModel", "HFRewardModel", "load_reward_model"]


def load_reward_model(config: RewardConfig) -> RewardModel:
    """The reward model that a config names: `module:callable`, else a Hugging Face classifier."""
    return FunctionRewardModel(config) if ":" in config.model else HFRewardModel(config)
