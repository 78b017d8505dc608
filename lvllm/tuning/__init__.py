"""Finds faster settings than the plan's: `knobs` says what can be tried, `search` tries it,
`quality` asks what it costs in quality, and `config` writes the file for `vllm serve`."""
