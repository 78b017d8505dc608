"""What a worker process does: it starts the engine once, and vLLM's workers gain a watch."""
