"""The clients and the notebook, run as they are against one server, and programs without one."""

import io
import json
import os
import re
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import nbformat
import pytest
from nbclient import NotebookClient

from lvllm.serving.background import free_port
from tests.chat.fake_server import Answer, serving
from tests.e2e.generate import ONE_PROCESS
from tests.e2e.server import Server
from tests.e2e.warm_process import ROOT, fork
from tests.models import vision

CLIENTS = ROOT / "examples" / "clients"
OFFLINE = ROOT / "examples" / "offline"
NOTEBOOK = ROOT / "examples" / "notebooks" / "users_and_speed.ipynb"
KEY = "secret"
NO_WHITE_SPACE = {"backend": "xgrammar", "disable_any_whitespace": True}
OPTIONS = (
    "--enable-auto-tool-choice",
    "--tool-call-parser=hermes",
    f"--structured-outputs-config={json.dumps(NO_WHITE_SPACE)}",
)
PROGRAMS = sorted(path.name for path in CLIENTS.glob("*.py") if path.name != "connection.py")

Variables = dict[str, str]


class Said(NamedTuple):
    """What a client printed, and the one line in which it failed or None."""

    out: str
    line: str | None


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Variables]:
    """The demo model on a server with a key. Yields the variables that lead the clients to it."""
    log = tmp_path_factory.mktemp("clients") / "log"
    with Server(log, "--config", "config.yaml", *OPTIONS, VLLM_API_KEY=KEY) as served:
        yield {"OPENAI_BASE_URL": f"{served.ready().url}/v1", "OPENAI_API_KEY": KEY}


@pytest.fixture(scope="module")
def clients(server: Variables) -> dict[str, Said]:
    """What each client says about that server."""
    return ran(server, *([name] for name in PROGRAMS))


def ran(variables: Variables, *commands: list[str]) -> dict[str, Said]:
    """Run clients with their arguments, one after the other in one forked process."""
    with tempfile.NamedTemporaryFile("r") as result:
        printed(run_clients, commands, result.name, **variables)
        return {name: Said(*said) for name, said in json.load(result).items()}


def run_clients(commands: list[list[str]], result: str) -> None:
    """In a forked process: what `python CLIENT ARGUMENTS` does, for each command."""
    sys.path.insert(0, str(CLIENTS))
    found = {}
    for name, *arguments in commands:
        sys.argv = [name, *arguments]
        line = None
        with redirect_stdout(io.StringIO()) as out:
            try:
                runpy.run_path(str(CLIENTS / name), run_name="__main__")
            except SystemExit as end:
                line = str(end)
        found[name] = (out.getvalue().strip(), line)
    Path(result).write_text(json.dumps(found))


def run_offline() -> None:
    """In a forked process: what `python examples/offline/generate.py` does."""
    sys.argv = ["generate.py"]
    runpy.run_path(str(OFFLINE / "generate.py"), run_name="__main__")


def run_vllm(*arguments: str) -> None:
    """In a forked process: what the command `vllm` does."""
    from vllm.entrypoints.cli.main import main

    sys.argv = ["vllm", *arguments]
    main()


def printed(function: Callable[..., None], *arguments: Any, **variables: str) -> str:
    """Run a function in a forked process, which must succeed, and return what it prints."""
    with tempfile.TemporaryFile("w+") as out:
        process = fork(function, *arguments, environment=os.environ | variables, stdout=out)
        try:
            code = process.wait(120)
        finally:
            process.kill()
        out.seek(0)
        text = out.read()
    assert code == 0, text[-8000:]
    return text


@pytest.mark.parametrize("name", ["chat.py", "messages.py", "langchain_chat.py", "tools.py"])
def test_an_answer_is_right(name: str, clients: dict[str, Said]) -> None:
    assert clients[name] == ("47 + 38 = 85.", None)


def test_curl_gets_the_right_answer(server: Variables) -> None:
    out = subprocess.check_output(["sh", CLIENTS / "chat.sh"], env=os.environ | server, text=True)
    assert json.loads(out)["choices"][0]["message"]["content"] == "47 + 38 = 85."


def test_an_answer_is_streamed(clients: dict[str, Said]) -> None:
    answer, tokens = clients["chat_streaming.py"].out.splitlines()
    assert answer == "Sorted: 42, 19, 7."
    assert int(tokens.removesuffix(" tokens")) > 5


def test_several_users_get_right_answers(clients: dict[str, Said]) -> None:
    *answers, last = clients["users.py"].out.splitlines()
    assert answers == [
        "What is 47 + 38? 47 + 38 = 85.",
        "What is 90 - 41? 90 - 41 = 49.",
        "Which is larger, 512 or 498? 512 is larger than 498.",
        "Sort 42, 7, 19 from largest to smallest. Sorted: 42, 19, 7.",
    ]
    assert last.startswith("4 users, ")


def test_output_has_the_schemas_form(clients: dict[str, Said]) -> None:
    found = clients["structured_output.py"]
    numbers = re.fullmatch(r"Sum\(left=(\d+), right=(\d+), total=(\d+)\)", found.out)
    assert numbers, found
    assert all(int(n) <= most for n, most in zip(numbers.groups(), (99, 99, 198), strict=True))


