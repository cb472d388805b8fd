"""Prompts -> completions with their log-likelihoods.

hf.py       a Hugging Face causal LM as a policy: batches, out-of-memory; and as a reference model
planner.py  which prompts stand in one batch
http.py     a policy that a server samples: vLLM, or another that gives token ids and raw log-probabilities
common.py   what holds of completions wherever they are drawn
decode.py   the decoding loop over a shared prefix, and teacher forcing for a reference model
draw.py     one token per row by inverse CDF from keyed uniforms, and its raw log-probability
cache.py    a key-value cache that does not move as it grows
shared_prefix.py  attention in which the rows of a prompt share its keys and values, on CPUs
"""

from dissonance.config import PolicyConfig
from dissonance.models import Planner, Policy
from dissonance.sampling.hf import HFPolicy, HFReference
from dissonance.sampling.http import HTTPPolicy
from dissonance.sampling.planner import HFPlanner

__all__ = ["HFPolicy", "HFReference", "HTTPPolicy", "load_planner", "load_policy"]


def load_policy(config: PolicyConfig, seed: int = 0) -> Policy:
    """The policy that a config names: behind its server, if it has one, else in this process."""
    return HFPolicy(config, seed) if config.server is None else HTTPPolicy(config, seed)


def load_planner(config: PolicyConfig) -> Planner:
    """What plans the batches of the policy that a config names; it loads no weights."""
    return HFPlanner(config) if config.server is None else HTTPPolicy(config)
