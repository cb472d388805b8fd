"""Prompts -> completions with their log-likelihoods.

hf.py       a Hugging Face causal LM as a policy: batches, out-of-memory; and as a reference model
planner.py  which prompts stand in one batch
decode.py   the decoding loop over a shared prefix, and teacher forcing for a reference model
draw.py     one token per row by inverse CDF from keyed uniforms, and its raw log-probability
cache.py    a key-value cache that does not move as it grows
"""

from dissonance.config import PolicyConfig
from dissonance.models import Planner
from dissonance.sampling.hf import HFPolicy, HFReference
from dissonance.sampling.planner import HFPlanner

__all__ = ["HFPolicy", "HFReference", "load_planner"]


def load_planner(config: PolicyConfig) -> Planner:
    """What plans the batches of the policy that a config names."""
    return HFPlanner(config)
