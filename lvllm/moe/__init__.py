"""The layers that take the place of vLLM's routed experts, and the method that runs them on lk."""
