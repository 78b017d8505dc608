"""A chat in the terminal with any OpenAI-compatible server.

This folder imports neither torch nor vLLM, so that a chat starts at once and needs no engine.
"""
