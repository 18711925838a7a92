"""Launch parameters of `skinny_matmul`: the tuned table of the GPU's kind, else reasoned defaults.

An entry's parameters also say which kernel runs: `Launch` is for Triton, `Tiling` for Mosaic GPU.

A table is `tuning/<kind>.json`, kind as in "h200"; `python benchmarks/tune_kernels.py skinny_matmul` writes it on
the GPU at hand. Nothing is timed when a model runs.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nanovllm_kernels._compat import Target
from nanovllm_kernels._integers import ceil_div, next_power_of_2
from nanovllm_kernels._mosaic import CONSUMER_ROWS, CONSUMERS, ROW_ALIGNMENT

TABLES = Path(__file__).parent / "tuning"
FORMAT = 2
_MIN_DOT = 16  # rows and columns that tl.dot needs for tensor cores
# A tuned entry serves a shape whose K and N together differ from its own by at most this factor.
_NEAREST = 2.0
# Of the Mosaic kernel.
TILE_ROWS = (16, 32, CONSUMER_ROWS, CONSUMERS * CONSUMER_ROWS)
LEAST_COLUMNS = 16  # that a program of a cluster finishes: the narrowest swizzle
# Columns of 16 bits that are one and a half rows of a swizzle: that row and its half, on which `piece_columns` relies.
PIECES = {48: (32, 16), 96: (64, 32)}
# Clusters of so many programs, one a multiprocessor, that run at once on an H200; 32 of four do not.
MOST_CLUSTERS = {2: 64, 4: 16}
# GPUs with the same chip share their tables, whatever their memory: each was tuned for some of the shapes.
_SAME_CHIP, _ITS_MULTIPROCESSORS = {"h100": "h200", "h200": "h100"}, 132
_LEAST_SPLIT = 256  # inputs a program: below, adding the splits costs more than the products


@dataclass(frozen=True)
class Launch:
    """Launch parameters; `tile_rows` 1 is the path for one row, which does without tensor cores.

    `splits` of K; `swap` computes the tile transposed, so that the weight's columns are the long side that
    Hopper's wgmma wants to be 64.
    """

    tile_rows: int
    tile_cols: int
    tile_inputs: int
    splits: int
    num_warps: int
    num_stages: int
    swap: bool = False

    def stage_bytes(self, *, gated: bool, w_bytes: int) -> int:
        """Shared memory of one pipeline stage."""
        return self.tile_inputs * (self.tile_rows * 2 + self.tile_cols * (1 + gated) * w_bytes)


@dataclass(frozen=True)
class Tiling:
    """Of the Mosaic kernel: a program's tile, tiles in flight, and over how many programs of a cluster K is split.

    Each of those programs finishes an equal part of the tile's columns. In 2 `pieces` a tile of w is copied as a
    wide one and a narrow one (`PIECES`), where the product allows it (`ProductShape.pieces`): 96 columns are moved as
    rows of 64 bytes, the widest swizzle that divides them, but as 64 and 32 two thirds are rows of 128. Qwen3-8B's
    gate_up takes 49 instead of 52 us for 64 rows (H200); programs that find w in L2, as of 256 rows, lose by it.

    Raises:
        ValueError: if the consumers cannot share the tile out, or would wait for ever. With up to 64 rows they take
            the stages in turn, and each stage of the ring must belong to one of them; each may hold one until its next
            one is there. Or if the programs of a cluster cannot share the columns out, or the columns cannot be split.
    """

    tile_rows: int
    tile_cols: int
    tile_inputs: int
    num_stages: int
    splits: int = 1
    pieces: int = 1

    def __post_init__(self) -> None:
        owners = CONSUMERS if self.splits_inputs else 1
        if self.tile_rows not in TILE_ROWS or self.num_stages % owners or self.num_stages < 2 * owners:
            *few, most = TILE_ROWS
            raise ValueError(
                f"a tile of {self.tile_rows} rows with {self.num_stages} stages; it must have {most} rows and 2 stages "
                f"or more, or one of {few} rows and {2 * CONSUMERS}, {3 * CONSUMERS}, ... stages."
            )
        shared_out = self.splits in MOST_CLUSTERS and self.tile_cols % (self.splits * LEAST_COLUMNS) == 0
        if self.splits != 1 and not shared_out:
            raise ValueError(
                f"{self.splits} splits of K in tiles of {self.tile_cols} columns; there must be 1, 2 or 4, "
                f"with a multiple of {LEAST_COLUMNS} columns for each."
            )

        if self.pieces != 1 and not (self.pieces == 2 and self.splits_columns):
            raise ValueError(
                f"{self.pieces} pieces of {self.tile_cols} columns by {self.tile_inputs} inputs, {self.splits} splits; "
                "there must be 1, or 2 of 48 by a multiple of 32, or of 96 by a multiple of 64, without splits."
            )

    @property
    def splits_columns(self) -> bool:
        """Whether tiles of w can be in two pieces; wgmma takes as many inputs of a swizzle's row as it has columns."""
        widths = PIECES.get(self.tile_cols)
        return self.splits == 1 and widths is not None and self.tile_inputs % widths[0] == 0

    @property
    def splits_inputs(self) -> bool:
        """Whether the consumers divide the inputs, for want of rows."""
        return self.tile_rows <= CONSUMER_ROWS

    def stage_bytes(self, *, gated: bool) -> int:
        """Shared memory of one stage of the ring, of 16-bit elements."""
        return self.tile_inputs * (self.tile_rows + self.tile_cols * (1 + gated)) * 2

    def fits(self, *, rows: int, inputs: int, outputs: int, multiprocessors: int = _ITS_MULTIPROCESSORS) -> bool:
        """Whether whole tiles cover K and N, TMA can move x, and clusters do not wait for each other."""
        shared_inputs = self.splits * self.tile_inputs * (CONSUMERS if self.splits_inputs else 1)
        whole = rows % ROW_ALIGNMENT == 0 and inputs % shared_inputs == 0 and outputs % self.tile_cols == 0
        clusters = ceil_div(rows, self.tile_rows) * outputs // self.tile_cols
        most = MOST_CLUSTERS.get(self.splits, 0) * multiprocessors // _ITS_MULTIPROCESSORS
        return whole and (self.splits == 1 or clusters <= most)


