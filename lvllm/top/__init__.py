"""`lvllm top`: a server's metrics, live in a terminal, without torch and vLLM."""
