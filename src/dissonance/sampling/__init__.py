"""Prompts -> completions with their log-likelihoods.

hf.py       a Hugging Face causal LM as a policy: batches, out-of-memory; and as a reference model
decode.py   the decoding loop over a shared prefix, and teacher forcing for a reference model
draw.py     one token per row by inverse CDF from keyed uniforms, and its raw log-probability
cache.py    a key-value cache that does not move as it grows
shared_prefix.py  attention in which the rows of a prompt share its keys and values, on CPUs
"""

from dissonance.sampling.hf import HFPolicy, HFReference

__all__ = ["HFPolicy", "HFReference"]
