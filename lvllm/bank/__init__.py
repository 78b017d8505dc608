"""A bank: a small process that holds the experts of a model for the servers of its user.

`holder` is that process. It starts `loader`, a vLLM that only loads: its workers deposit each layer
with the holder and end, so that nothing stays but the memory of the experts. `notify` tells systemd
how far it is, and `activation` takes the sockets over which systemd starts it. What servers and
commands ask a bank is in `lvllm.handover`.
"""
