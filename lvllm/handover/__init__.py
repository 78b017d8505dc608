"""How experts get from one process to others: sockets with abstract names, and who is asked there.

Nothing here imports PyTorch or vLLM, so that a bank stays a small process.
"""
