"""A second engine that prefills long prompts while the first one decodes.

Both are whole vLLM engines over one copy of the experts (`lvllm.sharing`). A request moves between
them through a KV connector, which is vLLM's own interface for that (`connector.py`). The scheduler
of the decoding engine asks its connector whether the keys and values of a waiting request can be
loaded from elsewhere, and ours lets the prefill engine compute them first (`decode_side.py`). The
keys and values travel through an anonymous file in memory (`memory.py`), into which the prefill
engine writes them step by step (`prefill_side.py`).
"""
