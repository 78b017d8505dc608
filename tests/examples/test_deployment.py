"""The files for containers, Kubernetes and systemd: the facts in which they must agree."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from lvllm.settings.resolving import resolve
from lvllm.settings.variables import VARIABLES

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
DOCKERFILE = (EXAMPLES / "docker" / "Dockerfile").read_text()
FILES = [
    *(EXAMPLES / "docker").rglob("*"),
    *(EXAMPLES / "kubernetes").glob("*"),
    *(EXAMPLES / "systemd").glob("*"),
]
PORT = yaml.safe_load((ROOT / "config.yaml").read_text())["port"]


def read(name: str) -> Any:
    return yaml.safe_load((EXAMPLES / name).read_text())


COMPOSE = read("docker/compose.yaml")
DEPLOYMENT, SERVICE = yaml.safe_load_all((EXAMPLES / "kubernetes" / "lvllm.yaml").read_text())
POD = DEPLOYMENT["spec"]["template"]["spec"]
(CONTAINER,) = POD["containers"]


@pytest.mark.parametrize(
    "file", [file for file in FILES if file.is_file()], ids=lambda file: file.name
)
def test_settings_exist(file: Path) -> None:
    names = set(re.findall(r"\b(?:LVLLM|LK)_[A-Z_]+", file.read_text()))
    assert names <= {variable.name for variable in VARIABLES}


def test_settings_have_allowed_values() -> None:
    in_kubernetes = {one["name"]: one.get("value", "") for one in CONTAINER["env"]}
    lines = unit_of("serve")["Environment"]
    in_systemd = dict(one.split("=") for line in lines for one in line.split())
    for environment in (COMPOSE["services"]["lvllm"]["environment"], in_kubernetes, in_systemd):
        assert resolve(environment, None)["moe_numa_enabled"].value is True


def test_the_image_serves_on_the_port_that_is_asked() -> None:
    assert f"EXPOSE {PORT}\n" in DOCKERFILE
    assert f"http://127.0.0.1:{PORT}/health" in DOCKERFILE
    assert COMPOSE["services"]["lvllm"]["ports"] == [f"127.0.0.1:{PORT}:{PORT}"]
    (scraped,) = read("docker/prometheus.yml")["scrape_configs"]
    assert scraped["static_configs"] == [{"targets": [f"lvllm:{PORT}"]}]
    (port,) = CONTAINER["ports"]
    assert port["containerPort"] == PORT
    (served,) = SERVICE["spec"]["ports"]
    assert (served["port"], served["targetPort"]) == (PORT, port["name"])
    annotations = DEPLOYMENT["spec"]["template"]["metadata"]["annotations"]
    assert annotations["prometheus.io/port"] == str(PORT)


def in_image(instruction: str) -> list[str]:
    """The words of the image's ENTRYPOINT or CMD."""
    (words,) = re.findall(rf"^{instruction} (\[.*)$", DOCKERFILE, re.MULTILINE)
    read: list[str] = json.loads(words)
    return read


def test_all_start_the_image_alike() -> None:
    command = in_image("CMD")
    assert command[-2:] == ["--host", "0.0.0.0"]  # or nobody outside would reach it
    service = COMPOSE["services"]["lvllm"]
    assert CONTAINER["image"] == service["image"] == "lvllm:cpu"
    *start, option, seconds = CONTAINER["args"]
    assert (start, option) == (command, "--shutdown-timeout")
    assert service["command"] == CONTAINER["args"]
    # Running answers end before the container is killed.
    assert service["stop_grace_period"] == f"{POD['terminationGracePeriodSeconds']}s"
    assert int(seconds) + 10 <= POD["terminationGracePeriodSeconds"]


@pytest.mark.parametrize("unit", ["bank", "serve"])
def test_systemd_lets_services_write_into_their_caches_alone(unit: str) -> None:
    found = unit_of(unit)
    assert found["ProtectSystem"] == ["strict"]
    assert found["NoNewPrivileges"] == ["yes"]
    assert f"HOME=/var/cache/{found['CacheDirectory'][0]}" in found["Environment"]


def test_systemd_lets_running_answers_end() -> None:
    found = unit_of("serve")
    (seconds,) = re.findall(r"--shutdown-timeout (\d+)", found["ExecStart"][0])
    assert int(seconds) + 10 <= int(found["TimeoutStopSec"][0])
    # Otherwise the engine gets SIGTERM together with the server, and ends at once.
    assert found["KillMode"] == ["mixed"]


