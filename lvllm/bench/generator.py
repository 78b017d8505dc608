"""A program that sends requests by the load generator of `vllm bench serve`.

    python -m lvllm.bench.generator

A line of standard input has the arguments of `vllm bench serve` as a JSON list, and the answer is a
line of standard output: {"result": {...}} or {"error": TEXT}. What vLLM prints goes to standard
error. The program ends with its standard input, so that it does not outlive whoever started it.
"""

import json
import os
import sys
from typing import Any, TextIO


def serve(asked: TextIO, answers: TextIO) -> None:
    """Answer lines until there are no more."""
    # The import takes 10 s, in which the server starts.
    from vllm.benchmarks.serve import add_cli_args, main
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    for line in asked:
        answer: dict[str, Any]
        try:
            answer = {"result": main(parser.parse_args(json.loads(line)))}
        except Exception as error:
            answer = {"error": " ".join(str(error).split()) or type(error).__name__}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    own = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(sys.stdin, own)
