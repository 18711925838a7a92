"""Draws what was measured: `python benchmarks/chart.py {throughput,latency,scaling} LINES.jsonl CHART.png`.

Throughput: a bar an engine, its range over the repetitions, and a dashed line at what the device allows. Latency: a
line a context. Scaling: speed-up over the number of GPUs, a line a case. `chart.py roofline POINTS.json CHART.png`
draws what `kernels.py --plot` wrote: a point a case, under the ceilings. Needs matplotlib (the dependency group
`bench`), which machines that measure need not have.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import results_log

mpl.use("Agg")
from matplotlib import pyplot as plt

OURS = "nanovllm-jax"
# Title, figures by the number of GPUs, whether less is better.
_SCALINGS = (
    ("replicas, bench256, 0.6B", r"dp(\d+)_bench256_out_tok_s", False),
    ("shards, 64 rows, 8B", r"tp(\d+)_8b_b64_step_ms", True),
    ("shards, 1 row, 8B", r"tp(\d+)_8b_b1_step_ms", True),
    ("shards, prefill, 8B", r"tp(\d+)_8b_prefill_ms", True),
)
_COLOURS = {OURS: "#2a6f97", "vllm": "#e09f3e", "nano-vllm": "#7fb069", "transformers": "#9d8189"}


def draw_throughput(lines: Sequence[dict], path: Path) -> None:
    """One panel a figure in tokens a second, since their scales differ."""
    figures: dict[str, list[dict]] = {}
    for line in lines:
        if line["unit"] == "tok/s" and line["device"] == lines[0]["device"]:
            figures.setdefault(line["figure"].rpartition("/")[2], []).append(line)
    sheet, panels = plt.subplots(1, len(figures), figsize=(2.6 * len(figures) + 0.6, 4), squeeze=False)
    for panel, (figure, of_engines) in zip(panels[0], figures.items(), strict=True):
        _draw_panel(panel, figure, of_engines)
    sheet.suptitle(f"tokens a second on {lines[0]['device']} (dashed: what it allows)")
    sheet.tight_layout()
    sheet.savefig(path, dpi=150)
    plt.close(sheet)


def _draw_panel(panel, figure: str, lines: Sequence[dict]) -> None:
    engines = [line["figure"].rpartition("/")[0] or OURS for line in lines]
    values = [line["value"] for line in lines]
    below = [line["value"] - line["min"] for line in lines]
    above = [line["max"] - line["value"] for line in lines]
    colours = [_COLOURS[engine] for engine in engines]
    bars = panel.bar(engines, values, yerr=[below, above], color=colours, width=0.65, capsize=3)
    panel.bar_label(bars, [results_log.number(value) for value in values], fontsize=8, padding=2)
    limits = [line["limit"] for line in lines if line["limit"]]
    if limits:
        panel.axhline(limits[0], color="black", linestyle="--", linewidth=1)
        panel.annotate(
            results_log.number(limits[0]), (1, limits[0]), xycoords=("axes fraction", "data"), ha="right", va="bottom"
        )
    panel.set_title(figure.removesuffix("_tok_s").replace("_", " "), fontsize=10)
    panel.set_ylim(0, 1.15 * max([line["max"] for line in lines] + limits))
    panel.tick_params(axis="x", rotation=35, labelsize=8)
    panel.spines[["top", "right"]].set_visible(False)


def draw_latency(lines: Sequence[dict], path: Path) -> None:
    """Time to first token and time per token over the batch size, a line a context; lines of latency.py, one engine."""
    sheet, panels = plt.subplots(1, 2, figsize=(10, 4))
    titles = {"ttft_ms": "time to first token, ms", "tpot_ms": "time per token, ms"}
    for panel, (name, title) in zip(panels, titles.items(), strict=True):
        cells = _cells(lines, name)
        batches = sorted({batch for row in cells.values() for batch in row})
        for i, (context, row) in enumerate(sorted(cells.items())):
            panel.plot(*_curve(row, "value"), "o-", color=f"C{i}", label=f"context {context}")
            panel.plot(*_curve(row, "limit"), "--", color=f"C{i}", linewidth=1)
        panel.set(title=title, xlabel="batch size", xscale="log", yscale="log")
        panel.set_xticks(batches, [str(batch) for batch in batches])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    sheet.suptitle(f"{lines[0]['device']} (dashed: what it allows)")
    sheet.tight_layout()
    sheet.savefig(path, dpi=150)
    plt.close(sheet)


def _cells(lines: Sequence[dict], name: str) -> dict[int, dict[int, dict]]:
    """Lines of one of both times, by context and batch size."""
    cells: dict[int, dict[int, dict]] = {}
    for line in lines:
        if match := re.search(rf"{name}_b(\d+)_c(\d+)$", line["figure"]):
            cells.setdefault(int(match[2]), {})[int(match[1])] = line
    return cells


def _curve(row: dict[int, dict], key: str) -> tuple[list[int], list[float]]:
    """Batch sizes and the numbers there, without those that are not known."""
    known = [(batch, line[key]) for batch, line in sorted(row.items()) if line[key]]
    return [batch for batch, _ in known], [value for _, value in known]


def draw_scaling(lines: Sequence[dict], path: Path) -> None:
    """Speed-up and efficiency over the number of GPUs; lines of scaling.py."""
    by_name = {line["figure"]: line["value"] for line in lines}
    most = max((int(number) for name in by_name for number in re.findall(r"^(?:dp|tp)(\d+)_", name)), default=1)
    sheet, panels = plt.subplots(1, 2, figsize=(10, 4))
    for title, pattern, is_time in _SCALINGS:
        found = {int(match[1]): value for name, value in by_name.items() if (match := re.fullmatch(pattern, name))}
        if 1 not in found:
            continue
        gpus = sorted(found)
        speedups = [found[1] / found[n] if is_time else found[n] / found[1] for n in gpus]
        panels[0].plot(gpus, speedups, "o-", label=title)
        panels[1].plot(gpus, [speedup / n for speedup, n in zip(speedups, gpus, strict=True)], "o-", label=title)
    panels[0].plot([1, most], [1, most], "k--", linewidth=1)
    panels[0].set(title="speed-up over one GPU", xlabel="GPUs")
    panels[1].set(title="speed-up for each GPU", xlabel="GPUs", ylim=(0, 1.1))
    for panel in panels:
        panel.set_xticks(range(1, most + 1))
        panel.grid(alpha=0.3)
    panels[1].legend(fontsize=8)
    sheet.suptitle(lines[0]["device"].rpartition(" x ")[2])
    sheet.tight_layout()
    sheet.savefig(path, dpi=150)
    plt.close(sheet)


def draw_roofline(roofline: Mapping[str, Any], path: Path) -> None:
    """Kernels under the two ceilings: operations a byte that has to move across, operations a second up."""
    copy_rate, product_rate = roofline["copy_rate"], roofline["product_rate"]
    sheet, panel = plt.subplots(figsize=(7.5, 5))
    intensities = [2**exponent for exponent in range(-1, 14)]
    roof = [min(copy_rate * each, product_rate) / 1e12 for each in intensities]
    panel.loglog(intensities, roof, color="black", linewidth=1, label="device copy, bf16 product")
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for point in roofline["points"]:
        if point["name"] != "bf16 product":
            peer = " XLA" if point["name"].endswith(", xla") else ""
            kinds.setdefault(f"{point['name'].split()[0]}{peer}", []).append(point)
    for kind, points in kinds.items():
        across = [point["intensity"] for point in points]
        up = [point["rate"] / 1e12 for point in points]
        panel.scatter(across, up, s=16, label=kind, marker="x" if kind.endswith("XLA") or kind == "cuDNN" else "o")
    panel.set(xlabel="operations a byte that has to move", ylabel="TFLOP/s", title=f"kernels on {roofline['device']}")
    panel.legend(fontsize=8)
    sheet.tight_layout()
    sheet.savefig(path, dpi=150)
    plt.close(sheet)


def main() -> None:
    """Draws the newest line of each figure of a file, engines as they ran together, or the points of a roofline."""
    if len(sys.argv) != 4 or sys.argv[1] not in DRAWINGS:
        raise SystemExit(__doc__)
    kind, source, path = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    if kind == "roofline":
        return draw_roofline(json.loads(source.read_text(encoding="utf-8")), path)
    choose = results_log.beside if kind == "throughput" else results_log.latest
    lines = list(choose(results_log.recorded(source)).values())
    if kind == "latency":
        lines = [line for line in lines if re.match(r"(ttft|tpot)_ms_", line["figure"])]
    return DRAWINGS[kind](lines, path)


DRAWINGS = {
    "throughput": draw_throughput,
    "latency": draw_latency,
    "scaling": draw_scaling,
    "roofline": draw_roofline,
}

if __name__ == "__main__":
    main()
