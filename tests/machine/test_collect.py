"""The whole report: facts, rates, findings."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from lvllm.machine import collect as collecting
from lvllm.machine.collect import collect
from lvllm.machine.report import Engine, MachineReport, Product
from tests.machine import made_up


def nothing(command: Sequence[str]) -> None:
    """No program is installed."""


@pytest.fixture
def no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collecting.engine, "read", lambda environ: Engine(error="OSError: x"))


@pytest.mark.usefixtures("no_engine")
def test_a_machine_without_files_and_programs(tmp_path: Path) -> None:
    report = collect(measure=True, root=tmp_path, run=nothing, environ={})
    assert [found.command for found in report.findings] == [
        "make install, in the folder of LvLLM's source"
    ]
    assert report.measured is not None
    assert report.measured.errors == ["reading memory: the engine did not start"]
    assert MachineReport.model_validate_json(report.model_dump_json()) == report


@pytest.mark.usefixtures("no_engine")
def test_findings_come_from_files_and_environment(tmp_path: Path) -> None:
    files = {"sys/kernel/mm/transparent_hugepage/enabled": "[never]"}
    environ = {"LVLLM_MOE_USE_WIGHT": "INT4", "LK_THREADS": "0", "LK_POWER_SAVING": "1"}
    report = collect(
        measure=False, root=made_up.write(tmp_path, files), run=nothing, environ=environ
    )
    assert report.measured is None
    commands = {found.command for found in report.findings}
    assert {"unset LVLLM_MOE_USE_WIGHT", "unset LK_THREADS"} < commands
    assert not any("LK_POWER_SAVING" in command for command in commands)
    assert "did you mean LVLLM_MOE_USE_WEIGHT?" in report.wrong_settings["LVLLM_MOE_USE_WIGHT"]


def test_peaks_are_two_operations_of_all_threads() -> None:
    products = [
        Product(
            format=format,
            activation_bits=8,
            isa="avx2",
            multiplied_as=multiplied,
            giga_weights_per_s_and_core=rate,
        )
        for format, multiplied, rate in (
            ("int8", "int8", 100.0),
            ("int4", "int8", 100.0),
            ("bf16", "float", 25.0),
            ("fp8", "bf16", None),
        )
    ]
    peaks = collecting._peaks(Engine(threads=4, products=products))
    assert [(peak.multiplied_as, peak.giga_operations_per_s, peak.unit) for peak in peaks] == [
        ("int8", 800, "GOP/s"),
        ("float", 200, "GFLOP/s"),
    ]
