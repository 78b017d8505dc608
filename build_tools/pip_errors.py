"""Find the one line that matters in what pip prints when it fails."""

import re

_NO_CONNECTION = re.compile(
    r"NewConnectionError|ConnectTimeout|ReadTimeout|Read timed out|ProxyError|SSLError"
    r"|NameResolutionError|Connection (?:refused|reset|broken|aborted)|RemoteDisconnected"
)


def explain(output: str) -> str:
    """Why pip failed, as the end of a sentence; `output` is what pip printed."""
    got = re.search(r"Got\s+([0-9a-f]{64})", output)
    if got:
        return f"the file has sha256 {got[1]}, which is not the pinned one"
    torch = re.search(r"No matching distribution found for (torch==\S+)", output)
    if torch:
        return (
            f"pip finds no {torch[1]}; set PIP_EXTRA_INDEX_URL to PyTorch's CPU index (Linux, Pip"
            " and CPU at https://pytorch.org/get-started/locally/), or PIP_FIND_LINKS to a folder"
            " with the wheel"
        )
    if _NO_CONNECTION.search(output):
        return "no connection to the package index"
    errors = [line.strip() for line in output.splitlines() if line.lower().startswith("error:")]
    return errors[-1].removeprefix("ERROR: ") if errors else "pip failed"
