"""Renders what was recorded: `python benchmarks/tables.py` rewrites the tables in benchmarks/README.md and README.md.

Everything between two markers is made from `results/*.jsonl`: all figures in benchmarks/README.md, each engine's last;
those of the cases in README.md, where beside another engine stands what we had when it was measured;
and near its top a few of one device. With `--check` nothing is written and the exit status is 1 if the tables are not
those of the files.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
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
HEADLINES = ("bench256_out_tok_s", "single_out_tok_s", "prefill_tok_s")
HEADLINE_DEVICE = "NVIDIA H200"
BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"
HEADLINE_BEGIN, HEADLINE_END = "<!-- headlines: begin -->", "<!-- headlines: end -->"
NONE_YET = "No results are recorded yet."
_LATENCY = re.compile(r"(ttft|tpot)_ms_b(\d+)_c(\d+)")

Table = dict[str, dict[str, dict]]  # figure -> engine -> line
Choose = Callable[[list[dict]], dict[str, dict]]  # the line that counts of each figure's name


def main() -> int:
    """Rewrites or checks the tables; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=results_log.DEFAULT_FOLDER, help="folder of the .jsonl files")
    parser.add_argument("--readme", type=Path, default=README, help="file to rewrite with all tables")
    parser.add_argument("--front-page", type=Path, default=FRONT_PAGE, help="file to rewrite with the cases")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the file is not up to date")
    args = parser.parse_args()
    stale = []
    tables = {
        args.readme: {(BEGIN, END): render},
        args.front_page: {(BEGIN, END): render_front_page, (HEADLINE_BEGIN, HEADLINE_END): render_headlines},
    }
    for path, renderers in tables.items():
        old = new = path.read_text(encoding="utf-8")
        for markers, renderer in renderers.items():
            new = between_markers(new, renderer(args.results), *markers)
        if new != old:
            stale.append(path)
            if not args.check:
                path.write_text(new, encoding="utf-8")
    if args.check:
        for path in stale:
            print(f"{path} is out of date: run {Path(sys.argv[0]).name}")
    return int(args.check and bool(stale))


def between_markers(text: str, tables: str, begin: str = BEGIN, end: str = END) -> str:
    """`text` with `tables` between its markers.

    Raises:
        SystemExit: if it has not both of them, in their order.
    """
    head, found_begin, rest = text.partition(begin)
    _, found_end, tail = rest.partition(end)
    if not found_begin or not found_end:
        raise SystemExit(f"the file needs the markers {begin} and {end}, each on a line of its own")
    return f"{head}{begin}\n{tables.strip()}\n{end}{tail}"


def render(folder: Path) -> str:
    """All tables, a section for each kind and number of devices."""
    return "\n\n".join(section(device, lines) for device, lines in by_device(folder).items()) or NONE_YET


def render_front_page(folder: Path) -> str:
    """A table for each kind of device that a case was measured on: a row a case, our share of the limit at the end."""
    devices = by_device(folder, results_log.beside).items()
    tables = (case_table(device, lines, tuple(FRONT_FIGURES)) for device, lines in devices)
    return "\n\n".join(filter(None, tables)) or NONE_YET


def render_headlines(folder: Path) -> str:
    """A few cases on one kind of device."""
    lines = by_device(folder, results_log.beside).get(HEADLINE_DEVICE, [])
    return case_table(HEADLINE_DEVICE, lines, HEADLINES) or NONE_YET


def case_table(device: str, lines: Sequence[dict], figures: Sequence[str]) -> str:
    """The cases among `figures` that were measured, a row each; nothing if there are none."""
    table = {name: cells for name, cells in figures_of(lines).items() if name in figures}
    engines = engines_of(table)
    rows = [
        [
            FRONT_FIGURES[name],
            *(results_log.number(table[name][e]["value"]) if e in table[name] else "" for e in engines),
            of_limit(table[name][OURS]) if OURS in table[name] else "",
        ]
        for name in figures
        if name in table
    ]
    if not rows:
        return ""
    dates = sorted({line["date"] for cells in table.values() for line in cells.values()})
    when = " to ".join(dict.fromkeys((dates[0], dates[-1])))
    return markdown([f"one {device}, {when}: output tok/s", *engines, "of the limit"], rows)


def by_device(folder: Path, choose: Choose = results_log.latest) -> dict[str, list[dict]]:
    """The lines that count, by kind and number of devices."""
    found: dict[str, list[dict]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for line in choose(results_log.recorded(path)).values():
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
