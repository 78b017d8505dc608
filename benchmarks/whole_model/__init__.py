"""The speed of a whole model, LvLLM beside llama.cpp and stock vLLM: see __main__.py."""
