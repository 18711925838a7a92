"""Wording shared by the errors of this package."""

from __future__ import annotations

from collections.abc import Sequence


def first_few(names: Sequence[str], limit: int = 5) -> str:
    """The first names of a list that may be thousands long."""
    return ", ".join([*names[:limit], *(["..."] if len(names) > limit else [])])


def reason(error: BaseException) -> str:
    """The first line of an error's text, or its class."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
