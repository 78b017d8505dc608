"""How `lvllm top` shows a server: for 80 columns, in a terminal or a pipe."""

from collections.abc import Iterable

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lvllm.top.rates import PathRates, Rates
from lvllm.top.routing import Routing
from lvllm.units import amount

__all__ = ["experts_view", "view"]

HOTTEST = 8


def view(url: str, rates: Rates, bandwidth: float | None) -> RenderableType:
    """The whole picture. `bandwidth` is the machine's in GB/s, if the user has told it."""
    parts: list[RenderableType] = [
        _title(url, f"over {rates.seconds:.1f} s"),
        Text(""),
        _requests(rates),
        Text(""),
        _paths(rates.paths, bandwidth),
    ]
    if lines := list(_lines(rates)):
        parts += [Text(""), *lines]
    return Group(*parts)


def _title(url: str, more: str) -> Text:
    return Text.assemble(("lvllm top", "bold"), f"  {url}  ", (more, "dim"))


def _requests(rates: Rates) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    table.add_row(
        "tokens/s", f"{rates.answer_tokens:.1f} answers", f"{rates.prompt_tokens:.1f} prompts"
    )
    table.add_row("requests", f"{rates.running} running", f"{rates.waiting} waiting")
    table.add_row("KV cache", _percent(rates.kv_cache), "")
    return table


def _paths(paths: Iterable[PathRates], bandwidth: float | None) -> Table:
    table = Table("experts", "path", box=None, pad_edge=False, header_style="bold")
    columns = ["calls/s", "tokens/s", "experts", "busy", "waits", "GB/s"]
    if bandwidth is not None:
        columns.append(f"of {bandwidth:.0f}")
    for column in columns:
        table.add_column(column, justify="right")
    for one in paths:
        cells = [
            f"{one.calls:.0f}",
            f"{one.tokens:.0f}",
            "" if one.experts is None else f"{one.experts:.1f}",
            _percent(one.busy),
            _percent(one.waiting),
            "" if one.gb_per_s is None else f"{one.gb_per_s:.1f}",
        ]
        if bandwidth is not None:
            reads = one.path == "cpu" and one.gb_per_s is not None
            cells.append(_percent((one.gb_per_s or 0) / bandwidth) if reads else "")
        table.add_row(one.layers, one.path, *cells)
    return table


def _lines(rates: Rates) -> Iterable[RenderableType]:
    """What not every server has, and what is short."""
    table = Table.grid(padding=(0, 2))
    reasons = [
        f"{one.path} {reason} {value:.0f}/s"
        for one in rates.paths
        for reason, value in one.reasons.items()
        if value and reason != one.path
    ]
    if reasons:
        table.add_row("reasons", ", ".join(reasons))
    if rates.nodes:
        nodes = ", ".join(f"node {node} {value:.1f} GB/s" for node, value in rates.nodes.items())
        table.add_row("memory", nodes)
    if rates.groups:
        groups = ", ".join(f"{value:.0f} {result}/s" for result, value in rates.groups.items())
        table.add_row("staged", groups)
    if reads := sum(rates.cache.values()):
        hits = rates.cache.get("hit", 0.0) / reads
        table.add_row("cache", f"{hits:.0%} of {reads:.0f} reads/s from the GPU")
    if rates.prefill_queue:
        queue = ", ".join(f"{value} {stage}" for stage, value in rates.prefill_queue.items())
        table.add_row("prefill", queue)
    held = f"{amount(rates.bank_bytes)} of experts"
    if rates.staging_bytes:
        held += f", {amount(rates.staging_bytes)} for copies"
    if rates.cache_bytes:
        held += f", {amount(rates.cache_bytes)} in the GPU's cache"
    table.add_row("holds", held)
    stops = Text(str(rates.nan_stops), style="bold red" if rates.nan_stops else "")
    table.add_row("NaN stops", stops)
    yield table


def experts_view(url: str, found: Routing, width: int, height: int | None) -> RenderableType:
    """The picture of the routing, and its hottest experts. `height` None shows all layers."""
    labels = max(len(name) for name in found.layers) + 2
    fixed = HOTTEST + 6  # the lines beside the picture
    rows = found.picture(max(8, width - labels), None if height is None else max(4, height - fixed))
    picture = Table.grid(padding=(0, 2))
    for name, shades in rows:
        picture.add_row(Text(name, style="dim"), Text(shades, no_wrap=True))
    hot = Table("layer", "expert", box=None, pad_edge=False, header_style="bold")
    hot.add_column("of its layer", justify="right")
    hot.add_column("times average", justify="right")
    for one in found.hottest(HOTTEST):
        hot.add_row(one.layer, one.expert, f"{one.share:.1%}", f"{one.times:.1f}")
    layers, experts = len(found.layers), max(len(one) for one in found.layers.values())
    return Group(
        _title(url, f"{experts} experts in {layers} layers"),
        Text(
            "Tokens since the start: ░ up to half the average  ▒ twice  ▓ four times  █ more",
            style="dim",
        ),
        picture,
        Text(""),
        hot,
    )


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"
