"""The build of the LvLLM distribution: one module for each step, driven by setup.py and make.

Importing this package refuses Pythons that upstream vLLM does not support. The check comes before
everything else, and is written in syntax that any Python 3 reads, so that nothing fails earlier.
"""

import sys

if not (3, 11) <= sys.version_info[:2] < (3, 15):
    raise SystemExit(
        f"lvllm build: LvLLM needs Python 3.11 to 3.14, and this is Python "
        f"{sys.version_info[0]}.{sys.version_info[1]} ({sys.executable})"
    )
