"""Keeps the most used experts on the GPU, which computes them while lk computes the others.

- expert_cache.py is the cache of a model, and what happens between two steps.
- cached_layer.py divides a batch of one layer between the experts with slots and all others.
- products.py computes a batch's experts that have slots.
- slots.py is the GPU's memory for experts.
- reads.py counts on the GPU which experts are read.
- placement.py chooses which experts have slots, by these counts.
- replacing.py copies experts to slots while steps run.
- saved.py saves the counts, so that a restart begins with the right experts.
- counters.py has what /metrics tells.
"""
