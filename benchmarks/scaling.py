"""How speed grows with the number of GPUs of one host: replicas (data parallel), shards (tensor parallel) and both.

    python benchmarks/scaling.py --record --plot scaling.png
    python benchmarks/scaling.py --gpus 1,4 --only dp --only tp
    python benchmarks/scaling.py --smoke --model nanovllm_jax/assets/tiny      # any machine; figures mean nothing

- dp: bench256 of Qwen3-0.6B's shape, 256 requests for each replica: `dp<N>_bench256_speedup` is output tokens a second
  over one GPU's.
- tp: Qwen3-8B's shape: a decode step at 64 rows of 1,024 ids and at 1 row of 512, and the prefill of the 64:
  `tp<N>_8b_b64_step_ms`, `tp<N>_8b_b1_step_ms`, `tp<N>_8b_prefill_ms`, `tp<N>_8b_b64_speedup`.
- both: bench256 of Qwen3-8B's shape on replicas of two GPUs each, over one such replica: `dp<N>tp2_bench256_speedup`.
- large: a decode step of Qwen3-32B's shape on all GPUs, 64 rows of 1,024 ids.

Weights are random. What fits side by side on the GPUs starts together, and each is measured when it is ready, one
after the other, while others may still start. A speed-up compares runs of this command alone; its limit is the number
of GPUs, so its share of that is the efficiency.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import limit
import results_log
from arguments import engine_spec, make_parser, parse
from engine_process import OURS, EngineProcess, EngineSpec
from models import MODELS, config_of, prepare_model
from reporting import Outcome, draw, progress
from scaling_setups import MIDDLE, PARTS, Setup, plan, waves
from steps import Cell, least_times, measure_steps
from workloads import CASES, draw_for_replicas, warm_up

from nanovllm_jax.loadtest.offline import MAX_TOKEN_ID, Requests

RECORDED_MODEL = "qwen3-8b"
BENCH = next(case for case in CASES if case.name == "bench256")
WARM_UP_REPEAT, WARM_UP_TOKENS = 500, 17  # its draws are not those of a timed run
TIME_LIMIT_S = 480
STEP_BLOCKS = 6144  # 98,304 tokens: 64 rows of 1,280, and some to spare
SMOKE_DEVICES = "--xla_force_host_platform_device_count=8"


@dataclass
class Results:
    """What was measured so far: by setup and measure, the values of all repetitions."""

    values: dict[tuple[Setup, str], list[float]] = field(default_factory=dict)
    facts: dict[Setup, dict] = field(default_factory=dict)

    def ratios(self, setup: Setup, base: Setup, measure: str) -> list[float] | None:
        """Of a measure with `setup` over that with `base`, repetition by repetition; None if one is missing."""
        of, over = self.values.get((setup, measure)), self.values.get((base, measure))
        return [a / b for a, b in zip(of, over, strict=True)] if of and over and setup != base else None


def main() -> int:
    """Measures wave after wave; the exit status."""
    args = parse_args()
    deadline = time.monotonic() + args.time_limit
    with ExitStack() as stack:
        args.folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        visible = visible_devices(args)
        present, left_out = [n for n in args.gpus if n <= len(visible)], [n for n in args.gpus if n > len(visible)]
        outcome, results = Outcome(args.record), Results()
        if left_out:
            outcome.note(f"there are {len(visible)} devices; left out: {', '.join(map(str, left_out))}")
        setups = plan(present, args.only)
        for wave in waves(setups, len(visible)):
            measured = []
            for setup in run_wave(wave, visible, deadline, args, results, outcome):
                outcome.add(figure_lines(setup, results, args))
                measured.append(setup)
            # What a setup is compared with is in its wave or an earlier one, and may be ready after it.
            for setup in measured:
                outcome.add(speedup_lines(setup, setups, results))
    if outcome.lines and args.plot:
        draw("scaling", outcome.lines, args.plot)
    return outcome.finish()


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = make_parser(__doc__, model=RECORDED_MODEL)
    parser.add_argument("--gpus", default="1,2,4,8", help="numbers of GPUs to measure on (default: 1,2,4,8)")
    parser.add_argument("--only", action="append", choices=PARTS, help="repeatable (default: all)")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the speed-ups there")
    parser.add_argument("--smoke", action="store_true", help="tiny draws: shows that everything works, nothing else")
    parser.set_defaults(repeats=2, time_limit=TIME_LIMIT_S)
    args = parse(parser, recorded_model=RECORDED_MODEL)
    if args.engine != [OURS]:
        parser.error(f"scaling is measured of {OURS} alone")
    if args.tensor_parallel_size > 1 or args.data_parallel_size > 1:
        parser.error("the sizes follow from --gpus")
    if args.smoke != (args.model != RECORDED_MODEL):
        parser.error("--smoke and --model go together: the shapes that are measured are fixed")
    try:
        args.gpus = sorted({int(number) for number in args.gpus.split(",")})
    except ValueError:
        parser.error(f"--gpus {args.gpus}: write numbers with commas between them")
    if args.gpus[0] < 1:
        parser.error(f"--gpus {args.gpus[0]}: a number must be at least 1")
    args.only = args.only or list(PARTS)
    return args


def visible_devices(args: argparse.Namespace) -> list[str]:
    """Names of the devices that a process would see, asked in a process of its own: this one must hold none."""
    program = "import jax; print(len(jax.devices()), jax.devices()[0].platform)"
    spec = engine_spec(args, OURS, environment={"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} | smoke_environment(args))
    done = subprocess.run(
        [spec.python, "-c", program], env=spec.process_environment(), capture_output=True, text=True, check=True
    )
    count, platform = done.stdout.split()[-2:]
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = named.split(",") if named and platform != "cpu" else [str(i) for i in range(int(count))]
    progress(f"{count} devices ({platform})")
    return names


def smoke_environment(args: argparse.Namespace) -> dict[str, str]:
    """Host devices, where nothing is measured."""
    return {"XLA_FLAGS": SMOKE_DEVICES, "JAX_PLATFORMS": "cpu"} if args.smoke else {}


def run_wave(
    wave: Sequence[Setup],
    visible: Sequence[str],
    deadline: float,
    args: argparse.Namespace,
    results: Results,
    outcome: Outcome,
) -> Iterator[Setup]:
    """Starts and warms up engines side by side, measures each once it is ready; yields those measured.

    Others may still start then.
    """
    specs, first = [], 0
    for setup in wave:
        devices = ",".join(visible[first : first + setup.devices])
        specs.append(spec_of(setup, devices, args))
        first += setup.devices
    progress(f"starting {', '.join(setup.name for setup in wave)}")
    with ExitStack() as stack, ThreadPoolExecutor(len(wave)) as pool:
        starts = {
            pool.submit(start, setup, spec, deadline, args): setup for setup, spec in zip(wave, specs, strict=True)
        }
        for ready in as_completed(starts):
            setup = starts[ready]
            with outcome.guard(OURS, lambda setup=setup: setup.name):
                process = ready.result()
                stack.callback(process.kill)
                progress(f"{setup.name}: was ready {process.startup_s:.1f} s after its start, on {process.device}")
                device = results_log.device_name(process.device, setup.devices)
                results.facts[setup] = {"device": device, "versions": process.versions, "commit": args.commit}
                with process:
                    measure(setup, process, args, results)
                    yield setup


def start(setup: Setup, spec: EngineSpec, deadline: float, args: argparse.Namespace) -> EngineProcess:
    """An engine that has run a little of all that it will be measured on, which compiles what it did not at start."""
    process = EngineProcess(spec, model_folder(setup, args), deadline)
    try:
        if setup.bench:
            process.run(warm_up())
        for name in setup.steps:
            measure_steps(process, replace(cell_of(name, setup, args), new_tokens=WARM_UP_TOKENS), WARM_UP_REPEAT)
    except BaseException:
        process.kill()
        raise
    return process


def model_folder(setup: Setup, args: argparse.Namespace) -> str:
    """The directory that the engine loads: a shape's config, or the model of a smoke run."""
    if args.model not in MODELS:
        return args.model
    return str(prepare_model(setup.model, args.folder / setup.model, weights=False))


