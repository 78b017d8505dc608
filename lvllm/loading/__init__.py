"""How a checkpoint's weights come into the engine's memory: LvLLM's reader, vLLM's loaders."""
