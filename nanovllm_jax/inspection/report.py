"""`Report`: what was found out about the compiled step, as plain data with a text and a JSON face.

None stands for what was not measured; `needs` then says what it would take, such as "a GPU".
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanovllm_jax.errors import ConfigError
from nanovllm_jax.inspection.profile_data import Profile

# Raised whenever a field changes its meaning or goes away; new fields may come at any time.
SCHEMA_VERSION = 2


@dataclass(frozen=True)
class Card:
    """What the report is about."""

    model: str
    family: str
    shape: dict[str, int]  # of the model: hidden_size, num_layers, ...
    engine: dict[str, int | str | bool | None]  # what fixes the programs' shapes
    parameters: int
    dtype: str
    cache_dtype: str
    target: str  # what the programs are lowered for
    devices: int
    flops_per_s: float | None  # of the target, from its data sheet; None if unknown
    bytes_per_s: float | None
    context: int  # tokens a sequence that costs are computed at
    versions: dict[str, str]
    flags: dict[str, str]


@dataclass(frozen=True)
class Argument:
    """One argument of a program, with all its arrays."""

    name: str
    arrays: int
    bytes: int  # on one device
    dtypes: list[str]
    donated: bool  # whether the caller gives it away
    reused: int | None  # arrays whose buffer a result takes over; None if nothing is compiled or lowered


@dataclass(frozen=True)
class KernelRow:
    """Work of one kind in one program: a matrix product, a kernel of our own, an instruction of XLA's."""

    name: str
    kind: str  # product, triton, xla (a kernel's XLA version), or what XLA calls it
    scope: str  # folded over the layers
    count: int  # times a step
    flops: float | None
    bytes: float | None
    source: str  # where flops and bytes come from: "formula", "shapes" or "XLA"
    limit_s: float | None  # the least time, at the target's peaks
    share: float | None  # of the sum of the program's limits
    measured_s: float | None = None  # a step, from a profile


@dataclass(frozen=True)
class Memory:
    """XLA's own account of a compiled program, in bytes."""

    arguments: int
    outputs: int
    reused: int  # part of outputs that takes over arguments' buffers
    temporaries: int
    peak: int


@dataclass(frozen=True)
class Text:
    """A program in one language: lines, and for each the index of its scope in the program's `scopes`."""

    lines: list[str]
    scopes: list[int]
    full_lines: int  # before repeated layers were folded


@dataclass(frozen=True)
class Program:
    """One program."""

    name: str  # decode[256]
    kind: str
    size: int
    scopes: list[str]  # folded over the layers; the first is "", outside all scopes
    arguments: list[Argument]
    flops: float
    flops_source: str
    bytes: float
    bytes_source: str
    limit_s: float | None
    kernels: list[KernelRow]
    instructions: list[KernelRow]  # of the compiled program
    collectives: dict[str, int]
    memory: Memory | None
    needs: str | None  # what it takes to fill in what is None
    texts: dict[str, Text]  # jaxpr, stablehlo, hlo, triton, ptx
    trace_s: float
    lower_s: float
    compile_s: float | None


@dataclass(frozen=True)
class Bucket:
    """One row of the bucket table: a program that was compiled, or that could be."""

    name: str
    kind: str
    size: int
    input: str  # dtype and shape of what the host sends down
    flops: float
    bytes: float
    limit_s: float | None
    measured_s: float | None  # sum over its kernels, from a profile
    trace_s: float | None  # as logged; None if it is not compiled
    lower_s: float | None
    compile_s: float | None
    cache_hit: bool | None
    memory: Memory | None
    state: str  # "in place", "copied", "donated" (not compiled yet), "none"


@dataclass(frozen=True)
class Finding:
    """Something that deserves attention."""

    kind: str
    program: str
    message: str


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one device while the engine runs."""

    weights: int
    cache: int
    rows: int
    extras: int
    temporaries: int | None  # of the hungriest program inspected
    total: int | None  # of the device


@dataclass(frozen=True)
class Compilation:
    """One entry of the compile log."""

    program: str
    start_s: float  # of tracing, since the first compilation
    trace_s: float
    lower_s: float
    compile_start_s: float
    compile_s: float
    cache_hit: bool
    reason: str
    replica: int = 0  # whose devices it is for


@dataclass(frozen=True)
class Report:
    """Everything; `repr` is a summary, in notebooks a coloured one."""

    card: Card
    programs: list[Program]
    memory: MemoryPlan
    findings: list[Finding]
    compilations: list[Compilation] = field(default_factory=list)
    buckets: list[Bucket] = field(default_factory=list)
    profile: Profile | None = None
    schema_version: int = SCHEMA_VERSION

    def __repr__(self) -> str:
        from nanovllm_jax.inspection.summary import as_text

        return as_text(self)

    def _repr_html_(self) -> str:
        from nanovllm_jax.inspection.page import framed

        return framed(self)

    def html(self, before: Report | None = None) -> str:
        """The report as one HTML page that needs nothing else.

        Args:
            before: an older report, whose differences the page then lists.
        """
        from nanovllm_jax.inspection.page import page

        return page(self, before)

    def json(self, *, indent: int | None = None) -> str:
        """The report as JSON; `report.schema.json` beside this file describes it."""
        return json.dumps(dataclasses.asdict(self), indent=indent)

    def diff(self, other: Report) -> list[Difference]:
        """What differs from `other`, the older one."""
        from nanovllm_jax.inspection.diff import differences

        return differences(other, self)

    @staticmethod
    def load(path: str | Path) -> Report:
        """A report that `json()` wrote.

        Raises:
            ConfigError: if the file cannot be read or is of another schema version.
        """
        try:
            raw = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"Report {path} cannot be read: {error}") from None
        version = raw.get("schema_version") if isinstance(raw, dict) else None
        if version != SCHEMA_VERSION:
            raise ConfigError(
                f"Report {path} has schema version {version}; this release reads {SCHEMA_VERSION}: write it again."
            )
        return _build(Report, raw)


@dataclass(frozen=True)
class Difference:
    """One value that differs; None on the side that does not have it."""

    path: str
    before: Any
    after: Any

    def __str__(self) -> str:
        return f"{self.path}: {self.before} -> {self.after}"


def _build(kind: Any, raw: Any) -> Any:
    """The inverse of `dataclasses.asdict` for the types of this file."""
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        hints = typing.get_type_hints(kind)
        known = {f.name: _build(hints[f.name], raw[f.name]) for f in dataclasses.fields(kind) if f.name in raw}
        return kind(**known)
    if raw is None:
        return None
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        return _build(next(one for one in inner if one is not type(None)), raw) if len(inner) == 2 else raw
    if origin is list:
        return [_build(inner[0], one) for one in raw]
    if origin is dict:
        return {key: _build(inner[1], value) for key, value in raw.items()}
    return raw
