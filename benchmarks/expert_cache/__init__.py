"""Simulates which share of the experts' reads a cache on the GPU saves."""
