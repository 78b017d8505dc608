"""vLLM makes the same of a --config file's dotted keys as LvLLM does, once it is patched."""

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

SECTION = "additional_config.lvllm"
EXACT: Mapping[str, Any] = {
    "lk_power_saving": True,
    "share_experts": False,
    "gpu_resident_moe_layers": [0, "2-3"],
    "moe_use_weight": [{"layers\\.0": "KEEP"}],
    "dense_weight": None,
    "lk_threads": 3,
    "omp_num_threads": "2",
}


def test_vllm_makes_the_same_of_dotted_keys(tmp_path: Path) -> None:
    argparse = pytest.importorskip("vllm.utils.argparse_utils")
    from lvllm.patches.configuration import read_the_file_exactly

    file = tmp_path / "config.yaml"
    content = {f"{SECTION}.{key}": value for key, value in EXACT.items()}
    content |= {"max_len": 5, "other_config.first_name": 7}
    file.write_text(yaml.safe_dump(content))

    class Parser(argparse.FlexibleArgumentParser):  # type: ignore[misc, name-defined]
        # Another test may have patched vLLM in this process.
        load_config_file = read_the_file_exactly.make(
            inspect.unwrap(argparse.FlexibleArgumentParser.load_config_file)
        )

    parser = Parser()
    parser.add_argument("--additional-config", type=json.loads)
    parser.add_argument("--other-config", type=json.loads)
    parser.add_argument("--max-len", type=int)
    words = ["--config", str(file), "--additional-config.lvllm.lk_threads", "4"]
    found = parser.parse_args(words)
    assert (found.max_len, found.other_config) == (5, {"first_name": 7})
    given = {key: value for key, value in EXACT.items() if value is not None}
    assert found.additional_config == {"lvllm": given | {"lk_threads": 4}}
    for text, line in (
        (f"{SECTION}.lk_threads: true", f"{SECTION}.lk_threads=true is not allowed: a whole"),
        ("- a", "a mapping of settings is wanted"),
    ):
        file.write_text(text)
        with pytest.raises(SystemExit, match=line):
            parser.parse_args(words)
