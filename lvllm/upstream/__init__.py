"""What vLLM lacks outside the experts, on its CPU platform for the most part: one module a gap.

A gap that upstream closes is a module to delete.
"""
