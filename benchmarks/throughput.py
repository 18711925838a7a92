"""Throughput of one engine or several on the same prompts: a table, a chart and one JSON line a figure.

    python benchmarks/throughput.py --case all --record
    python benchmarks/throughput.py --engine nanovllm-jax --engine vllm --case bench256 --chart bench256.png
    python benchmarks/throughput.py --engine vllm --pythonpath vllm=/opt/vllm-site --time-limit 240
    python benchmarks/throughput.py --smoke --model nanovllm_jax/assets/tiny      # any machine; figures mean nothing

`--model qwen3-0.6b` is that model's shape with random weights, the same for all engines. Each timing is one `generate`
call, wall clock, from prompts in host memory to all tokens back; start-up and a first run of each case are not in it.
Cases that are about options of nanovllm-jax (bench256-fp8kv, shared-prefix-off) start it again with those options, and
no other engine takes part in them. README.md has the method.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import limit
import results_log
from arguments import engine_spec, figure_prefix, make_parser, max_token_id, num_devices, open_model, parse
from engine_process import OURS, EngineProcess, OutOfTime
from models import config_of
from reporting import Outcome, draw, progress
from workloads import CASES, SPEEDUP, SPEEDUP_CASES, Case, Figure, draw_for_replicas, uniform, warm_up

from nanovllm_jax.loadtest.offline import Requests, Run

RECORDED_MODEL = "qwen3-0.6b"  # figures' names are for this shape
_NOT_TIMED = 500  # the repetition that each case begins with, far from those of any case


@dataclass(frozen=True)
class Measured:
    """All runs of a case on an engine."""

    engine: str
    case: Case
    runs: list[Run]
    draws: list[Requests]
    device: str
    versions: dict[str, str]
    kv_cache_bytes: int


def main() -> int:
    """Runs the cases; the exit status."""
    args = parse_args()
    outcome = Outcome(args.record)
    measured: list[Measured] = []
    with ExitStack() as stack:
        # Ours alone makes its random weights on the GPU; beside others it loads the same ones as they do.
        dummy_weights = args.engine == [OURS] and args.model_dir is None
        model = open_model(args, stack, weights=not dummy_weights)
        for engine in args.engine:
            deadline = time.monotonic() + args.time_limit
            for cases in processes(engine, args.case):
                left = [case.name for case in cases]
                with outcome.guard(engine, lambda left=left: ", ".join(left)):
                    for result in measure(engine, cases, model, args, deadline, dummy_weights=dummy_weights):
                        measured.append(result)
                        outcome.add(figure_lines(result, args) + speedup_lines(measured, args))
                        left.remove(result.case.name)
    if outcome.lines and args.chart:
        draw("throughput", outcome.lines, args.chart)
    return outcome.finish()


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = make_parser(__doc__, model=RECORDED_MODEL)
    names = ["all", *(case.name for case in CASES)]
    parser.add_argument("--case", action="append", choices=names, help="repeatable (default: all)")
    parser.add_argument("--chart", type=Path, metavar="PNG", help="draw the figures and their limits there")
    parser.add_argument("--trace", metavar="DIR", help=f"save a profiler trace of a short run of {OURS} there first")
    parser.add_argument("--smoke", action="store_true", help="tiny draws: shows that everything works, nothing else")
    args = parse(parser, recorded_model=RECORDED_MODEL)
    if args.record and args.smoke:
        parser.error("--record is not for --smoke, whose figures mean nothing")
    asked = args.case or ["all"]
    args.case = [case for case in CASES if "all" in asked or case.name in asked]
    return args


def processes(engine: str, cases: Sequence[Case]) -> Iterator[list[Case]]:
    """The cases that one process of the engine can take, process by process: those with equal options."""
    if engine != OURS:
        cases = [case for case in cases if not case.options]
    ordered = sorted(cases, key=lambda case: json.dumps(dict(case.options)) if case.options else "")
    for _, group in groupby(ordered, key=lambda case: dict(case.options)):
        yield list(group)


def measure(
    engine: str, cases: Sequence[Case], model: str, args: argparse.Namespace, deadline: float, *, dummy_weights: bool
) -> Iterator[Measured]:
    """Times all repetitions of the cases in one process; a case counts only with all of them."""
    spec = engine_spec(args, engine, cases[0].options if engine == OURS else {}, dummy_weights=dummy_weights)
    if time.monotonic() >= deadline:
        raise OutOfTime
    progress(f"{engine}: starting" + "".join(f", {name}={value}" for name, value in cases[0].options.items()))
    with EngineProcess(spec, model, deadline) as process:
        progress(f"{engine}: ready {process.startup_s:.1f} s after its process started, on {process.device}")
        process.run(warm_up())
        if args.trace and engine == OURS:
            process.run(uniform(98, 32, 128, 16, max_token_id(args)), trace=args.trace)
            progress(f"trace saved in {args.trace}")
        for case in cases:
            draw = case.smoke if args.smoke else case.draw
            draws = [draw_for_replicas(draw, case.first_seed, i, args.data_parallel_size) for i in range(args.repeats)]
            # Programs and graphs of these sizes get ready the first time they run.
            process.run(draw_for_replicas(draw, case.first_seed, _NOT_TIMED, args.data_parallel_size))
            runs = []
            for requests in draws:
                runs.append(process.run(requests))
                progress(
                    f"{engine}: {case.name} run {len(runs)} of {args.repeats}: {runs[-1].seconds:.3f} s, "
                    f"{runs[-1].prompt_tok_s:,.0f} prompt tok/s, {runs[-1].output_tok_s:,.0f} output tok/s"
                )
            kv_cache_bytes = limit.kv_cache_bytes(spec.options)
            yield Measured(engine, case, runs, draws, process.device, process.versions, kv_cache_bytes)


def figure_lines(result: Measured, args: argparse.Namespace) -> list[dict]:
    """One line a figure of the case."""
    lines = []
    for figure in result.case.figures:
        if result.engine != OURS and figure.unit != "tok/s":
            continue  # hits of the prefix cache are not known of every engine
        values = [figure.of(run) for run in result.runs]
        name = figure_prefix(result.engine, args) + figure.name
        best = figure_limit(figure, result, args)
        lines.append(results_log.figure_line(name, values, figure.unit, best, **facts(result, args)))
    return lines


def figure_limit(figure: Figure, result: Measured, args: argparse.Namespace) -> float | None:
    """The median over the draws, as the figure itself is the median over the runs; None if it is not known."""
    config, ceilings = config_of(args.model), limit.ceilings_for(result.device, args.ceilings)
    if not figure.limit_of_device:
        ceilings = limit.Ceilings(math.inf, math.inf)
    if not config or not ceilings:
        return None
    shape, replicas = limit.shape_of(config, kv_cache_bytes=result.kv_cache_bytes), args.data_parallel_size
    ceilings = ceilings.of_devices(args.tensor_parallel_size)
    shares = [tuple(part[: len(part) // replicas] for part in requests) for requests in result.draws]
    best = statistics.median(figure.limit(shape, ceilings, share) for share in shares)
    return best * replicas if figure.unit == "tok/s" else best


def speedup_lines(measured: Sequence[Measured], args: argparse.Namespace) -> list[dict]:
    """The gain of prefix caching, repetition by repetition, once the case has been measured with it and without."""
    cases = {result.case.name: result for result in measured if result.engine == OURS}
    if measured[-1].case.name != SPEEDUP_CASES[1] or SPEEDUP_CASES[0] not in cases:
        return []
    on, off = (cases[name] for name in SPEEDUP_CASES)
    values = [slow.seconds / fast.seconds for slow, fast in zip(off.runs, on.runs, strict=True)]
    bests = [figure_limit(result.case.figures[0], result, args) for result in (on, off)]
    best = bests[0] / bests[1] if all(bests) else None
    return [results_log.figure_line(SPEEDUP, values, "x", best, **facts(off, args))]


def facts(result: Measured, args: argparse.Namespace) -> dict:
    """What a line says beside the figure."""
    device = results_log.device_name(result.device, num_devices(args))
    return {"device": device, "versions": result.versions, "commit": args.commit}


if __name__ == "__main__":
    sys.exit(main())