@dataclass(frozen=True)
class Entry:
    """A tuned shape: K, N, what the weight is, whether a norm comes before, and the most rows it is meant for."""

    rows: int
    inputs: int
    outputs: int
    gated: bool
    w_bytes: int
    normed: bool
    launch: Launch | Tiling

    def distance(self, inputs: int, outputs: int) -> float:
        """How many times larger or smaller K and N are."""
        return math.exp(abs(math.log(self.inputs / inputs)) + abs(math.log(self.outputs / outputs)))


def launch_parameters(
    target: Target,
    *,
    rows: int,
    inputs: int,
    outputs: int,
    gated: bool,
    w_bytes: int,
    normed: bool,
    takes: Callable[[Tiling], bool] | None = None,
) -> Launch | Tiling:
    """Those of the nearest shape in the tables of the GPU's chip, else `default_launch`.

    A `Tiling` only if it is one that `takes`, which knows what else than its shape the product has. Of equal shapes
    those with, or without, a norm before them count if there are such: a quarter of Qwen3-8B's o is as large as
    Qwen3-0.6B's qkv.
    """

    def usable(launch: Launch | Tiling) -> bool:
        if isinstance(launch, Launch):
            return True
        sizes = {"rows": rows, "inputs": inputs, "outputs": outputs, "multiprocessors": target.multiprocessors}
        return takes is not None and launch.fits(**sizes) and takes(launch)

    own = load_table(table_path(target.kind))
    candidates = [
        entry
        for entry in table_of(target)
        if entry.gated == gated
        and entry.w_bytes == w_bytes
        and entry.rows >= rows
        and (rows > 1) == (entry.rows > 1)
        and entry.distance(inputs, outputs) <= _NEAREST
        and usable(entry.launch)
    ]
    if not candidates:
        return default_launch(target, rows=rows, inputs=inputs, outputs=outputs, gated=gated, w_bytes=w_bytes)

    def preference(entry: Entry) -> tuple[float, bool, int, bool, bool, int]:
        """Where a shape has parameters for both kernels, Triton's are for what Mosaic's does not take.

        So a GPU takes Mosaic's from its like's table where its own has Triton's alone; of equals its own come first.
        Those that split K come before others of a shape, which are for wider neighbours, whose clusters would be too
        many.
        """
        return (
            entry.distance(inputs, outputs),
            entry.normed != normed,
            entry.rows,
            isinstance(entry.launch, Launch),
            entry not in own,
            -entry.launch.splits,
        )

    return min(candidates, key=preference).launch