def test_a_function_is_called() -> None:
    """The demo model calls none, so a server is made up, which calls it once."""
    function = {"name": "add", "arguments": '{"a": 47, "b": 38}'}
    called = {"tool_calls": [{"id": "call-1", "type": "function", "function": function}]}
    with serving(whole(called), whole({"content": "It is 85."})) as fake:
        (said,) = ran({"OPENAI_BASE_URL": fake.url}, ["tools.py"]).values()
    assert said == ('add({"a": 47, "b": 38}) = 85\nIt is 85.', None)
    result = {"role": "tool", "tool_call_id": "call-1", "content": "85"}
    assert fake.requests[1]["messages"][2] == result


def whole(message: dict[str, Any]) -> Answer:
    """An answer that is not streamed; clients take each status from 200 to 299 for a success."""
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", **message}}
    return Answer(status=201, body={"id": "1", "object": "chat.completion", "choices": [choice]})


def test_a_model_without_vision_refuses_a_picture(clients: dict[str, Said]) -> None:
    out, line = clients["vision.py"]
    assert out == ""
    assert "status 400: " in (line or "")
    assert "is not a multimodal model" in (line or "")


def test_a_model_with_vision_takes_a_picture(tmp_path: Path) -> None:
    """Its weights are random, so only the number of the prompt's tokens is known."""
    folder = vision.make("qwen3_vl_moe", tmp_path / "model")
    words = "".join(vision.QWEN_TOKENS[name] for name in vision.QWEN_AROUND)
    template = tmp_path / "template"
    template.write_text(
        "{% for message in messages %}{% for part in message['content'] %}"
        f"{{% if part['type'] == 'text' %}}w5 w6{{% else %}} {words}{{% endif %}}"
        "{% endfor %}{% endfor %}"
    )
    options = ("--chat-template", str(template), "--chat-template-content-format", "openai")
    sizes = ("--max-model-len", "128", "--kv-cache-memory-bytes", str(64 << 20), "--enforce-eager")
    with Server(tmp_path / "log", str(folder), "--dtype", "bfloat16", *options, *sizes) as served:
        found = ran({"OPENAI_BASE_URL": f"{served.ready().url}/v1"}, ["vision.py"])
    # 128 pixels are 8 patches, and two by two patches become a token.
    expected = f"{2 + 2 + 4 * 4} tokens of text and picture"
    assert found["vision.py"].out.splitlines()[-1:] == [expected], found


def test_a_missing_server_is_one_line() -> None:
    """By the real command, and by all clients in a forked process."""
    url = f"http://127.0.0.1:{free_port()}/v1"
    expected = f"no server answers at {url}: `lvllm serve` starts one, --url names another"
    command = [sys.executable, str(CLIENTS / "chat.py"), "--url", url]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.strip()) == (1, "", expected)
    said = ran({}, *([name, "--url", url] for name in PROGRAMS))
    assert said == dict.fromkeys(PROGRAMS, Said("", expected))
    there = os.environ | {"OPENAI_BASE_URL": url}
    done = subprocess.run(["sh", CLIENTS / "chat.sh"], env=there, capture_output=True, text=True)
    assert done.returncode
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_wrong_key_is_one_line(server: Variables) -> None:
    (said,) = ran(server, ["chat.py", "--api-key", "other"]).values()
    assert said.line
    assert said.line.endswith("wants another key: --api-key or OPENAI_API_KEY")


def test_the_notebook_measures_and_plots(
    server: Variables, monkeypatch: pytest.MonkeyPatch
) -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code), "outputs are committed"
    for name, value in (server | {"USERS": "1,3", "TOKENS": "16"}).items():
        monkeypatch.setenv(name, value)
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    text = "".join(output.text for output in code[-2].outputs)
    rows = re.findall(r"(\d+) users: (\d+) tokens", text)
    assert rows == [("1", "16"), ("3", "48")]
    assert any("image/png" in output.get("data", {}) for output in code[-1].outputs)


def test_answers_without_a_server_are_right() -> None:
    said = printed(run_offline, **ONE_PROCESS)
    assert [line for line in said.splitlines() if line.startswith(("generate: ", "chat: "))] == [
        "generate: 47 + 38 = 85.",
        "chat: 90 - 41 = 49.",
        "chat: stone reversed is enots.",
    ]
    assert "LvLLM: experts on lk" in said


def test_a_file_of_requests_is_answered(tmp_path: Path) -> None:
    """What the script runs, with a forked process in the place of the command."""
    script = (OFFLINE / "batch.sh").read_text().replace("$folder", str(OFFLINE))
    answers = tmp_path / "answers.jsonl"
    command = script.partition("LVLLM_MOE_NUMA_ENABLED=1 vllm ")[2].replace("\\\n", " ")
    arguments = command.replace('"', "").replace("$answers", str(answers)).split()
    said = printed(run_vllm, *arguments, LVLLM_MOE_NUMA_ENABLED="1")
    assert "LvLLM: experts on lk" in said
    found = {}
    for line in answers.read_text().splitlines():
        answer = json.loads(line)
        body = answer["response"]["body"]
        found[answer["custom_id"]] = body["choices"][0]["message"]["content"]
    assert found == {
        "add": "47 + 38 = 85.",
        "sort": "Sorted: 42, 19, 7.",
        "reverse": "stone 倒过来是 enots。",
    }
