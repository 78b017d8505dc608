"""What the engine makes of this machine. It may fail to load, which is a fact, too."""

from collections.abc import Mapping

from lvllm.machine.report import Engine, Product
from lvllm.settings import variables
from lvllm.settings.variables import SettingError

__all__ = ["read"]


def read(environ: Mapping[str, str]) -> Engine:
    """Start the engine with its default threads, or those of LK_THREADS, and ask it.

    This configures the engine of the process. Its start times the multiplication in registers for a
    millisecond.
    """
    try:
        return _started(_threads(environ))
    # Whatever it is, a missing library or a PyTorch of another ABI, the user must see it.
    except Exception as error:
        return Engine(error=" ".join(f"{type(error).__name__}: {error}".split())[:400])


def _threads(environ: Mapping[str, str]) -> int | None:
    variable = variables.BY_KEY["lk_threads"]
    try:
        threads: int | None = variables.parse(variable, environ.get(variable.name), variable.name)
    except SettingError:  # A finding of its own.
        return None
    return threads


def _started(threads: int | None) -> Engine:
    from lvllm import engine
    from lvllm.machine import cpus
    from lvllm.machine.facts import limits

    machine = cpus.this_machine()
    threads = threads or cpus.default_threads(machine, 1, limits.cpu_quota())
    engine.configure(threads=threads, cpus=cpus.choose(machine, threads))
    info = engine.info()
    products = []
    for name, bits, arithmetic in engine.format_arithmetics():
        rate = info.rates.get(arithmetic)
        products.append(
            Product(
                format=name,
                activation_bits=bits,
                isa=arithmetic.isa,
                multiplied_as=arithmetic.name,
                giga_weights_per_s_and_core=None if rate is None else rate / 1e9,
            )
        )
    return Engine(
        isa=info.isa,
        available_isas=list(engine.available_isas()),
        threads=info.threads,
        nodes=list(info.nodes),
        products=products,
    )
