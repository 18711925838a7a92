"""Latencies and throughput as a picture: distributions of one run, or curves over the rates of several."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nanovllm_jax.loadtest.drive import Served
from nanovllm_jax.loadtest.figures import NAMES, latencies_ms

_BLUE, _ORANGE, _GREY = "#3b5bdb", "#e8590c", "#868e96"


def save_plot(served: Sequence[Served], summaries: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """Draws distributions if there is one run, curves over the request rate if there are several."""
    figure = Figure(figsize=(12, 4), layout="constrained", dpi=120)
    axes = figure.subplots(1, 3)
    if len(served) == 1:
        _draw_distributions(axes, served[0])
    else:
        _draw_curves(axes, summaries)
    for one in axes:
        one.grid(alpha=0.25)
        one.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path)


def _draw_distributions(axes: Sequence[Axes], served: Served) -> None:
    good = [outcome for outcome in served.outcomes if outcome.error is None]
    for one, name in zip(axes, ("ttft", "itl", "e2e"), strict=True):
        values = np.sort(latencies_ms(good, name))
        one.set(xlabel=f"{NAMES[name]}, ms", ylabel="share of them" if name == "ttft" else "", ylim=(0, 1.02))
        if len(values):
            one.plot(values, np.arange(1, len(values) + 1) / len(values), color=_BLUE)
            for label, share, color in (("median", 50, _GREY), ("p99", 99, _ORANGE)):
                at = float(np.percentile(values, share))
                one.axvline(at, color=color, linestyle="--", linewidth=1, label=f"{label} {at:,.1f}")
            one.legend(frameon=False, loc="lower right")


def _draw_curves(axes: Sequence[Axes], summaries: Sequence[dict[str, Any]]) -> None:
    """Rates stand at equal distances: they often double from one to the next, and one may be infinite."""
    rates = [math.inf if summary["request_rate"] == "inf" else summary["request_rate"] for summary in summaries]
    at = range(len(rates))
    for one, name in zip(axes, ("ttft", "tpot"), strict=False):
        for statistic, color in (("median", _BLUE), ("p99", _ORANGE)):
            values = [(summary[f"{name}_ms"] or {}).get(statistic, math.nan) for summary in summaries]
            one.plot(at, values, "o-", color=color, label=statistic)
        one.set(ylabel=f"{NAMES[name]}, ms", yscale="log")
        one.yaxis.set_major_formatter("{x:,g}")
        one.yaxis.set_minor_formatter("{x:,g}")
        one.legend(frameon=False)
    axes[2].plot(at, [summary["req_s"] for summary in summaries], "o-", color=_BLUE, label="served")
    if summaries[0]["goodput_req_s"] is not None:
        axes[2].plot(at, [one["goodput_req_s"] for one in summaries], "o-", color=_ORANGE, label="within the goals")
    axes[2].set(ylabel="requests/s", ylim=(0, None))
    axes[2].legend(frameon=False)
    for one in axes:
        one.set(xlabel="requests/s asked for", xticks=list(at), xticklabels=[f"{rate:g}" for rate in rates])
