"""Loads a model's experts for a bank, as the workers of a server do, and ends.

    python -m lvllm.bank.loader [MODEL] [ARGUMENTS OF VLLM SERVE]...

The environment names the bank (`lvllm.handover.banks.LOADS_FOR`). vLLM's executor builds and loads
the model in its workers; a server would then make a scheduler, a KV cache and an HTTP server.
"""

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from lvllm.errors import LvllmError
from lvllm.handover import banks

__all__ = ["load"]

KV_CACHE_BYTES = 1 << 20
"""No cache is made, so the memory plan is to count none; the setting must be positive."""


def load(words: Sequence[str], bank: str) -> None:
    """Load the experts of the server that `vllm serve WORDS` would be.

    Raises LvllmError for what a bank cannot load, SystemExit or any error of vLLM's.
    """
    from vllm.v1.executor import Executor

    from lvllm.faults.shutdown import stop_at_once
    from lvllm.prepare import shared_identity
    from lvllm.settings.configuration import HybridConfig

    stop_at_once()
    config = _configuration(words)
    parallel = config.parallel_config
    if parallel.data_parallel_size > 1 or parallel.nnodes > 1:
        raise LvllmError(
            f"data-parallel-size={parallel.data_parallel_size}, nnodes={parallel.nnodes}: a bank"
            " loads for one replica on one host, so 1 is allowed"
        )
    name = HybridConfig.carried(config).shared_experts
    if name is None:
        raise LvllmError(f"{config.model_config.model} has no experts that a bank could hold")
    identity = shared_identity(config)
    ranks = parallel.world_size
    banks.tell(bank, {"loads": name, "ranks": ranks, "identity": identity})
    executor = Executor.get_class(config)(config)
    banks.tell(bank, {"loaded": True})
    executor.shutdown()


def _configuration(words: Sequence[str]) -> Any:
    """vLLM's configuration of the server, without a KV cache."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.usage.usage_lib import UsageContext
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser(prog="lvllm bank")
    ServeSubcommand().subparser_init(parser.add_subparsers(dest="subparser"))
    arguments = parser.parse_args(["serve", *words])
    if arguments.model_tag is not None:
        arguments.model = arguments.model_tag
    engine = AsyncEngineArgs.from_cli_args(arguments)
    engine.kv_cache_memory_bytes = KV_CACHE_BYTES
    return engine.create_engine_config(UsageContext.OPENAI_API_SERVER)


def main() -> None:
    bank = os.environ[banks.LOADS_FOR]
    try:
        load(sys.argv[1:], bank)
    except SystemExit as end:
        if isinstance(end.code, str):
            _fail(bank, end.code.removeprefix("lvllm: "))
        raise SystemExit(1) from None
    except Exception as error:
        said = " ".join(str(error).split()) or type(error).__name__
        _fail(bank, said if isinstance(error, LvllmError) else f"{type(error).__name__}: {said}")
        raise SystemExit(1) from None


def _fail(bank: str, line: str) -> None:
    with suppress(OSError):  # A bank that has ended needs no reason.
        banks.tell(bank, {"failed": line})


if __name__ == "__main__":
    main()
