"""Starts `vllm serve` with what a plan chooses: `given` reads what the user said, `defaults` asks
the planner for the rest, `launch` makes the command, and `background` runs it beside a chat."""
