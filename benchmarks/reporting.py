"""What the benchmarks say: progress, engines that gave nothing, the figures as JSON lines and as a table."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import results_log
from engine_process import OURS, EngineFailed, EngineMissing, OutOfTime

from nanovllm_jax.loadtest.offline import print_table

STARTED = time.monotonic()


def progress(text: str) -> None:
    """A line on stderr, with the seconds since the start."""
    print(f"[{time.monotonic() - STARTED:6.1f} s] {text}", file=sys.stderr, flush=True)


@dataclass
class Outcome:
    """Figures of all engines, and what to say of those that gave none.

    Attributes:
        record: folder to append the figures to, if any.
    """

    record: str | None
    lines: list[dict] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    failed: bool = False

    def add(self, lines: Sequence[dict]) -> None:
        """Prints and records them at once, so that nothing measured is lost if the command is cut short."""
        self.lines += lines
        for line in lines:
            print(json.dumps(line), flush=True)
        if lines and self.record:
            progress(f"recorded in {results_log.append(lines, Path(self.record))}")

    @contextmanager
    def guard(self, engine: str, left: Callable[[], str]) -> Iterator[None]:
        """Notes that the engine is missing, failed or ran out of time, with what is `left`, and goes on."""
        try:
            yield
        except EngineMissing as error:
            self.note(f"{engine} is not installed and is skipped: {error}")
        except OutOfTime:
            self.note(f"{engine} used up its time; dropped: {left()}")
        except EngineFailed as error:
            self.failed = True
            self.note(f"{engine} failed ({left()}): {error}")

    def note(self, text: str) -> None:
        """Say it now, and again below the table."""
        self.notes.append(text)
        progress(text)

    def finish(self) -> int:
        """Prints the table; the exit status is 1 if an engine failed or there is no figure."""
        if self.lines:
            print_lines(self.lines)
        for note in self.notes:
            print(note.partition("\n")[0], file=sys.stderr)
        return int(self.failed or not self.lines)


def print_lines(lines: Sequence[dict]) -> None:
    """The figures as a table, engines side by side under each figure."""
    order = {name: i for i, name in enumerate(dict.fromkeys(line["figure"].rpartition("/")[2] for line in lines))}
    rows = []
    for line in sorted(lines, key=lambda line: order[line["figure"].rpartition("/")[2]]):
        engine, _, figure = line["figure"].rpartition("/")
        numbers = [results_log.number(line[key]) for key in ("value", "min", "max")]
        best = results_log.number(line["limit"]) if line["limit"] else ""
        rows.append([figure, engine or OURS, *numbers, line["unit"], best, of_limit(line)])
    title = f"{lines[0]['device']}, median of {lines[0]['n']}"
    print_table(title, ["figure", "engine", "median", "min", "max", "unit", "limit", "of limit"], rows)


def of_limit(line: dict) -> str:
    """The figure as a share of what the device allows; for times, the least time as a share of the figure's."""
    if not line["limit"]:
        return ""
    share = line["value"] / line["limit"]
    return f"{1 / share if line['unit'] in ('s', 'ms') else share:.0%}"


def draw(kind: str, data: Any, path: Path) -> None:
    """Draws figures, or what else `kind`, one of `chart.DRAWINGS`, takes, where matplotlib is installed."""
    try:
        from chart import DRAWINGS
    except ImportError as error:
        print(f"no picture: {error}; `chart.py {kind}` draws it elsewhere from the JSON", file=sys.stderr)
        return
    DRAWINGS[kind](data, path)
    print(f"picture in {path}", file=sys.stderr)