def spec_of(setup: Setup, devices: str, args: argparse.Namespace) -> EngineSpec:
    """The engine on its devices. Only bench256 needs all programs, and room in the cache for more than 64 rows."""
    sizes = {"tensor_parallel_size": setup.shards, "data_parallel_size": setup.replicas}
    options: dict[str, object] = {**sizes, "compile_at_start": setup.bench}
    if not setup.bench:
        options |= {"max_num_seqs": 64, "num_gpu_blocks_override": STEP_BLOCKS}
    if args.smoke:
        options |= {"max_num_seqs": 4, "max_num_batched_tokens": 64, "num_gpu_blocks_override": 64}
        options |= {"enforce_eager": True}
    environment = smoke_environment(args) or {"CUDA_VISIBLE_DEVICES": devices}
    return engine_spec(args, OURS, options, dummy_weights=not args.smoke, environment=environment)


def measure(setup: Setup, process: EngineProcess, args: argparse.Namespace, results: Results) -> None:
    """All repetitions of all measures of a setup."""
    if setup.bench:
        runs = [process.run(bench_requests(setup, repeat, args)) for repeat in range(args.repeats)]
        results.values[setup, "bench"] = [run.output_tok_s for run in runs]
        progress(f"{setup.name}: {statistics.median(results.values[setup, 'bench']):,.0f} output tok/s")
    for name in setup.steps:
        cell = cell_of(name, setup, args)
        times = [measure_steps(process, cell, repeat) for repeat in range(args.repeats)]
        results.values[setup, f"{name}_first"] = [run.first_token for run in times]
        results.values[setup, name] = [run.per_token for run in times]
        progress(f"{setup.name}: {name} {statistics.median(results.values[setup, name]) * 1e3:.3f} ms a step")


