"""StableHLO as lines with named scopes, read from the locations that `Lowered.as_text(debug_info=True)` prints."""

from __future__ import annotations

import re

from nanovllm_jax.inspection.jaxpr_text import Line
from nanovllm_jax.inspection.scopes import fold, scope_of_op
from nanovllm_jax.inspection.walk import join

_ALIAS = re.compile(r"^(#loc\d*) = loc\((.*)\)$")
_NAME = re.compile(r'^"((?:[^"\\]|\\.)*)"(?:\((.*)\))?$')
_CALLSITE = re.compile(r"^callsite\((#loc\d*) at ")
_AT_END = re.compile(r"\s+loc\((#loc\d*|unknown|\"(?:[^\"\\]|\\.)*\"(?:\(#loc\d*\))?)\)$")
_INLINE = re.compile(r" loc\((?:#loc\d*|unknown|\"(?:[^\"\\]|\\.)*\"(?:\(#loc\d*\))?)\)")
_PAYLOAD = re.compile(r'opaque = "(?:[^"\\]|\\.)*"')
_SHARDING = re.compile(r"sdy\.sharding = #sdy\.sharding<@\w+, \[(?:\{[^}]*\}(?:, )?)*\]>(?:, )?")
_CALL = re.compile(r"call @(\w+)\(")
_FUNCTION = re.compile(r"^\s*func\.func \w+ @(\w+)\(")
_LONGEST = 400


def stablehlo_lines(text: str) -> tuple[list[Line], int]:
    """Lines with their scopes, and how many there were before repeated calls were folded."""
    names, body = _locations(text)
    plain = [(_clean(line), _scope(line, names)) for line in body]
    prefixes = _prefixes(plain)
    lines: list[Line] = []
    held: list[Line] = []  # constants after a call: folded with the next one, if that is the same
    prefix, previous, repeats = "", None, 0
    for shown, scope in plain:
        if found := _FUNCTION.match(shown):
            prefix = prefixes.get(found[1], "")
        called = found[1] if (found := _CALL.search(shown)) and "layer" in scope else None
        if called is not None and called == previous:
            repeats += 1
            lines[-1] = (f"{lines[-1][0].partition('  ×')[0]}  ×{repeats}", lines[-1][1])
            held.clear()
            continue
        line = (shown, fold(join(prefix, scope)))
        if previous is not None and "stablehlo.constant" in shown:
            held.append(line)
            continue
        lines += [*held, line]
        held.clear()
        previous, repeats = called, 1
    return [*lines, *held], len(plain)


def _locations(text: str) -> tuple[dict[str, str], list[str]]:
    """The name that each location alias stands for, and the module's other lines."""
    raw: dict[str, str] = {}
    body = []
    for line in text.splitlines():
        if found := _ALIAS.match(line):
            raw[found[1]] = found[2]
        else:
            body.append(line)
    return {alias: _resolve(alias, raw) for alias in raw}, body


def _resolve(alias: str, raw: dict[str, str]) -> str:
    """The op's name; where a location is a call site, the name of what is called."""
    for _ in range(64):
        location = raw.get(alias, "")
        if found := _CALLSITE.match(location):
            alias = found[1]
        elif found := _NAME.match(location):
            if not found[1].endswith(":"):
                return found[1]
            alias = found[2] or ""
        else:
            return ""
    return ""


def _scope(line: str, names: dict[str, str]) -> str:
    found = _AT_END.search(line)
    if not found:
        return ""
    location = found[1]
    name = names.get(location, "") if location.startswith("#") else location.split('"')[1] if '"' in location else ""
    return scope_of_op(name) if "/" in name else ""


def _clean(line: str) -> str:
    line = _PAYLOAD.sub('opaque = "…"', _INLINE.sub("", _AT_END.sub("", line)))
    line = _SHARDING.sub("", line).replace(" {}", "")
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 1]}…"


def _prefixes(lines: list[Line]) -> dict[str, str]:
    """The scope that a function is called in, if there is only one (apart from the layer's number)."""
    called: dict[str, set[str]] = {}
    caller = "main"
    edges: list[tuple[str, str, str]] = []
    for text, scope in lines:
        if found := _FUNCTION.match(text):
            caller = found[1]
        elif found := _CALL.search(text):
            edges.append((caller, found[1], fold(scope)))
    resolved = {"main": {""}}
    for _ in range(8):  # as deep as functions call each other
        for caller, callee, scope in edges:
            for outer in resolved.get(caller, set()):
                called.setdefault(callee, set()).add(join(outer, scope))
        resolved |= called
    return {name: next(iter(scopes)) if len(scopes) == 1 else "" for name, scopes in resolved.items()}
