"""Parts of the demo model's trainer: its tasks, its tokenizer and its network."""
