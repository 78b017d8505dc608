"""What Ray's actors get of the environment."""

import pytest
from vllm.ray.ray_env import get_env_vars_to_copy

from lvllm.upstream import ray_variables


@pytest.mark.parametrize("given", [None, "MY_, OTHER_"])
def test_ray_copies_our_variables(given: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ray_variables.MORE_PREFIXES, raising=False)
    if given is not None:
        monkeypatch.setenv(ray_variables.MORE_PREFIXES, given)
    ours = {"LVLLM_MOE_NUMA_ENABLED": "1", "LK_THREADS": "2", "LVLLM_MOE_USE_WEIGHT": "INT4"}
    for name, value in (ours | {"MY_NAME": "x", "_LVLLM_FAILURE": "1:2"}).items():
        monkeypatch.setenv(name, value)
    assert not set(ours) & get_env_vars_to_copy()
    for _ in range(2):  # the plugin may be loaded twice
        ray_variables.copy_ours()
    copied = get_env_vars_to_copy()
    assert set(ours) <= copied
    assert ("MY_NAME" in copied) == (given is not None)
    assert "_LVLLM_FAILURE" not in copied, "it names a file of this process"
