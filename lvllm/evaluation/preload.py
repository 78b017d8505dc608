"""What the process imports that models' processes are forked from. No other process imports it."""

import importlib
import os

from lvllm.evaluation.processes import DEFAULTS

for name, value in DEFAULTS.items():
    os.environ.setdefault(name, value)
importlib.import_module("vllm.entrypoints.llm")  # reads them
