"""The report on a terminal."""

from __future__ import annotations

import io
from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from nanovllm_jax.inspection.profile_summary import duration, profile_tables
from nanovllm_jax.inspection.report import Difference, Program, Report

_KERNELS_SHOWN = 12


def as_text(report: Report) -> str:
    """The summary as plain text."""
    return render(summary(report))


def render(what: RenderableType) -> str:
    """Rich's renderables as plain text."""
    stream = io.StringIO()
    Console(file=stream, width=120, color_system=None).print(what)
    return stream.getvalue()


def summary(report: Report) -> Group:
    """The summary as rich's renderables: card, programs, kernels, memory and findings."""
    card = report.card
    layers = card.shape["num_layers"]
    parts: list[RenderableType] = [
        Text(f"{card.model}: {card.family}, {layers} layers, {card.parameters / 1e6:,.0f}M parameters", style="bold"),
        Text(f"for {card.target}, {card.devices} device(s); {card.dtype} weights, {card.cache_dtype} cache"),
        Text(f"costs at {card.context} tokens a sequence; limits at the data sheet's peaks"),
        _programs(report),
    ]
    parts += [_kernels(program) for program in report.programs if program.kernels]
    parts.append(_memory(report))
    if report.findings:
        parts.append(Text("findings", style="bold yellow"))
        parts += [Text(f"  {one.program}: {one.kind}: {one.message}") for one in report.findings]
    else:
        parts.append(Text("no findings: state is updated in place, no stray float32, large copy or host transfer"))
    if report.profile:
        parts.append(profile_tables(report.profile))
    needs = sorted({program.needs for program in report.programs if program.needs})
    if needs:
        parts.append(Text(f"'–' needs {', '.join(needs)}", style="dim"))
    return Group(*parts)


def difference_table(found: Sequence[Difference]) -> RenderableType:
    """What differs between two reports."""
    if not found:
        return Text("no difference")
    table = Table("value", "before", "after", title="differences", title_justify="left")
    for one in found:
        table.add_row(one.path, str(one.before), str(one.after))
    return table


def _programs(report: Report) -> Table:
    table = Table(title="programs", title_justify="left")
    for name in ("program", "state", "GFLOP", "MB", "limit", "temp MB", "lowered", "compiled"):
        table.add_column(name, justify="left" if name in ("program", "state") else "right")
    for program in report.programs:
        table.add_row(
            program.name,
            _donation(program),
            f"{program.flops / 1e9:,.1f}",
            f"{program.bytes / 1e6:,.0f}",
            duration(program.limit_s),
            _megabytes(program.memory.temporaries if program.memory else None),
            duration(program.trace_s + program.lower_s),
            duration(program.compile_s),
        )
    return table


def _donation(program: Program) -> str:
    state = [one for one in program.arguments if one.name in ("caches", "rows", "extras")]
    given = [one for one in state if one.donated]
    if not state:
        return "none"
    kept = [one for one in given if one.reused is None or one.reused == one.arrays]
    return "in place" if len(kept) == len(state) else "COPIED"


def _kernels(program: Program) -> Table:
    table = Table(title=f"{program.name}: {program.bytes_source}", title_justify="left")
    for name in ("kernel", "scope", "count", "GFLOP", "MB", "limit", "share", "from"):
        table.add_column(name, justify="left" if name in ("kernel", "scope", "from") else "right")
    for row in program.kernels[:_KERNELS_SHOWN]:
        table.add_row(
            "product" if row.kind == "product" else f"{row.name} ({row.kind})",
            row.scope,
            str(row.count),
            f"{(row.flops or 0) / 1e9:,.2f}",
            f"{(row.bytes or 0) / 1e6:,.1f}",
            duration(row.limit_s),
            f"{row.share:.0%}" if row.share is not None else "–",
            row.source,
        )
    return table


def _memory(report: Report) -> Table:
    memory = report.memory
    table = Table("on one device", "MB", title="memory", title_justify="left")
    parts = {name: getattr(memory, name) for name in ("weights", "cache", "rows", "extras", "temporaries")}
    for name, size in parts.items():
        table.add_row(name, _megabytes(size))
    table.add_row("together", _megabytes(sum(size or 0 for size in parts.values())))
    table.add_row("the device has", _megabytes(memory.total))
    return table


def _megabytes(size: int | None) -> str:
    return "–" if size is None else f"{size / 1e6:,.1f}"
