"""Groups of ranks that share a thread for the network."""

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import sys
from contextlib import suppress
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import torch
from torch import distributed
from lvllm.patches.gloo import share_devices

share_devices.install()
assert share_devices.is_installed()
rank, store = int(sys.argv[1]), sys.argv[2]
distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
groups = [distributed.new_group([0, 1]) for _ in range(6)]

def add(number):
    sums = torch.full([1000 * number], float(rank + number))
    for _ in range(20):
        distributed.all_reduce(sums, group=groups[number])
        sums /= 2
    return sums

with ThreadPoolExecutor(len(groups)) as pool:
    for number, sums in enumerate(pool.map(add, range(len(groups)))):
        assert torch.equal(sums, torch.full([1000 * number], number + 0.5)), sums
assert isinstance(distributed.group.WORLD._get_backend(torch.device("cpu")),
                  distributed.ProcessGroupGloo)
names = []
for task in Path("/proc/self/task").iterdir():
    with suppress(OSError):  # a thread of the pool that has just ended
        names.append((task / "comm").read_text())
print(names.count("gloo_tcp_loop\\n"))
distributed.destroy_process_group()
"""


def test_all_groups_of_a_process_share_a_thread(tmp_path: Path) -> None:
    """Each group sums on its own, all at once, and the ranks end."""
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(rank), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for rank in ranks:
        said, wrong = rank.communicate(timeout=120)
        assert rank.returncode == 0, wrong
        assert said == "1\n"
