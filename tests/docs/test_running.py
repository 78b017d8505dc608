"""Each command in a block of the documentation is run, or the comment behind it says why it is not.

Commands run in a folder where everything lies that they name: models are the demo model with a
longer context, and port 8000 is that of one server of the demo model. A command that starts another
server is run as far as that: vLLM makes the server's configuration. A few kinds of commands are run
by other tests (`ELSEWHERE`), with arguments of their own.
"""

import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import pytest
from gguf import GGMLQuantizationType as Type

from tests.docs.pages import PAGES, ROOT, blocks, shell
from tests.e2e.server import Server
from tests.e2e.warm_process import fork
from tests.models import gguf
from tests.planning.made_up import machine
from tests.planning.test_measured import report
from tests.settings.test_example_configs import serve_parser

TINY = ROOT / "examples/models/tiny-moe"
QUESTION = "What is 1 + 2?"
CONTEXT = 65536
END_SECONDS = 600
OPENSSL = shutil.which("openssl")
BLOCKS = [
    (name, block)
    for name in PAGES
    # test_translations.py compares the translations; what developers type is theirs to run.
    if not name.endswith(".zh.md") and name not in ("README_cn.md", "CONTRIBUTING.md")
    for block in blocks(name)
    if block.strip()
]

NO_COMMAND = {
    *("#", "-", "---", "3", "42", "GPU:", "LVLLM_GPU_PREFILL_MIN_BATCH_SIZE=auto"),
    *("LvLLM:", "ModuleNotFoundError:", "compute", "copy", "from", "front", "import", "lvllm:"),
    *("model.safetensors*", "model:", "no", "safetensors", "user", "vLLM:"),
    "sum(rate(lvllm_expert_read_bytes_total[1m]))",
}
"""The first words of blocks that are no commands: files, output, drawings and programs."""

MARK = re.compile(
    r"\b(needs (a GPU|a network|root|a wheel|llama\.cpp|several machines)|takes (minutes|hours))\b"
)
"""Why a command is not run."""

ELSEWHERE = {
    "make (demo|test)": ".ci/run",
    "lvllm bench --url .*": "tests/cli/test_bench.py",
    "lvllm doctor.*": "tests/cli/test_doctor.py",
    "lvllm eval .*": "tests/e2e/test_quality.py",
    "lvllm verify .*": "tests/cli/test_verify.py",
    "lvllm webui --url .*": "tests/e2e/test_webui.py",
    ".* vllm serve --config examples/configs/.*": "tests/settings/test_example_configs.py",
    ".* vllm serve .*--distributed-executor-backend ray.*": "tests/e2e/test_ray.py",
}
"""What runs other commands. test_commands.py looks at their names and options as they are here."""


def plain(line: str) -> str:
    """A command with one name for all models, so that each is run once."""
    line = line.replace("http://host:", "http://127.0.0.1:")
    line = re.sub(r"models/\S+\.gguf", "MODEL.gguf", line)
    line = re.sub(r"(?<!/)models/\w+", "MODEL", line)
    return re.sub(r"\b(serve|plan) [\w-]+/[\w.-]+", r"\1 MODEL", line)


def run_by(line: str) -> str | None:
    """What runs a command of `ELSEWHERE`."""
    return next((by for pattern, by in ELSEWHERE.items() if re.fullmatch(pattern, line)), None)


COMMANDS = sorted(
    {
        line
        for _, block in BLOCKS
        for command in shell(block) or ()
        if not MARK.search(command.comment) and run_by(line := plain(command.line)) is None
    }
)


def test_every_block_is_known() -> None:
    """A command of a program that nobody recognises would not be run."""
    for name, block in BLOCKS:
        assert shell(block) is not None or block.split()[0] in NO_COMMAND, f"{name}:\n{block}"


def test_what_runs_the_others_exists() -> None:
    for file in ELSEWHERE.values():
        assert (ROOT / file).exists()


class Job(NamedTuple):
    """A command of `lvllm` or `vllm`, its own variables, and its standard input."""

    line: str
    words: list[str]
    environment: dict[str, str]
    question: str


def configure(words: Sequence[str], environment: Mapping[str, str]) -> NoReturn:
    """Let vLLM make the configuration of `vllm WORDS`, and end the command."""
    os.environ.update(environment)
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.cli.serve import ServeSubcommand

    arguments = serve_parser().parse_args(list(words))
    arguments.model = arguments.model_tag or arguments.model
    ServeSubcommand().validate(arguments)
    config = AsyncEngineArgs.from_cli_args(arguments).create_engine_config()
    assert config.parallel_config.worker_cls.startswith("lvllm.worker.")
    sys.exit(0)


