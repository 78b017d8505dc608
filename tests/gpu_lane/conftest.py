"""Each test begins without the lanes of those before it, which a traceback may keep."""

import pytest

from lvllm.gpu import lane


@pytest.fixture(autouse=True)
def no_lane_of_another_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lane, "_latest", None)
