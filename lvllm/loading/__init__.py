"""How a checkpoint comes into the engine's memory: its headers, its bytes, vLLM's loader on top."""
