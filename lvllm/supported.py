"""The releases of vLLM that LvLLM runs with."""

__all__ = ["TESTED", "VLLM"]

VLLM = ("0.31.0", "0.32.0", "0.33.0")
"""Every target of a patch was looked up in these releases. Others are refused. What has run in each
is in docs/upgrading-vllm.md."""

TESTED = "0.32.0"
"""The release that the tests run with."""
