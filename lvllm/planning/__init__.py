"""Predicts, from config.json or a GGUF header alone, where weights go and how fast a model runs.

`source` finds a model, `shape` and `bits` say how large it is, and `gguf_shape` and `gguf_bits` the
same from GGUF files. `measured` and `description` make a `machine`, `placement` says what lies
where, `speed` predicts with `cpu_time` and `gpu_time`, and `choice` compares the candidates.
`settings`, `text` and `data` tell the result. Nothing here loads a weight or imports vLLM.
"""
