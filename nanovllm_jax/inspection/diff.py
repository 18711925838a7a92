"""What differs between two reports: every value by its path, texts by how many lines changed."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any

from nanovllm_jax.inspection.report import Difference, Report, Text

# They change from run to run, or are large and compared by what makes them so.
_SKIPPED = {"trace_s", "lower_s", "compile_s", "cache_hit", "measured_s", "compilations", "profile", "scopes", "share"}


def differences(before: Report, after: Report) -> list[Difference]:
    """Every value that differs, in the order of the report; what is measured is left out."""
    return list(_compare("", before, after))


def _compare(path: str, before: Any, after: Any) -> list[Difference]:
    if isinstance(before, Text) and isinstance(after, Text):
        if before.lines == after.lines:
            return []
        # Numbers of values shift behind every change, so lines are compared without them.
        pairs = difflib.SequenceMatcher(None, _plain(before), _plain(after), autojunk=False).get_opcodes()
        gone = sum(high - low for kind, low, high, _, _ in pairs if kind != "equal")
        new = sum(high - low for kind, _, _, low, high in pairs if kind != "equal")
        return [Difference(path, f"{gone} lines", f"{new} lines")] if gone or new else []
    if dataclasses.is_dataclass(before) and type(before) is type(after):
        names = [f.name for f in dataclasses.fields(before) if f.name not in _SKIPPED]
        return [
            one for name in names for one in _compare(_join(path, name), getattr(before, name), getattr(after, name))
        ]
    if isinstance(before, dict) and isinstance(after, dict):
        keys = [*before, *(key for key in after if key not in before)]
        return [one for key in keys for one in _compare(_join(path, key), before.get(key), after.get(key))]
    if isinstance(before, list) and isinstance(after, list):
        named, renamed = _by_name(before), _by_name(after)
        if named is not None and renamed is not None:
            return _compare(path, named, renamed)
    if before == after:
        return []
    return [Difference(path, _short(before), _short(after))]


def _by_name(items: list[Any]) -> dict[str, Any] | None:
    """Items of a list by what identifies them, so that one more does not shift all others."""
    if not all(dataclasses.is_dataclass(item) for item in items):
        return None
    found: dict[str, Any] = {}
    for item in items:
        parts = [getattr(item, name) for name in ("program", "kind", "scope", "name") if hasattr(item, name)]
        name = item.name if hasattr(item, "size") else "/".join(map(str, parts))
        while name in found:
            name += "'"
        found[name] = item
    return found


def _plain(text: Text) -> list[str]:
    return ["".join(part for part in line if not part.isdigit()) for line in text.lines]


def _short(value: Any) -> Any:
    """A whole object that only one side has is told by its name."""
    return "present" if dataclasses.is_dataclass(value) else value


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
