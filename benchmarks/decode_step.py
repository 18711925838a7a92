"""One decode step of a large model, by default Qwen3-8B's shape at 64 rows of 1024 ids.

    python benchmarks/decode_step.py --record
    python benchmarks/decode_step.py --engine nanovllm-jax --engine vllm --tensor-parallel-size 4

Weights are random and made on the GPU by the engine (load_format="dummy"), so only engines that can do so take part.
The figure is `tp<size>_8b_b<batch>_step_ms`: (time for 256 tokens - time for 1) / 255. With replicas it begins with
`dp<number>`, and each replica has the batch.
"""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import ExitStack
from dataclasses import replace

import results_log
from arguments import engine_spec, make_parser, max_token_id, num_devices, open_model, parse
from engine_process import OURS, EngineProcess
from reporting import Outcome, progress
from steps import Cell, StepTimes, limits, measure_steps
from workloads import warm_up

RECORDED_MODEL = "qwen3-8b"
DUMMY_WEIGHTS = (OURS, "vllm")


def main() -> int:
    """Measures each engine; the exit status."""
    args = parse_args()
    cell = Cell(0, args.batch * args.data_parallel_size, args.context, args.new_tokens, max_token_id(args))
    outcome = Outcome(args.record)
    with ExitStack() as stack:
        model = open_model(args, stack, weights=False)
        for engine in args.engine:
            name = figure_name(args)
            with outcome.guard(engine, lambda name=name: name):
                process, times = measure(engine, cell, model, args)
                outcome.add([figure_line(name, cell, process, times, args)])
    return outcome.finish()


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = make_parser(__doc__, model=RECORDED_MODEL)
    parser.add_argument("--batch", type=int, default=64, help="rows of each replica")
    parser.add_argument("--context", type=int, default=1024, help="prompt tokens of each")
    parser.add_argument("--new-tokens", type=int, default=256, help="tokens out of each in the longer run")
    args = parse(parser, recorded_model=RECORDED_MODEL)
    if args.new_tokens < 2:
        parser.error(f"--new-tokens is {args.new_tokens}; a step between tokens needs at least 2")
    if args.record and (args.context, args.new_tokens) != (1024, 256):
        parser.error("--record is for 256 tokens after 1024; the figure's name stands for them")
    for engine in args.engine:
        if engine not in DUMMY_WEIGHTS:
            parser.error(f"--engine {engine} cannot make weights of its own; choose {' or '.join(DUMMY_WEIGHTS)}")
    return args


def figure_name(args: argparse.Namespace) -> str:
    """By the sizes; the number of replicas stands in front if there are several."""
    replicas = f"dp{args.data_parallel_size}" if args.data_parallel_size > 1 else ""
    return f"{replicas}tp{args.tensor_parallel_size}_8b_b{args.batch}_step_ms"


def measure(engine: str, cell: Cell, model: str, args: argparse.Namespace) -> tuple[EngineProcess, list[StepTimes]]:
    """All repetitions, and the process that made them, which has ended."""
    options = {"tensor_parallel_size": args.tensor_parallel_size}
    spec = engine_spec(args, engine, options, dummy_weights=True)
    progress(f"{engine}: starting")
    with EngineProcess(spec, model, time.monotonic() + args.time_limit) as process:
        progress(f"{engine}: ready {process.startup_s:.1f} s after its process started, on {process.device}")
        process.run(warm_up())
        times = []
        for repeat in range(args.repeats):
            times.append(measure_steps(process, cell, repeat))
            first, step = times[-1].first_token * 1e3, times[-1].per_token * 1e3
            progress(
                f"{engine}: run {repeat + 1} of {args.repeats}: first tokens at {first:,.0f} ms, steps of {step:.3f} ms"
            )
    return process, times


def figure_line(
    name: str, cell: Cell, process: EngineProcess, times: list[StepTimes], args: argparse.Namespace
) -> dict:
    """The figure, with its limit where the device's ceilings are known."""
    best = limits(process, replace(cell, batch=args.batch), args, args.tensor_parallel_size)
    return results_log.figure_line(
        name if process.spec.name == OURS else f"{process.spec.name}/{name}",
        [run.per_token * 1e3 for run in times],
        "ms",
        best.per_token * 1e3 if best else None,
        device=results_log.device_name(process.device, num_devices(args)),
        versions=process.versions,
        commit=args.commit,
    )


if __name__ == "__main__":
    sys.exit(main())
