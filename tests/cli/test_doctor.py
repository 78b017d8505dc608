"""`lvllm doctor`, on this machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lvllm.cli import doctor
from lvllm.cli.app import app
from lvllm.machine.report import Cpu, Finding, Gpu, MachineReport, Measured, Node, Versions

REPOSITORY = Path(__file__).parents[2]
COMMAND = "from lvllm.cli import main; main()"


def run(*arguments: str, before: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `lvllm ARGUMENTS` in a process of its own, after the Python code `before`."""
    code = f"import sys; sys.argv[0] = 'lvllm'; {before}\n{COMMAND}"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=REPOSITORY,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_command_measures_this_machine() -> None:
    result = run("doctor", "--json")
    report = MachineReport.model_validate_json(result.stdout)
    assert result.returncode == (1 if report.findings else 0), result.stderr
    assert "Traceback" not in result.stderr
    assert report.engine.error is None
    assert report.measured is not None
    assert report.measured.read_gb_per_s is not None
    assert report.measured.read_gb_per_s > 0
    assert all(read.read_gb_per_s > 0 for read in report.measured.reads)
    assert {peak.unit for peak in report.measured.peaks} <= {"GFLOP/s", "GOP/s"}
    assert report.cpu.usable
    assert report.kernel.memory_bytes


@pytest.mark.parametrize("missing", ["lvllm.engine", "torch", "vllm"])
def test_it_works_where_the_other_commands_do_not(missing: str) -> None:
    result = run("doctor", "--quick", before=f"sys.modules[{missing!r}] = None")
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    wanted = "vLLM is not installed" if missing == "vllm" else "the engine does not start"
    assert wanted in result.stdout


def test_a_command_without_the_engine_ends_in_one_line() -> None:
    result = run("env", "--config", "x", before="sys.modules['lvllm.engine'] = None")
    assert result.returncode == 1
    assert result.stderr.startswith("lvllm: env does not start: ")
    assert "`lvllm doctor`" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_wrong_variable_is_a_finding() -> None:
    result = run("doctor", "--quick", LVLLM_DOCTOR="1", LK_ISA="sse")
    assert result.returncode == 1
    assert "unset LK_ISA" in result.stdout
    (line,) = [line for line in result.stdout.splitlines() if "unset LVLLM_DOCTOR" in line]
    assert "LVLLM_DOCTOR is not a setting of LvLLM" in line


def test_a_good_machine_ends_with_0(monkeypatch: pytest.MonkeyPatch) -> None:
    report = MachineReport(versions=Versions(python="3.12.0", lvllm="0.1.0"))
    monkeypatch.setattr(doctor, "collect", lambda **options: report)
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0
    assert result.output.endswith("Nothing is wrong.\n")
    assert result.output.count("unknown") > 10
    result = CliRunner().invoke(app, ["doctor", "--json"])
    assert json.loads(result.output)["schema_version"] == 1


def test_each_finding_is_one_line() -> None:
    report = MachineReport(
        cpu=Cpu(model="C", online=[0, 1], usable=[0]),
        nodes=[Node(id=3, cpus=[0, 1], memory_bytes=1 << 30, distances={3: 10})],
        gpus=[Gpu(index=0, uuid="GPU-1", name="G", pcie_generation=4, pcie_width=16)],
        versions=Versions(python="3.12.0", lvllm="0.1.0", vllm="0.32.0", installation="plugin"),
        measured=Measured(read_gb_per_s=12.34, errors=["x"]),
        findings=[Finding(what="a", why="b", command="c")],
    )
    text = doctor.lines(report)
    assert text[-2:] == ["1 wrong", "  a; b: c"]
    assert "  NUMA node 3             2 CPUs, 1.00 GiB, unknown free, distances 10" in text
    assert "  vllm                    0.32.0 (LvLLM is a plugin)" in text
    assert "  read, all threads       12.3 GB/s" in text
    assert "  failed: x" in text
    assert any("PCIe 4 x16 now, PCIe unknown at most" in line for line in text)
    # Reports are public.
    assert "GPU-1" not in "\n".join(text) + report.model_dump_json()
