"""Rates of this machine: reading memory, and copying to a GPU."""
