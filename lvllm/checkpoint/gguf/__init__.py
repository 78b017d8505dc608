"""Models in GGUF files, as vLLM sees others: a configuration, a tokenizer and named tensors.

`finding` says which file is meant, and `folder` writes what the file says of the model into a small
folder that vLLM takes for the model. `families` has what differs between model families, of which
`architectures` is the table. `fields` reads single values, `tokenizer` builds the tokenizer, and
`tensors` lists the tensors under their Hugging Face names, with their places in the file.
"""
