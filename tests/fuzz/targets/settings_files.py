"""The file of `vllm serve --config`, or one setting in the environment, up to the settings' values.

The first byte says whether the rest is the file, or a variable's value; the second one then says
which variable.
"""

from pathlib import Path

from lvllm.settings import config_file
from lvllm.settings.resolving import resolve
from lvllm.settings.variables import VARIABLES
from tests.fuzz.rules import ask
from tests.fuzz.scratch import scratch_folder


def one_input(data: bytes) -> None:
    if data[:1] == b"v" and len(data) > 1:
        variable = VARIABLES[data[1] % len(VARIABLES)]
        ask(resolve, {variable.name: data[2:].decode(errors="surrogateescape")}, None)
        return
    with scratch_folder() as folder:
        path = folder / "config.yaml"
        path.write_bytes(data[1:])
        ask(_settings_of, path)


def _settings_of(path: Path) -> None:
    written = config_file.read(path)
    config_file.as_arguments(written)
    resolve({}, config_file.section(written))
