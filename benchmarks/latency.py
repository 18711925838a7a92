"""Time to first token and time per token, by batch size and context: a table, JSON lines and a plot.

    python benchmarks/latency.py --plot latency.png --record
    python benchmarks/latency.py --engine vllm --batch 1 --batch 64 --context 1024

All prompts of a batch arrive together. `ttft_ms_b<batch>_c<context>` is the time until every row has its first token;
`tpot_ms_b<batch>_c<context>` is (time for n tokens - time for 1) / (n - 1), as in decode_step.py.
"""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import ExitStack
from itertools import product
from pathlib import Path

import results_log
from arguments import (
    MAX_MODEL_LEN,
    engine_spec,
    figure_prefix,
    make_parser,
    max_token_id,
    num_devices,
    open_model,
    parse,
)
from engine_process import OURS, EngineProcess
from reporting import Outcome, draw, progress
from steps import Cell, StepTimes, fits, limits, measure_steps
from workloads import warm_up

RECORDED_MODEL = "qwen3-0.6b"
BATCHES, CONTEXTS = [1, 4, 16, 64, 256], [128, 1024, 3072]


def main() -> int:
    """Measures each engine; the exit status."""
    args = parse_args()
    outcome = Outcome(args.record)
    with ExitStack() as stack:
        dummy_weights = args.engine == [OURS] and args.model_dir is None
        model = open_model(args, stack, weights=not dummy_weights)
        for engine in args.engine:
            left = [
                Cell(i, batch, context, args.new_tokens, max_token_id(args))
                for i, (context, batch) in enumerate(product(args.context, args.batch))
            ]
            with outcome.guard(engine, lambda left=left: ", ".join(f"b{cell.batch}_c{cell.context}" for cell in left)):
                measure(engine, left, model, args, outcome, dummy_weights=dummy_weights)
    if outcome.lines and args.plot:
        prefix = f"{figure_prefix(args.engine[0], args)}t"  # a chart shows one engine
        draw("latency", [line for line in outcome.lines if line["figure"].startswith(prefix)], args.plot)
    return outcome.finish()


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = make_parser(__doc__, model=RECORDED_MODEL)
    parser.add_argument("--batch", type=int, action="append", help=f"repeatable (default: {BATCHES})")
    parser.add_argument("--context", type=int, action="append", help=f"repeatable, in tokens (default: {CONTEXTS})")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens out of each row in the longer run")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw both times of the first engine there")
    args = parse(parser, recorded_model=RECORDED_MODEL)
    args.batch, args.context = args.batch or BATCHES, args.context or CONTEXTS
    if args.new_tokens < 2:
        parser.error(f"--new-tokens is {args.new_tokens}; a time between tokens needs at least 2")
    if max(args.context) + args.new_tokens > MAX_MODEL_LEN:
        parser.error(f"context {max(args.context)} and {args.new_tokens} new tokens exceed {MAX_MODEL_LEN}; take fewer")
    return args


def measure(
    engine: str, left: list[Cell], model: str, args: argparse.Namespace, outcome: Outcome, *, dummy_weights: bool
) -> None:
    """Adds the lines of each cell, and takes it from those that are `left`."""
    spec = engine_spec(args, engine, dummy_weights=dummy_weights)
    progress(f"{engine}: starting")
    with EngineProcess(spec, model, time.monotonic() + args.time_limit) as process:
        progress(f"{engine}: ready {process.startup_s:.1f} s after its process started, on {process.device}")
        process.run(warm_up())
        while left:
            cell = left[0]
            if not fits(process, cell, args, num_devices(args)):
                outcome.note(
                    f"{engine}: {cell.batch} rows, context {cell.context}: more than the cache holds, left out"
                )
                left.pop(0)
                continue
            times = [measure_steps(process, cell, repeat) for repeat in range(args.repeats)]
            progress(
                f"{engine}: {cell.batch} rows, context {cell.context}: first token after "
                f"{min(run.first_token for run in times) * 1e3:,.1f} ms, then "
                f"{min(run.per_token for run in times) * 1e3:.3f} ms a token"
            )
            outcome.add(cell_lines(cell, process, times, args))
            left.pop(0)


def cell_lines(cell: Cell, process: EngineProcess, times: list[StepTimes], args: argparse.Namespace) -> list[dict]:
    """Both figures of a cell."""
    best = limits(process, cell, args, num_devices(args))
    return [
        results_log.figure_line(
            f"{figure_prefix(process.spec.name, args)}{name}_b{cell.batch}_c{cell.context}",
            [getattr(run, part) * 1e3 for run in times],
            "ms",
            getattr(best, part) * 1e3 if best else None,
            device=results_log.device_name(process.device, num_devices(args)),
            versions=process.versions,
            commit=args.commit,
        )
        for name, part in (("ttft_ms", "first_token"), ("tpot_ms", "per_token"))
    ]


if __name__ == "__main__":
    sys.exit(main())
