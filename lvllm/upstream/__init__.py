"""What LvLLM registers with vLLM through vLLM's own public seams."""
