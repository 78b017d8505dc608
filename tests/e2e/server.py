"""`vllm serve` with settings that it must refuse."""

import os
import subprocess
import sys
from pathlib import Path

from tests.e2e.generate import ROOT


def fail_to_serve(*arguments: str, **environment: str) -> tuple[int, str]:
    """Run a server that must not start: its exit code and its standard error."""
    done = subprocess.run(
        [str(Path(sys.executable).with_name("vllm")), "serve", *arguments],
        cwd=ROOT,
        env=os.environ | {"LVLLM_MOE_NUMA_ENABLED": "1"} | environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        timeout=300,
    )
    return done.returncode, done.stderr
