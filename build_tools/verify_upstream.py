"""`make verify-upstream` shows that the laid-in vllm/ is, byte for byte, that of a pinned wheel."""

import time

from build_tools.errors import BuildError
from build_tools.lay_in import TREE, read_record
from build_tools.record import STAMP, compare_tree, parse_record
from build_tools.upstream import Pin, fetch, read_pins


def laid_in_pin() -> Pin:
    """The pin whose wheel the tree says it comes from. Raises BuildError if there is none."""
    stamp = TREE / STAMP
    if not stamp.exists():
        raise BuildError(f"nothing is laid in at {TREE}: run `make install`")
    record = stamp.read_text()
    for pin in read_pins().values():
        if f"\n{pin.stem}.dist-info/RECORD" in record:
            return pin
    raise BuildError(f"{TREE} is not of an upstream pinned in requirements/upstream.txt")


def main() -> None:
    """Compare the tree with the RECORD in the pinned wheel, not with the copy in the tree."""
    start = time.monotonic()
    pin = laid_in_pin()
    recorded = parse_record(read_record(fetch(pin)))
    differences = compare_tree(TREE, recorded)
    if differences:
        print("\n".join(differences.lines()))
        raise BuildError(f"{TREE} differs from {pin} in {len(differences.lines())} files")
    print(
        f"vllm/ is {pin}, byte for byte: {len(recorded)} files, wheel sha256 {pin.sha256} "
        f"({time.monotonic() - start:.1f} s)"
    )


if __name__ == "__main__":
    main()