def run_all(folder: str, jobs: Sequence[Job]) -> None:
    """In a forked process: run commands in `folder`, and write what became of each.

    One process runs them all, because most of the time of a single one goes into imports.
    """
    os.chdir(folder)
    from lvllm.bank import run
    from lvllm.cli import measuring
    from lvllm.serving import launch

    prepare = launch.prepare

    def start(*arguments: Any) -> NoReturn:
        found = prepare(*arguments)
        configure(found.command[found.command.index("serve") :], found.environment)

    def hold(model: str, words: Sequence[str], environ: Mapping[str, str], _: Any) -> NoReturn:
        configure(["serve", *words], {**environ, "LVLLM_MOE_NUMA_ENABLED": "1"})

    launch.prepare = start  # type: ignore[assignment]
    run.run = hold  # type: ignore[assignment]
    measuring.this_machine = machine
    from lvllm.cli import main

    variables = dict(os.environ)
    for job in jobs:
        os.environ.clear()
        os.environ.update(variables | job.environment)
        sys.argv = job.words
        code: Any = 0
        said = io.StringIO()
        try:
            sys.stdin = io.TextIOWrapper(io.BytesIO(job.question.encode()))
            with redirect_stdout(said), redirect_stderr(said):
                main() if job.words[0] == "lvllm" else configure(job.words[1:], os.environ)
        except SystemExit as ended:
            code = ended.code or 0
        except Exception:
            code = traceback.format_exc()
        with Path("results").open("a") as file:
            file.write(json.dumps([job.line, code, said.getvalue()]) + "\n")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All files that commands name."""
    folder = tmp_path_factory.mktemp("documented")
    for name in ("config.yaml", "examples"):
        (folder / name).symlink_to(ROOT / name)
    (folder / ".venv").symlink_to(sys.prefix)
    model = folder / "MODEL"
    shutil.copytree(TINY, model)
    config = json.loads((model / "config.json").read_text())
    config["max_position_embeddings"] = CONTEXT
    (model / "config.json").write_text(json.dumps(config))
    gguf.write(model, folder / "MODEL.gguf", lambda name: Type.F32)
    (folder / "doctor.json").write_text(report().model_dump_json())
    (folder / "FILE").write_text(r"- '\.experts\.': int4")
    if OPENSSL:
        new = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=localhost"
        files = ["-keyout", f"{folder}/server.key", "-out", f"{folder}/server.pem"]
        subprocess.run([OPENSSL, *new.split(), *files], check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server, by the README's command."""
    log = tmp_path_factory.mktemp("server") / "log"
    arguments = ("--config", "config.yaml", "--served-model-name", "tiny-moe", "Qwen/Qwen3-30B-A3B")
    with Server(log, *arguments, LVLLM_METRICS_EXPERTS="1").ready() as server:
        yield server.url


def here(line: str, url: str) -> str:
    """A command that asks the server at `url`."""
    if not re.search(r"http://127.0.0.1:8000|lvllm (chat|top)", line):
        return line
    line = line.replace("http://127.0.0.1:8000", url).replace("curl ", "curl --fail ")
    return line if url in line else re.sub(r"(lvllm \w+)", rf"\1 --url {url}", line)


def job_of(line: str, url: str) -> Job | None:
    """The job of a line; None if bash runs it."""
    said, _, command = here(line, url).rpartition(" | ")
    words = shlex.split(command.partition(" > ")[0])
    environment = {}
    while "=" in words[0]:
        name, _, environment[name] = words.pop(0).partition("=")
    if words[0] not in ("lvllm", "vllm"):
        return None
    question = subprocess.check_output(["bash", "-c", said], text=True) if said else QUESTION
    return Job(line, words, environment, question)


@pytest.fixture(scope="module")
def ran(folder: Path, server: str) -> dict[str, tuple[Any, str]]:
    """The exit code, or the text in its place, and the output of each command of LvLLM."""
    jobs = [job for line in COMMANDS if (job := job_of(line, server))]
    with (folder / "output").open("w+b") as output:
        process = fork(run_all, str(folder), jobs, environment=dict(os.environ), stdout=output)
        try:
            process.wait(END_SECONDS)
        finally:
            process.kill()
    lines = map(json.loads, (folder / "results").read_text().splitlines())
    return {line: (code, text) for line, code, text in lines}


@pytest.mark.slow
@pytest.mark.parametrize("line", COMMANDS)
def test_command(line: str, folder: Path, server: str, ran: dict[str, tuple[Any, str]]) -> None:
    if "server.pem" in line and not OPENSSL:
        pytest.skip("openssl makes the certificate")
    if job_of(line, server) is None:
        command = ["bash", "-o", "pipefail", "-c", here(line, server)]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return
    assert line in ran, (folder / "output").read_text()[-3000:]
    code, text = ran[line]
    assert code == 0, f"{code}\n{text[-3000:]}"
