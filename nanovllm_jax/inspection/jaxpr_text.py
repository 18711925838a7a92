"""Prints a jaxpr with the named scope of each line; what is called again and again is printed once."""

from __future__ import annotations

import itertools
import re
from typing import Any

from nanovllm_jax.inspection.scopes import fold, scope_of
from nanovllm_jax.inspection.walk import join, nested

Line = tuple[str, str]  # text, scope folded over the layers
_HIDDEN = {"sharding", "weak_type", "donated_invars", "in_shardings", "out_shardings", "in_layouts", "out_layouts"}
_HIDDEN |= {
    "keep_unused",
    "inline",
    "ctx_mesh",
    "compiler_options_kvs",
    "in_tree",
    "fn",
    "serialized_metadata",
    "jaxpr",
}
_HIDDEN |= {"fill_value", "mode", "unique_indices", "indices_are_sorted", "name", "call_jaxpr", "update_jaxpr"}
_LONGEST = 160
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")  # of functions: another in every run


def jaxpr_lines(jaxpr: Any) -> tuple[list[Line], int]:
    """Lines with their scopes, and how many there would be without folding."""
    return _Printer().block(jaxpr, "", 0)


class _Printer:
    def __init__(self) -> None:
        self._names: dict[Any, str] = {}
        self._numbers = itertools.count()
        self._printed: dict[int, int] = {}  # id of a jaxpr: its lines

    def block(self, jaxpr: Any, scope: str, depth: int) -> tuple[list[Line], int]:
        lines: list[Line] = []
        total = 0
        head = " ".join(self._typed(var) for var in (*jaxpr.constvars, *jaxpr.invars))
        lines.append((f"{'  ' * depth}lambda {_cut(head)}", fold(scope)))
        total += 1
        eqns = list(jaxpr.eqns)
        position = 0
        while position < len(eqns):
            repeats = self._repeats(eqns, position)
            eqn = eqns[position]
            here = join(scope, scope_of(str(eqn.source_info.name_stack)))
            text = f"{'  ' * depth}{self._equation(eqn)}"
            if repeats > 1:
                last = scope_of(str(eqns[position + repeats - 1].source_info.name_stack))
                text += f"  ×{repeats} ({here} … {join(scope, last)})"
                for other in eqns[position + 1 : position + repeats]:
                    for var in other.outvars:
                        self._name(var)
            lines.append((text, fold(here)))
            body = 0
            for inner in nested(eqn):
                if _is_scalar(inner):
                    continue
                if id(inner) in self._printed:
                    body += self._printed[id(inner)]
                    continue
                printed, size = self.block(inner, here, depth + 1)
                self._printed[id(inner)] = size
                lines += printed
                body += size
            total += repeats * (1 + body)
            position += repeats
        outs = " ".join(self._name(var) for var in jaxpr.outvars)
        lines.append((f"{'  ' * depth}return {_cut(outs)}", fold(scope)))
        return lines, total + 1

    def _repeats(self, eqns: list[Any], position: int) -> int:
        """How many equations from here on call the same jaxpr."""
        inner = nested(eqns[position])
        if not inner or eqns[position].primitive.name not in ("jit", "pjit"):
            return 1
        same = itertools.takewhile(lambda eqn: nested(eqn)[:1] == inner[:1], eqns[position:])
        return sum(1 for _ in same)

    def _equation(self, eqn: Any) -> str:
        outs = " ".join(self._typed(var) for var in eqn.outvars)
        name = eqn.primitive.name
        if label := eqn.params.get("name") or getattr(eqn.params.get("fn"), "__name__", None):
            name += f" {label}"
        shown = [
            f"{key}={value}" for key, value in eqn.params.items() if key not in _HIDDEN and not nested_value(value)
        ]
        params = f"[{_cut(' '.join(shown))}]" if shown else ""
        return f"{_cut(outs)} = {name}{params} {_cut(' '.join(self._name(var) for var in eqn.invars))}"

    def _typed(self, var: Any) -> str:
        return f"{self._name(var)}:{var.aval.str_short(short_dtypes=True)}"

    def _name(self, var: Any) -> str:
        if hasattr(var, "val"):  # a literal
            return str(var.val)
        if var not in self._names:
            self._names[var] = f"%{next(self._numbers)}"
        return self._names[var]


def nested_value(value: Any) -> bool:
    """Whether a parameter holds a jaxpr."""
    many = value if isinstance(value, tuple | list) else (value,)
    return any(hasattr(one, "eqns") or hasattr(one, "jaxpr") for one in many)


def _is_scalar(jaxpr: Any) -> bool:
    """Whether a jaxpr only combines scalars, as a reduction's does."""
    return all(not getattr(var.aval, "shape", (0,)) for var in jaxpr.invars) and len(jaxpr.eqns) < 2


def _cut(text: str) -> str:
    text = _ADDRESS.sub("", text.replace("\n", " "))
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"
