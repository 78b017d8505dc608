"""What differs between model families in GGUF files, a module for each family.

Tensors have ggml's names in the file and the names of the family's Hugging Face checkpoints in
vLLM. What a name lacks is the number of its layer and, for the experts, which are stacked in one
tensor, the number of the expert.
"""
