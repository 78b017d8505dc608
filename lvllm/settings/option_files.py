"""The files that options of `vllm serve` name, looked at before anything is loaded.

vLLM opens most of them once the model is in memory, and ends in a traceback, waits for the writer
of a pipe, or goes on without the file. `checkpoint.model_files` checks those in a model's folder.
"""

import json
import os
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lvllm import documents
from lvllm.checkpoint import model_files
from lvllm.checkpoint.headers import CheckpointError, read_header
from lvllm.errors import quoted, readable
from lvllm.settings.variables import SettingError

__all__ = ["check"]

MOST_BYTES = 1 << 20
"""No template, certificate or parser comes near it."""
MARKS = "{}\n"
"""vLLM takes a chat template with one of these for the template itself, not for its file."""
ADAPTER_CONFIG = "adapter_config.json"
ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin", "adapter_model.pt")


def check(options: Mapping[str, Any]) -> None:
    """Raise SettingError or CheckpointError for a file that cannot serve.

    Args:
        options: the parsed options of a command of vLLM, by their names with underscores.
    """
    if template := options.get("chat_template"):
        _check_template(template)
    for name in ("tool_parser_plugin", "reasoning_parser_plugin"):
        # vLLM ignores names of up to three characters.
        if len(plugin := options.get(name) or "") > 3:
            _check_plugin(name, plugin)
    for name in ("log_config_file", "mm_encoder_fp8_scale_path"):
        if options.get(name):
            _check_object(name, options[name])
    _check_tls(options)
    for module in options.get("lora_modules") or ():
        if options.get("enable_lora") is False:
            raise SettingError("--lora-modules needs --enable-lora")
        _check_adapter("lora_modules", module.path)
    for path in (options.get("default_mm_loras") or {}).values():
        _check_adapter("default_mm_loras", path)


def _refuse(option: str, value: str, fault: str) -> SettingError:
    return SettingError(f"--{option.replace('_', '-')} {readable(value)}: {fault}")


def _text(option: str, path: str) -> str:
    try:
        return documents.read_text(Path(path), MOST_BYTES)
    except ValueError as error:  # also for a name with a zero byte
        raise _refuse(option, path, str(error)) from None


def _check_template(template: str) -> None:
    text, option = template, "chat_template"
    if os.path.lexists(template):  # False also for a text that is too long for a name.
        text = _text(option, template)
    elif not set(template) & set(MARKS):
        from vllm.transformers_utils.chat_templates.registry import CHAT_TEMPLATES_DIR

        if not (CHAT_TEMPLATES_DIR / template).is_file():
            raise _refuse(option, template, "is neither a file nor the name of one of vLLM's own")
        return
    if (fault := model_files.template_fault(text)) is not None:
        raise _refuse(option, template, f"is no valid Jinja: {fault}")


def _check_plugin(option: str, plugin: str) -> None:
    """A plugin is a file of Python, or a module, which Python looks for."""
    if "/" not in plugin and not plugin.endswith(".py"):
        return
    if not plugin.endswith(".py"):
        raise _refuse(option, plugin, "is no file of Python, whose name ends with .py")
    text = _text(option, plugin)
    try:
        compile(text, plugin, "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = f"line {error.lineno}: " if isinstance(error, SyntaxError) else ""
        said = error.msg if isinstance(error, SyntaxError) else str(error)
        raise _refuse(option, plugin, f"is no Python: {line}{said}") from None


def _check_object(option: str, path: str) -> None:
    text = _text(option, path)
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _refuse(option, path, f"is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise _refuse(option, path, f"is no JSON object, but {quoted(found)}")


def _check_tls(options: Mapping[str, Any]) -> None:
    """Try what the web server does with the files."""
    certificate, key = options.get("ssl_certfile"), options.get("ssl_keyfile")
    authorities, ciphers = options.get("ssl_ca_certs"), options.get("ssl_ciphers")
    clients = options.get("ssl_cert_reqs", ssl.CERT_NONE)
    files = {"ssl_certfile": certificate, "ssl_keyfile": key, "ssl_ca_certs": authorities}
    texts = {option: _text(option, path) for option, path in files.items() if path}
    if key and not certificate:
        raise _refuse("ssl_keyfile", key, "needs --ssl-certfile")
    if not certificate:
        return  # The server speaks HTTP.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    # OpenSSL asks for the password of an encrypted key.
    if "ENCRYPTED" not in texts.get("ssl_keyfile", texts["ssl_certfile"]):
        try:
            context.load_cert_chain(certificate, key)
        except (ssl.SSLError, OSError) as error:
            with_key = f"with the key in {readable(key or certificate)}"
            fault = f"cannot be used {with_key}: {_said(error)}"
            raise _refuse("ssl_certfile", certificate, fault) from None
    if authorities:
        try:
            context.load_verify_locations(authorities)
        except (ssl.SSLError, OSError) as error:
            fault = f"has no certificates: {_said(error)}"
            raise _refuse("ssl_ca_certs", authorities, fault) from None
    if clients not in list(ssl.VerifyMode):
        allowed = ", ".join(f"{mode:d} ({mode.name})" for mode in ssl.VerifyMode)
        raise _refuse("ssl_cert_reqs", str(clients), f"allowed is {allowed}")
    if ciphers:
        try:
            context.set_ciphers(ciphers)
        except ssl.SSLError:
            raise _refuse("ssl_ciphers", ciphers, "names no cipher that OpenSSL knows") from None


def _said(error: OSError) -> str:
    return getattr(error, "reason", None) or error.strerror or type(error).__name__


def _check_adapter(option: str, path: str) -> None:
    """An adapter is a local folder or, if nothing here has its name, one of the hub."""
    folder = Path(path).expanduser()
    if not os.path.lexists(folder):
        if folder.is_absolute():
            raise _refuse(option, path, "No such file or directory")
        return
    try:
        if not folder.is_dir():
            raise _refuse(option, path, "is no folder with an adapter")
        names = {file.name for file in folder.iterdir()}
    except OSError as error:
        raise _refuse(option, path, str(error.strerror)) from None
    if ADAPTER_CONFIG not in names:
        raise CheckpointError(f"{folder}: has no {ADAPTER_CONFIG}")
    model_files.check(folder, [ADAPTER_CONFIG])
    weights = [name for name in ADAPTERS if name in names]
    if not weights:
        raise CheckpointError(f"{folder}: has none of {', '.join(ADAPTERS)}")
    if weights[0].endswith(".safetensors"):
        read_header(folder / weights[0])
