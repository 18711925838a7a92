"""Renders what was recorded: `python benchmarks/tables.py` rewrites the tables in benchmarks/README.md and README.md.

Everything between the two markers is made from `results/*.jsonl`, of each figure the last line: all of them in
benchmarks/README.md, those of the cases in README.md. With `--check` nothing is written and the exit status is 1 if the
tables are not those of the files.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import results_log
from engine_process import ENGINES, OURS
from reporting import of_limit

README = Path(__file__).with_name("README.md")
FRONT_PAGE = results_log.ROOT / "README.md"
FRONT_FIGURES = {
    "bench256_out_tok_s": "nano-vLLM's benchmark: 256 prompts of 100 to 1,024 ids, 100 to 1,024 tokens out of each",
    "single_out_tok_s": "one stream, 128 in, 512 out",
    "batch32_out_tok_s": "32 prompts, 128 in, 512 out",
    "prefill_tok_s": "128 prompts of 1,024, one token out: prompt tok/s",
    "shared_prefix_tok_s": "100 prompts of 512, of which 70 share 409 tokens, one token out: prompt tok/s",
}
BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"
NONE_YET = "No results are recorded yet."
_LATENCY = re.compile(r"(ttft|tpot)_ms_b(\d+)_c(\d+)")

Table = dict[str, dict[str, dict]]  # figure -> engine -> line


def main() -> int:
    """Rewrites or checks the tables; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=results_log.DEFAULT_FOLDER, help="folder of the .jsonl files")
    parser.add_argument("--readme", type=Path, default=README, help="file to rewrite with all tables")
    parser.add_argument("--front-page", type=Path, default=FRONT_PAGE, help="file to rewrite with the cases")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the file is not up to date")
    args = parser.parse_args()
    stale = []
    for path, renderer in ((args.readme, render), (args.front_page, render_front_page)):
        old = path.read_text(encoding="utf-8")
        new = between_markers(old, renderer(args.results))
        if new != old:
            stale.append(path)
            if not args.check:
                path.write_text(new, encoding="utf-8")
    if args.check:
        for path in stale:
            print(f"{path} is out of date: run {Path(sys.argv[0]).name}")
    return int(args.check and bool(stale))


def between_markers(text: str, tables: str) -> str:
    """`text` with `tables` between its markers.

    Raises:
        SystemExit: if it has not both of them, in their order.
    """
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"the file needs the markers {BEGIN} and {END}, each on a line of its own")
    return f"{head}{begin}\n{tables.strip()}\n{end}{tail}"


def render(folder: Path) -> str:
    """All tables, a section for each kind and number of devices."""
    return "\n\n".join(section(device, lines) for device, lines in by_device(folder).items()) or NONE_YET


def render_front_page(folder: Path) -> str:
    """A table for each kind of device that a case was measured on: a row a case, our share of the limit at the end."""
    parts = []
    for device, lines in by_device(folder).items():
        table = {name: cells for name, cells in figures_of(lines).items() if name in FRONT_FIGURES}
        engines = engines_of(table)
        rows = [
            [
                description,
                *(results_log.number(table[name][e]["value"]) if e in table[name] else "" for e in engines),
                of_limit(table[name][OURS]) if OURS in table[name] else "",
            ]
            for name, description in FRONT_FIGURES.items()
            if name in table
        ]
        if rows:
            dates = sorted({line["date"] for cells in table.values() for line in cells.values()})
            when = " to ".join(dict.fromkeys((dates[0], dates[-1])))
            parts.append(markdown([f"one {device}, {when}: output tok/s", *engines, "of the limit"], rows))
    return "\n\n".join(parts) or NONE_YET


def by_device(folder: Path) -> dict[str, list[dict]]:
    """The lines that count, by kind and number of devices."""
    found: dict[str, list[dict]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for line in results_log.latest(path).values():
            found.setdefault(line["device"], []).append(line)
    return dict(sorted(found.items()))


def figures_of(lines: Sequence[dict]) -> Table:
    """Lines by figure and engine."""
    table: Table = {}
    for line in lines:
        engine, _, figure = line["figure"].rpartition("/")
        table.setdefault(figure, {})[engine or OURS] = line
    return table


def engines_of(table: Table) -> list[str]:
    """Those that have any figure of the table."""
    return [engine for engine in ENGINES if any(engine in of_engines for of_engines in table.values())]


def section(device: str, lines: Sequence[dict]) -> str:
    """What was measured on one kind of device."""
    table = figures_of(lines)
    latency = {figure: table.pop(figure) for figure in list(table) if _LATENCY.fullmatch(figure)}
    parts = [f"### {device}", *figure_table(table), *latency_tables(latency), versions(lines)]
    return "\n\n".join(parts)


def figure_table(table: Table) -> Iterator[str]:
    """A row a figure, a column an engine: the median, and the range over the repetitions."""
    if not table:
        return
    engines, rows = engines_of(table), []
    for figure, of_engines in table.items():
        line = of_engines.get(OURS) or next(iter(of_engines.values()))
        best = results_log.number(line["limit"]) if line["limit"] else ""
        share = of_limit(of_engines[OURS]) if OURS in of_engines else ""
        cells = [measured(of_engines[engine]) if engine in of_engines else "" for engine in engines]
        rows.append([f"`{figure}`", line["unit"], *cells, best, share])
    yield markdown(["figure", "unit", *engines, "limit", f"{OURS} of limit"], rows)


def measured(line: Mapping) -> str:
    """Median and range."""
    value, low, high = (results_log.number(line[key]) for key in ("value", "min", "max"))
    return value if low == high else f"{value} ({low} to {high})"


def latency_tables(table: Table) -> Iterator[str]:
    """A table an engine: contexts down, batch sizes across, time to first token and time per token in each cell."""
    for engine in ENGINES:
        cells: dict[tuple[int, int], dict[str, str]] = {}
        for figure, of_engines in table.items():
            kind, batch, context = _LATENCY.fullmatch(figure).groups()
            if engine in of_engines:
                number = results_log.number(of_engines[engine]["value"])
                cells.setdefault((int(context), int(batch)), {})[kind] = number
        if not cells:
            continue
        batches, contexts = sorted({batch for _, batch in cells}), sorted({context for context, _ in cells})
        rows = [
            [str(context), *(" / ".join(cells.get((context, batch), {}).values()) for batch in batches)]
            for context in contexts
        ]
        heading = f"{engine}: time to first token / time per token, ms, by context (down) and batch size (across)"
        yield f"{heading}\n\n{markdown(['', *map(str, batches)], rows)}"


def versions(lines: Sequence[dict]) -> str:
    """What each engine's newest figure was taken with."""
    newest = {line["figure"].rpartition("/")[0] or OURS: line for line in sorted(lines, key=lambda line: line["date"])}
    texts = []
    for engine in ENGINES:
        if engine in newest:
            packages = ", ".join(f"{name} {number}" for name, number in newest[engine]["versions"].items())
            texts.append(f"{engine} on {newest[engine]['date']}: {packages}{commits(lines) if engine == OURS else ''}.")
    return "  \n".join(texts)


def commits(lines: Sequence[dict]) -> str:
    """Our commits, each with how many of the figures it has."""
    ours = Counter(line["commit"][:7] for line in lines if "/" not in line["figure"] and line["commit"])
    found = ", ".join(f"{commit} ({count})" for commit, count in ours.items())
    return f"; figures by commit: {found}" if found else ""


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column is a name and whose others are numbers."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


if __name__ == "__main__":
    sys.exit(main())
