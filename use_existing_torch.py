"""Keep the PyTorch that is installed: run this, then `pip install .` as ever.

Drops torch from requirements/build.txt, where the build looks too: without it there, the
distribution requires torch in any version. `git checkout requirements/build.txt` undoes it.
"""

import re
from pathlib import Path

BUILD_REQUIREMENTS = Path(__file__).resolve().parent / "requirements" / "build.txt"


def drop_torch(path: Path = BUILD_REQUIREMENTS) -> list[str]:
    """Take the lines that require torch out of a requirements file; return them."""
    lines = path.read_text().splitlines(keepends=True)
    dropped = [line for line in lines if re.match(r"torch\s*([=<>~!;@]|$)", line)]
    path.write_text("".join(line for line in lines if line not in dropped))
    return [line.strip() for line in dropped]


if __name__ == "__main__":
    for requirement in drop_torch() or ["nothing: torch is already left out"]:
        print(f"dropped from requirements/build.txt: {requirement}")
