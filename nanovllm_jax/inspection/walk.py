"""Walks a jaxpr with everything nested in it, keeping the named scope and how often each equation runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from jax.extend import core

from nanovllm_jax.inspection.scopes import scope_of

# Their jaxpr combines two scalars, or is a kernel's body; it does no work of the program's own.
_CLOSED = {"pallas_call", "mpmd_map", "core_map"}
_CLOSED |= {"scatter", "scatter-add", "scatter_add", "scatter_mul", "scatter_min", "scatter_max", "reduce"}


@dataclass(frozen=True)
class Visit:
    """One equation: where it stands, how often it runs, and whether a loop of unknown length is around it."""

    eqn: Any
    scope: str
    times: int
    in_while: bool

    @property
    def primitive(self) -> str:
        """Name of the primitive."""
        return self.eqn.primitive.name


def visit_all(jaxpr: Any, scope: str = "", times: int = 1, in_while: bool = False) -> Iterator[Visit]:
    """Every equation, outer ones first; one that holds a jaxpr is followed by what it holds."""
    for eqn in jaxpr.eqns:
        here = join(scope, scope_of(str(eqn.source_info.name_stack)))
        name = eqn.primitive.name
        yield Visit(eqn, here, times, in_while)
        if name in _CLOSED:
            continue
        repeated = times * int(eqn.params.get("length", 1)) if name == "scan" else times
        for inner in nested(eqn):
            yield from visit_all(inner, here, repeated, in_while or name == "while")


def nested(eqn: Any) -> list[Any]:
    """The jaxprs among an equation's parameters."""
    found: list[Any] = []
    for value in eqn.params.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            if isinstance(one, core.ClosedJaxpr):
                found.append(one.jaxpr)
            elif isinstance(one, core.Jaxpr):
                found.append(one)
    return found


def join(outer: str, inner: str) -> str:
    """Two parts of a scope, either of which may be empty; what both say, where they meet, is said once.

    A function that is lowered once and called from several places may carry the scope that it is called in.
    """
    before, after = outer.split("/") if outer else [], inner.split("/") if inner else []
    shared = next(count for count in range(len(after), -1, -1) if before[len(before) - count :] == after[:count])
    return "/".join(before + after[shared:])


def aval_bytes(aval: Any) -> int:
    """Bytes of an abstract array; 0 of what is no array."""
    inner = getattr(aval, "inner_aval", aval)  # of a mutable reference
    if not hasattr(inner, "shape") or not hasattr(inner.dtype, "itemsize"):
        return 0
    return inner.size * inner.dtype.itemsize