def unit_of(name: str) -> dict[str, list[str]]:
    """The settings of a service, each with all of its values."""
    found: dict[str, list[str]] = {}
    for line in (EXAMPLES / "systemd" / f"lvllm-{name}.service").read_text().splitlines():
        setting, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            found.setdefault(setting, []).append(value)
    return found


def test_the_image_has_what_is_needed_beside_python() -> None:
    (packages,) = re.findall(r"apt-get install -y --no-install-recommends (.*) \\", DOCKERFILE)
    # vLLM's kernels for CPUs load libnuma, which slim images lack.
    assert {"g++", "libnuma1"} <= set(packages.split())
    # As the first process, vLLM would not get SIGTERM before it has set a handler.
    assert in_image("ENTRYPOINT") == ["tini", "--", "vllm", "serve"]
    assert "tini" in packages.split()


def test_what_the_image_copies_exists() -> None:
    for source in re.findall(r"^COPY (\S+) ", DOCKERFILE, re.MULTILINE):
        assert source.startswith("--from=") or (ROOT / source).exists(), source
    ignored = (EXAMPLES / "docker" / "Dockerfile.dockerignore").read_text().split()
    assert not {"config.yaml", "examples", "requirements"} & set(ignored)
    # What the build makes here would not be made there, and perhaps for another device.
    assert {"vllm/*", "lvllm/engine/_engine.so", "build", ".venv"} <= set(ignored)


def test_mounted_files_exist_and_are_where_grafana_looks() -> None:
    mounted = {}
    for service in COMPOSE["services"].values():
        for volume in service["volumes"]:
            source, target = volume.removesuffix(":ro").split(":")
            mounted[target] = source
            if source.startswith("."):
                assert Path(os.path.normpath(EXAMPLES / "docker" / source)).exists()
            else:
                assert source in COMPOSE["volumes"]
    (provider,) = read("docker/grafana/dashboards/lvllm.yaml")["providers"]
    assert mounted[f"{provider['options']['path']}/lvllm.json"] == "../grafana/lvllm.json"
    (source,) = read("docker/grafana/datasources/prometheus.yaml")["datasources"]
    assert source["type"] == "prometheus"
    assert source["url"] == "http://prometheus:9090"
    assert "prometheus" in COMPOSE["services"]


def test_nothing_is_open_to_the_network_and_no_key_is_written_down() -> None:
    for service in COMPOSE["services"].values():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))
    assert COMPOSE["services"]["lvllm"]["environment"]["VLLM_API_KEY"].startswith("${")
    (key,) = (one for one in CONTAINER["env"] if one["name"] == "VLLM_API_KEY")
    assert key["valueFrom"] == {"secretKeyRef": {"name": "lvllm", "key": "api-key"}}
    assert SERVICE["spec"].get("type", "ClusterIP") == "ClusterIP"


def test_the_pod_is_found_probed_and_confined() -> None:
    labels = DEPLOYMENT["spec"]["template"]["metadata"]["labels"]
    assert labels == DEPLOYMENT["spec"]["selector"]["matchLabels"] == SERVICE["spec"]["selector"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert CONTAINER[probe]["httpGet"] == {"path": "/health", "port": "http"}
    # Else Kubernetes sets LVLLM_PORT for the Service named lvllm, and LvLLM refuses it.
    assert SERVICE["metadata"]["name"] == "lvllm"
    assert POD["enableServiceLinks"] is False
    resources = CONTAINER["resources"]
    assert resources["requests"] == resources["limits"]
    assert resources["limits"]["cpu"].isdecimal()
    assert POD["securityContext"]["runAsNonRoot"]
    assert f"--uid {POD['securityContext']['runAsUser']} " in DOCKERFILE
    confined = CONTAINER["securityContext"]
    assert confined["readOnlyRootFilesystem"]
    assert not confined["allowPrivilegeEscalation"]
    assert confined["capabilities"] == {"drop": ["ALL"]}
    mounts = {one["name"]: one["mountPath"] for one in CONTAINER["volumeMounts"]}
    assert set(mounts) == {volume["name"] for volume in POD["volumes"]}
    assert {"/dev/shm", "/tmp", "/home/lvllm/.cache"} <= set(mounts.values())
