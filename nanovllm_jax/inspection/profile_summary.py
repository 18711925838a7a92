"""A profile on a terminal: steps by name, and each one's kernels with the gaps between them as rows."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from nanovllm_jax.inspection.profile_data import MeasuredKernel, Profile, StepKind

_KERNELS_SHOWN = 16


def profile_tables(profile: Profile) -> Group:
    """Totals, a row for each kind of step, and the kernels of those that took longest."""
    head = (
        f"{profile.device}: busy {duration(profile.busy_s)} of {duration(profile.span_s)}, host gap "
        f"{duration(profile.host_gap_s)} ({profile.host_gap_frac:.1%}), gaps between kernels "
        f"{duration(profile.gaps_s)}; {len(profile.steps)} steps, {profile.tokens:,} tokens"
    )
    parts: list[RenderableType] = [Text(head, style="bold"), _step_table(profile)]
    longest = sorted(profile.kinds, key=lambda kind: -kind.steps * kind.kernels_s)
    shown = {kind.name.partition("[")[0]: kind for kind in reversed(longest)}
    parts += [_kernel_table(profile, kind) for kind in shown.values()]
    return Group(*parts, *(Text(note, style="dim") for note in profile.notes))


def accounted(kind: StepKind) -> float | None:
    """Kernels and gaps as a share of the step's time by the host's clock; 1 if nothing is missing."""
    if not kind.step_s:
        return None
    return (kind.kernels_s + kind.gaps_s + kind.host_gap_s) / kind.step_s


def _step_table(profile: Profile) -> Table:
    table = Table(title="steps, means", title_justify="left")
    table.add_column("step")
    for name in ("steps", "tokens", "step time", "kernels", "gaps between", "host gap", "accounted"):
        table.add_column(name, justify="right")
    for kind in profile.kinds:
        share = accounted(kind)
        times = (duration(s) for s in (kind.step_s, kind.kernels_s, kind.gaps_s, kind.host_gap_s))
        shown = "–" if share is None else f"{share:.1%}"
        table.add_row(kind.name, str(kind.steps), f"{kind.tokens:,}", *times, shown)
    return table


def _kernel_table(profile: Profile, kind: StepKind) -> Table:
    table = Table(title=f"{kind.name}: kernels of a step", title_justify="left")
    for name in ("kernel", "scope", "program", "launches", "time", "share"):
        table.add_column(name, justify="right" if name in ("launches", "time", "share") else "left", no_wrap=True)
    rows = [row for row in profile.kernels if row.step == kind.name and row.kind != "transfer"]
    whole = kind.kernels_s + kind.gaps_s + kind.host_gap_s

    def add(name: str, scope: str, program: str, launches: float | None, seconds: float) -> None:
        count = "" if launches is None else f"{launches:.4g}"
        share = f"{seconds / whole:.1%}" if whole else "–"
        table.add_row(name[:48], scope[-40:], program, count, duration(seconds), share)

    for row in rows[:_KERNELS_SHOWN]:
        add(row.name, row.scope, row.program, row.count / kind.steps, row.total_s / kind.steps)
    rest = rows[_KERNELS_SHOWN:]
    if rest:
        add(f"{len(rest)} more", "", "", _total_count(rest) / kind.steps, sum(r.total_s for r in rest) / kind.steps)
    add("gaps between kernels", "", "", None, kind.gaps_s)
    add("host gap", "", "", None, kind.host_gap_s)
    return table


def _total_count(rows: list[MeasuredKernel]) -> int:
    return sum(row.count for row in rows)


def duration(seconds: float | None) -> str:
    """A duration with a unit that suits it."""
    if seconds is None:
        return "–"
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if seconds * scale >= 1:
            return f"{seconds * scale:,.3g} {unit}"
    return f"{seconds * 1e9:,.0f} ns"
