"""What is refused of the files that options of `vllm serve` name."""

import json
import os
import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lvllm.errors import LvllmError
from lvllm.settings import option_files


def huge(file: Path) -> None:
    """A terabyte without blocks on the disk."""
    file.touch()
    os.truncate(file, 1 << 40)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "pipe": (os.mkfifo, "not a regular file"),
    "folder": (Path.mkdir, "not a regular file"),
    "circle": (lambda file: file.symlink_to(file.name), "Too many levels of symbolic links"),
    "dangling": (lambda file: file.symlink_to("gone"), "No such file or directory"),
    "bytes": (lambda file: file.write_bytes(b"\xff\xfe{{ a }}"), "not UTF-8: invalid start byte"),
    "huge": (huge, "more than 1048576 bytes"),
    "code": (lambda file: file.write_text("{% if %}\ndef a(:"), ""),
}
FAULTS = {
    "chat_template": "is no valid Jinja: line 1: ",
    "tool_parser_plugin": "is no Python: line 1: ",
    "reasoning_parser_plugin": "is no Python: line 1: ",
    "log_config_file": "is no JSON: ",
    "ssl_certfile": "cannot be used with the key in",
    "ssl_keyfile": "needs --ssl-certfile",
}


def refused(options: dict[str, Any]) -> str:
    with pytest.raises(LvllmError) as caught:
        option_files.check(options)
    said = str(caught.value)
    assert "\n" not in said
    return said


@pytest.mark.parametrize("option", FAULTS)
def test_files_that_cannot_be_read(option: str, tmp_path: Path) -> None:
    for damage, (make, fault) in DAMAGES.items():
        file = tmp_path / f"{damage}.py"
        make(file)
        said = refused({option: str(file)})
        assert said.startswith(f"--{option.replace('_', '-')} {file}: ")
        assert (fault or FAULTS[option]) in said
    if option != "chat_template":
        assert "No such file" in refused({option: str(tmp_path / "missing.py")})


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_files_that_may_not_be_read(tmp_path: Path) -> None:
    file = tmp_path / "template"
    file.touch(0)
    assert "Permission denied" in refused({"chat_template": str(file)})


def test_templates(tmp_path: Path) -> None:
    file = tmp_path / "template.jinja"
    file.write_text("{% for m in messages %}{{ m.content }}{% endfor %}" * random.randint(1, 99))
    for sound in (str(file), file.read_text(), "template_chatml.jinja", None):
        option_files.check({"chat_template": sound})
    assert "is neither a file nor" in refused({"chat_template": "nowhere.jinja"})
    assert "is no valid Jinja: line 2" in refused({"chat_template": "a\n{{ b"})


def test_plugins(tmp_path: Path) -> None:
    """A plugin is a file or a module; vLLM ignores names of up to three characters."""
    file = tmp_path / "parser.py"
    file.write_text("def parse():\n    return 1\n")
    for sound in (str(file), "json.decoder", "abc", "", None):
        option_files.check({"tool_parser_plugin": sound})
    renamed = file.rename(tmp_path / "parser")
    assert "ends with .py" in refused({"tool_parser_plugin": str(renamed)})


def test_objects(tmp_path: Path) -> None:
    file = tmp_path / "logging.json"
    file.write_text(json.dumps({"version": 1}))
    option_files.check({"log_config_file": str(file)})
    file.write_text("[1]")
    assert "is no JSON object, but [1]" in refused({"log_config_file": str(file)})


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificates")
def test_certificates(tmp_path: Path) -> None:
    names = ["key", "certificate", "other", "other_certificate"]
    key, certificate, other, other_certificate = (str(tmp_path / name) for name in names)
    for private, public in ((key, certificate), (other, other_certificate)):
        command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=a"
        subprocess.run(
            [*command.split(), "-keyout", private, "-out", public], check=True, capture_output=True
        )
    sound = {"ssl_certfile": certificate, "ssl_keyfile": key}
    option_files.check(sound | {"ssl_ca_certs": other_certificate, "ssl_ciphers": "HIGH"})
    both = tmp_path / "both"
    both.write_text(Path(key).read_text() + Path(certificate).read_text())
    option_files.check({"ssl_certfile": str(both)})
    said = refused(sound | {"ssl_keyfile": other})
    assert said.startswith(f"--ssl-certfile {certificate}: cannot be used with the key in {other}:")
    said = refused(sound | {"ssl_ca_certs": other})
    assert said.startswith(f"--ssl-ca-certs {other}: has no certificates: ")
    said = refused(sound | {"ssl_cert_reqs": 3})
    assert said.startswith("--ssl-cert-reqs 3: allowed is 0 (CERT_NONE), ")
    assert "names no cipher" in refused(sound | {"ssl_ciphers": "none-such"})


def test_adapters(tmp_path: Path) -> None:
    def given(path: Path | str) -> dict[str, Any]:
        return {"lora_modules": [SimpleNamespace(name="a", path=str(path))]}

    assert "No such file or directory" in refused(given(tmp_path / "missing"))
    option_files.check(given("nobody/of-the-hub"))
    assert "needs --enable-lora" in refused(given("nobody/of-the-hub") | {"enable_lora": False})
    for damage, (make, _) in DAMAGES.items():
        if damage not in ("folder", "dangling"):
            make(tmp_path / damage)
            assert "is no folder with an adapter" in refused(given(tmp_path / damage))
    folder = tmp_path / "adapter"
    folder.mkdir()
    assert "has no adapter_config.json" in refused(given(folder))
    config = folder / "adapter_config.json"
    os.mkfifo(config)
    assert "adapter_config.json: is no regular file" in refused(given(folder))
    config.unlink()
    config.write_text('{"r": 8}')
    assert "has none of adapter_model.safetensors" in refused(given(folder))
    weights = folder / "adapter_model.safetensors"
    save_file({"a": torch.rand(3, 5)}, weights)
    option_files.check(given(folder))
    os.truncate(weights, weights.stat().st_size - 1)
    assert f"{weights}: " in refused(given(folder))
    assert f"{weights}: " in refused({"default_mm_loras": {"image": str(folder)}})
