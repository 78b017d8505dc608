"""Chooses the most used experts of all layers for the GPU; nothing keeps them there yet.

- placement.py chooses which they are, by how often each is read.
"""