def bench_requests(setup: Setup, repeat: int, args: argparse.Namespace) -> Requests:
    """bench256's for each replica."""
    return draw_for_replicas(BENCH.smoke if args.smoke else BENCH.draw, BENCH.first_seed, repeat, setup.replicas)


def cell_of(name: str, setup: Setup, args: argparse.Namespace) -> Cell:
    """Rows and lengths of a decode step."""
    index = {"b64": 0, "b1": 1}[name]
    if args.smoke:
        return Cell(index, 3 if name == "b64" else 1, 16, 3, 255)
    vocabulary = (config_of(setup.model) or {}).get("vocab_size", MAX_TOKEN_ID + 1)
    return Cell(index, *((64, 1024) if name == "b64" else (1, 512)), 256, min(MAX_TOKEN_ID, vocabulary - 1))


def figure_lines(setup: Setup, results: Results, args: argparse.Namespace) -> list[dict]:
    """The figures that a setup's measures give alone."""
    lines, facts = [], results.facts[setup]

    def add(name: str, values: Sequence[float], unit: str, best: float | None) -> None:
        lines.append(results_log.figure_line(name, values, unit, best, **facts))

    if setup.bench:
        add(f"{setup.bench_name}_out_tok_s", results.values[setup, "bench"], "tok/s", None)
    for step in setup.steps:
        limits = least_seconds(setup, step, args, facts["device"])
        values, first = results.values[setup, step], results.values[setup, f"{step}_first"]
        add(f"{setup.step_name}_{step}_step_ms", [value * 1e3 for value in values], "ms", limits and limits[1] * 1e3)
        if step == "b64" and setup.model == MIDDLE:
            name = f"{setup.step_name}_prefill_ms"
            add(name, [value * 1e3 for value in first], "ms", limits and limits[0] * 1e3)
    return lines


def speedup_lines(setup: Setup, setups: Sequence[Setup], results: Results) -> list[dict]:
    """The figures that compare a setup with another one; none if that was not measured."""
    lines = []

    def add(name: str, ratios: Sequence[float] | None, best: float) -> None:
        if ratios:
            lines.append(results_log.figure_line(name, ratios, "x", best, **results.facts[setup]))

    if setup.bench:
        base = next(one for one in setups if (one.model, one.shards, one.replicas) == (setup.model, setup.shards, 1))
        add(f"{setup.bench_name}_speedup", results.ratios(setup, base, "bench"), setup.replicas)
    if "b64" in setup.steps and setup.model == MIDDLE:
        base = next((one for one in setups if (one.model, one.devices) == (MIDDLE, 1)), setup)
        add(f"{setup.step_name}_b64_speedup", results.ratios(base, setup, "b64"), setup.shards)
    return lines


def least_seconds(setup: Setup, step: str, args: argparse.Namespace, device: str) -> tuple[float, float] | None:
    """What the devices allow for the first tokens and for a decode step; None if that is not known."""
    ceilings, config = limit.ceilings_for(device.rpartition(" x ")[2], args.ceilings), config_of(setup.model)
    if ceilings is None or config is None or args.smoke:
        return None
    least = least_times(limit.shape_of(config), ceilings.of_devices(setup.shards), cell_of(step, setup, args))
    return least.first_token, least.per_token


if __name__ == "__main__":
    sys.exit(main())
