"""What LvLLM counts while it serves: the memory of the counts, and their way to `/metrics`."""
