"""How much a starting server has read, as its log says."""

import io
import random
from pathlib import Path

from tqdm import tqdm

from lvllm.serving.progress import LoadingLog, Weights


def bars(total: int, steps: int) -> bytes:
    """What the bar of `lvllm.loading.model_loader` writes."""
    text = io.StringIO()
    with tqdm(
        total=total,
        desc="Loading weights",
        unit="B",
        unit_scale=True,
        unit_divisor=1024,
        file=text,
        mininterval=0,
    ) as bar:
        for _ in range(steps):
            bar.update(total // steps)
    return text.getvalue().encode()


def test_the_newest_bar_counts_wherever_the_log_is_cut(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"")
    loading = LoadingLog(log)
    assert loading.weights() is None
    noise = b"(Worker pid=7) INFO Loading weights soon, 50%|\n"
    text = noise + bars(3 << 30, 16).replace(b"\r", b"\r(Worker pid=7) ") + noise
    seen = []
    while text:
        size = random.randrange(1, 150)
        with log.open("ab") as file:
            file.write(text[:size])
        text = text[size:]
        seen.append(loading.weights())
    known = [one for one in seen if one is not None]
    assert known[-1] == Weights(100, "3.00 GiB", "3.00 GiB")
    percents = [one.percent for one in known]
    assert percents == sorted(percents)
    assert Weights(50, "1.50 GiB", "3.00 GiB") in known or len(set(percents)) > 4


def test_small_models_and_other_logs(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(bars(500, 1))
    assert LoadingLog(log).weights() == Weights(100, "500 B", "500 B")
    log.write_bytes("Loading safetensors checkpoint shards:  50% ████ | 1/2\n\xff".encode())
    assert LoadingLog(log).weights() is None