def default_launch(target: Target, *, rows: int, inputs: int, outputs: int, gated: bool, w_bytes: int) -> Launch:
    """Reasoned, not tuned: columns and splits so that every multiprocessor has a program, then as many stages as fit.

    A load takes about 700 ns under load; at 4 TB/s that is 3 MB in flight, 23 KB for each of 132 multiprocessors.
    """
    if rows == 1:
        tile_rows, tile_cols, tile_inputs, num_warps = 1, 64 // (1 + gated), 128, 8
    else:
        tile_rows = min(64, max(_MIN_DOT, next_power_of_2(rows)))
        tile_cols, tile_inputs = 128 // (1 + gated), 128 if tile_rows <= 32 else 64
        num_warps = 4
    tile_cols = min(tile_cols, max(_MIN_DOT, next_power_of_2(outputs)))
    row_tiles = ceil_div(rows, tile_rows)
    while tile_cols > 32 and row_tiles * ceil_div(outputs, tile_cols) < 0.9 * target.multiprocessors:
        tile_cols //= 2
    programs = row_tiles * ceil_div(outputs, tile_cols)
    splits = 1
    while programs * splits < 0.7 * target.multiprocessors and inputs // (2 * splits) >= _LEAST_SPLIT:
        splits *= 2
    one_stage = Launch(tile_rows, tile_cols, tile_inputs, splits, num_warps, 1)
    fitting = target.shared_bytes * 3 // 4 // one_stage.stage_bytes(gated=gated, w_bytes=w_bytes)
    stages = max(2, min(8, fitting, ceil_div(inputs, splits * tile_inputs) + 1))
    return Launch(tile_rows, tile_cols, tile_inputs, splits, num_warps, stages)


def padded_rows(rows: int) -> int:
    """Rows of the sums of squares that products pass on: with those that a tile of any kernel has past the end."""
    return ceil_div(rows, TILE_ROWS[-1]) * TILE_ROWS[-1]


def table_path(kind: str) -> Path | None:
    """The file for a GPU whose device kind is, for example, "NVIDIA H200"; None for a name without a model."""
    match = re.search(r"\b[A-Z]+\d+\w*", kind)
    return TABLES / f"{match.group().lower()}.json" if match else None


def table_of(target: Target) -> tuple[Entry, ...]:
    """Entries of the GPU's own table, and then those of its like's."""
    own = table_path(target.kind)
    if own is None:
        return ()
    whole_chip = own.stem in _SAME_CHIP and target.multiprocessors == _ITS_MULTIPROCESSORS
    return load_table(own) + (load_table(own.with_stem(_SAME_CHIP[own.stem])) if whole_chip else ())


@functools.cache
def load_table(path: Path | None) -> tuple[Entry, ...]:
    """Entries of a table; none if there is no such file.

    Raises:
        ValueError: if the file is of another format than this version reads.
    """
    if path is None or not path.exists():
        return ()
    table = json.loads(path.read_text(encoding="utf-8"))
    if table.get("format") != FORMAT:
        raise ValueError(
            f"{path} has format {table.get('format')!r}; this version reads {FORMAT}: tune again with "
            "`python benchmarks/tune_kernels.py skinny_matmul`."
        )
    return tuple(Entry(**{**entry, "launch": _parse(entry["launch"])}) for entry in table["entries"])


def _parse(launch: dict[str, Any]) -> Launch | Tiling:
    return Launch(**launch) if "num_warps" in launch else Tiling(**launch)


def save_table(path: Path, entries: list[Entry], **about: Any) -> None:
    """Writes a table, one entry a line; `about` says where it was measured."""
    ordered = sorted(entries, key=lambda e: (e.w_bytes, e.gated, e.inputs, e.outputs, e.normed, e.rows))
    lines = ",\n".join(f"    {json.dumps(asdict(entry))}" for entry in ordered)
    head = json.dumps({"format": FORMAT, **about}, indent=2).removesuffix("\n}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{head},\n  "entries": [\n{lines}\n  ]\n}}\n', encoding="utf-8")
    load_table.cache_clear()
