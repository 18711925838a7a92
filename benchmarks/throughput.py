"""Throughput of the engine on fixed cases, as a table and one JSON line a figure.

    python benchmarks/throughput.py --case all --model qwen3-0.6b --repeats 3 --record

`qwen3-0.6b` is that model's shape with random weights. Each timing is one `generate` call, wall clock, from
prompts in host memory to all tokens back; start-up and warm-up are not in it.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import results_log
from models import QWEN3_0_6B
from workloads import CASES, uniform

from nanovllm_jax.cli.bench import print_table, timed_run, warm_up
from nanovllm_jax.cli.session import open_session

MODELS = {"qwen3-0.6b": QWEN3_0_6B}
RECORDED_MODEL = "qwen3-0.6b"  # figures' names and limits are for this shape


def main() -> None:
    """Runs the cases."""
    args = parse_args()
    with ExitStack() as stack:
        session = stack.enter_context(open_session(**engine_args(args, stack)))
        print(f"start-up {session.startup_s:.1f} s", file=sys.stderr)
        warm_up(session.llm)
        if args.trace:
            save_trace(session.llm, args.trace)
        lines = []
        for case in CASES:
            if args.case in ("all", case.name):
                lines += run_case(session.llm, case, args)
    for line in lines:
        print(json.dumps(line))
    print_lines(lines)
    if args.record:
        print(f"recorded in {results_log.append(lines, Path(args.record))}", file=sys.stderr)


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=["all", *(case.name for case in CASES)], default="all")
    parser.add_argument("--model", default=RECORDED_MODEL, help=f"{', '.join(MODELS)} or a model's directory")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs a case, each with fresh prompts")
    parser.add_argument(
        "--llm",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="another argument of LLM, such as kv_cache_dtype=fp8; repeatable",
    )
    parser.add_argument("--trace", metavar="DIR", help="save a profiler trace of a short run there first")
    parser.add_argument(
        "--record",
        nargs="?",
        const=str(results_log.ROOT / "benchmarks" / "results"),
        metavar="DIR",
        help="append the figures to DIR/<device>.jsonl (default: benchmarks/results)",
    )
    parser.add_argument("--commit", help="commit to record where there is no checkout")
    args = parser.parse_args()
    if args.repeats < 1:
        parser.error(f"--repeats is {args.repeats}; it must be at least 1")
    if args.record and args.model != RECORDED_MODEL:
        parser.error(f"--record is for --model {RECORDED_MODEL}; the figures' names stand for it")
    for option in args.llm:
        if "=" not in option:
            parser.error(f"--llm {option}: write NAME=VALUE")
    return args


def engine_args(args: argparse.Namespace, stack: ExitStack) -> dict:
    """Arguments of `open_session`; a model of `MODELS` becomes a directory that holds its config alone."""
    options = {"model": args.model, "verbose": True, "max_model_len": 4096}
    if config := MODELS.get(args.model):
        options["model"] = stack.enter_context(tempfile.TemporaryDirectory())
        Path(options["model"], "config.json").write_text(json.dumps(config), encoding="utf-8")
        options |= {"load_format": "dummy", "skip_tokenizer_init": True}
    return options | dict(map(parse_option, args.llm))


def parse_option(option: str) -> tuple[str, object]:
    """`NAME=VALUE`; a value that is no JSON is a string."""
    name, _, value = option.partition("=")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def run_case(llm, case, args) -> list[dict]:
    """Times all repetitions; one line a figure."""
    runs = []
    for i in range(args.repeats):
        runs.append(timed_run(llm, case.draw(case.first_seed + i)))
        print(f"{case.name} run {i}: {runs[-1].seconds:.3f} s", file=sys.stderr)
    num_devices = int(dict(map(parse_option, args.llm)).get("tensor_parallel_size", 1))
    on_h200 = args.model == RECORDED_MODEL and results_log.device_name(num_devices) == "NVIDIA H200"
    return [
        results_log.figure_line(
            figure.name,
            [figure.of(run) for run in runs],
            figure.unit,
            figure.limit if on_h200 or figure.on_any_device else None,
            num_devices=num_devices,
            commit=args.commit,
        )
        for figure in case.figures
    ]


def save_trace(llm, folder: str) -> None:
    """Profiles 32 prompts of 128 ids, 16 tokens out of each."""
    import jax

    with jax.profiler.trace(folder):
        timed_run(llm, uniform(98, 32, 128, 16))
    print(f"trace saved in {folder}", file=sys.stderr)


def print_lines(lines: list[dict]) -> None:
    """The figures as a table."""
    rows = []
    for line in lines:
        of_limit = f"{line['value'] / line['limit']:.0%}" if line["limit"] else ""
        numbers = [f"{line[key]:,}" for key in ("value", "min", "max")]
        limit = f"{line['limit']:,}" if line["limit"] else ""
        rows.append([line["figure"], *numbers, line["unit"], limit, of_limit])
    title = f"{lines[0]['device']}, median of {lines[0]['n']}"
    print_table(title, ["figure", "median", "min", "max", "unit", "limit", "of limit"], rows)


if __name__ == "__main__":
    main()
