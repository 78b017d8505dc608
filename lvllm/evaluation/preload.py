"""Imported by one process only: the one from which the models' processes are forked."""

import importlib
import os

from lvllm.evaluation.processes import DEFAULTS

for name, value in DEFAULTS.items():
    os.environ.setdefault(name, value)
importlib.import_module("vllm.entrypoints.llm")  # vLLM reads the variables when it is imported.
