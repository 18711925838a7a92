"""The report as one HTML page: style, script and data are inside, nothing is fetched, and it opens from disk.

The scripts are plain JavaScript, joined in the order of `_SCRIPTS`; they read the report from a JSON element.
"""

from __future__ import annotations

import dataclasses
import html
import json
from importlib import resources

from nanovllm_jax.inspection.kernel_costs import BY_LOAD, BY_OPERANDS
from nanovllm_jax.inspection.report import Report

_SCRIPTS = ("base.js", "overview.js", "kernels.js", "roofline.js", "timeline.js", "texts.js", "main.js")


def page(report: Report, before: Report | None = None) -> str:
    """A document of its own, 1 MB or less for a model of 28 layers.

    Args:
        report: what it shows.
        before: an older report; the page then lists what differs.
    """
    data = {
        "report": dataclasses.asdict(report),
        "kernels": [*BY_LOAD, *BY_OPERANDS],
        "differences": None if before is None else [dataclasses.asdict(one) for one in report.diff(before)],
        "before": None if before is None else dataclasses.asdict(before.card),
    }
    # A report may quote anything, so that no text of it may end the element that holds it.
    embedded = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    parts = {
        "title": html.escape(f"{report.card.model}, what the jit made"),
        "style": _read("page.css"),
        "script": "\n".join(_read(name) for name in _SCRIPTS),
        "data": embedded,
    }
    text = _read("page.html")
    for name, value in parts.items():
        before_it, _, after_it = text.partition(f"{{{{{name}}}}}")
        text = before_it + value + after_it
    return text


def framed(report: Report) -> str:
    """The page inside a frame, for notebooks: its style and script touch nothing around it."""
    document = html.escape(page(report), quote=True)
    return f'<iframe srcdoc="{document}" style="width:100%;height:85vh;border:0" title="report"></iframe>'


def _read(name: str) -> str:
    return resources.files(__name__).joinpath(name).read_text(encoding="utf-8")
