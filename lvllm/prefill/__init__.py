"""A second engine that prefills long prompts while the first one decodes.

Both are whole vLLM engines over one copy of the experts (`lvllm.sharing`). What moves a request
between them is a KV connector, vLLM's own interface for it: the decoding engine's scheduler asks
its connector whether keys and values of a waiting request can be had elsewhere, and ours has the
prefill engine compute them first (`decoding.py`). They travel through memory without a name
(`memory.py`), into which the prefill engine writes them step by step (`prefilling.py`).
"""
