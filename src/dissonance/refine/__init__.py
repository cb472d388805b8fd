"""Labels -> a better reward model, and a better policy.

pairs.py     preferences: files, mixing the original with the new, resampling
losses.py    what a pair of rewards costs (pure)
reward.py    pairs -> a refined reward model
ensemble.py  several reward models from resampled pairs, and where they disagree

Nothing is imported here: pairs can be read and mixed without PyTorch.
"""
