"""Command-line arguments that the benchmarks have in common, and what they stand for."""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import limit
import results_log
from engine_process import ENGINES, OURS, EngineSpec
from models import MODELS, config_of, prepare_model

from nanovllm_jax.loadtest.offline import MAX_TOKEN_ID

MAX_MODEL_LEN = 4096


def make_parser(description: str, *, model: str) -> argparse.ArgumentParser:
    """A parser with engines, model, time limit and recording; `model` is the default."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=model, help=f"{', '.join(MODELS)} (random weights) or a model's directory")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs, each with fresh prompts")
    parser.add_argument(
        "--engine", action="append", choices=ENGINES, help=f"repeatable, each in a process of its own (default: {OURS})"
    )
    parser.add_argument(
        "--pythonpath",
        action="append",
        default=[],
        metavar="ENGINE=DIR[:DIR]",
        help="PYTHONPATH of that engine's process, instead of the one that is set",
    )
    parser.add_argument(
        "--python", action="append", default=[], metavar="ENGINE=PATH", help="interpreter that has the engine"
    )
    parser.add_argument(
        "--llm",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help=f"another argument of {OURS}'s LLM, such as batching=mixed; repeatable",
    )
    parser.add_argument("--tensor-parallel-size", type=int, default=1, help="devices that share each layer")
    parser.add_argument(
        "--data-parallel-size", type=int, default=1, help=f"replicas of {OURS}, each with as many requests as one"
    )
    parser.add_argument("--model-dir", type=Path, help="where random weights are written, and kept for the next time")
    parser.add_argument("--time-limit", type=float, default=math.inf, metavar="S", help="seconds for each engine")
    parser.add_argument("--verbose", action="store_true", help="show the engines' own logs")
    parser.add_argument(
        "--record",
        nargs="?",
        const=str(results_log.DEFAULT_FOLDER),
        metavar="DIR",
        help="append the figures to DIR/<device>.jsonl (default: benchmarks/results)",
    )
    parser.add_argument("--commit", help="commit to record where there is no checkout")
    limit.add_ceilings_argument(parser)
    return parser


def parse(parser: argparse.ArgumentParser, *, recorded_model: str) -> argparse.Namespace:
    """Parses and checks; `pythonpath`, `python` and `llm` become dicts."""
    args = parser.parse_args()
    args.engine = list(dict.fromkeys(args.engine or [OURS]))
    args.pythonpath = _by_engine(parser, "--pythonpath", args.pythonpath)
    args.python = _by_engine(parser, "--python", args.python)
    for option in args.llm:
        if "=" not in option:
            parser.error(f"--llm {option}: write NAME=VALUE")
    args.llm = dict(map(_parse_option, args.llm))
    for name in ("tensor_parallel_size", "data_parallel_size"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least 1")
        if name in args.llm:
            parser.error(f"--llm {name}: write --{name.replace('_', '-')} {args.llm[name]}")
    if args.data_parallel_size > 1 and args.engine != [OURS]:
        parser.error(f"--data-parallel-size is for {OURS} alone")
    if args.repeats < 1:
        parser.error(f"--repeats is {args.repeats}; it must be at least 1")
    if args.record and args.model != recorded_model:
        parser.error(f"--record is for --model {recorded_model}; the figures' names stand for it")
    return args


def open_model(args: argparse.Namespace, stack: ExitStack, *, weights: bool) -> str:
    """The directory that engines load; a shape of `MODELS` is written there first, if need be for the time of `stack`.

    Without `weights` it holds a config and a tokenizer, for engines that make random weights themselves.
    """
    if args.model not in MODELS:
        return args.model
    directory = args.model_dir or Path(stack.enter_context(tempfile.TemporaryDirectory()))
    started = time.perf_counter()
    prepare_model(args.model, directory, weights=weights)
    print(f"{args.model} is in {directory} after {time.perf_counter() - started:.1f} s", file=sys.stderr)
    return str(directory)


def max_token_id(args: argparse.Namespace) -> int:
    """Largest id of a random prompt: nano-vLLM's, or less for a smaller vocabulary."""
    config = config_of(args.model) or {}
    return min(MAX_TOKEN_ID, config.get("vocab_size", MAX_TOKEN_ID + 1) - 1)


def engine_spec(
    args: argparse.Namespace,
    name: str,
    options: Mapping[str, object] | None = None,
    *,
    dummy_weights: bool = False,
    environment: Mapping[str, str] | None = None,
) -> EngineSpec:
    """How to start an engine on the model; `options` go to its constructor, after those that all get."""
    options = {**(options or {})}
    if name != "transformers":
        config = config_of(args.model) or {}
        options["max_model_len"] = min(MAX_MODEL_LEN, config.get("max_position_embeddings", MAX_MODEL_LEN))
    options |= parallel_sizes(args)
    if name == OURS:
        options |= {"skip_tokenizer_init": True, **args.llm}
    if dummy_weights and name in (OURS, "vllm"):
        options["load_format"] = "dummy"
    return EngineSpec(
        name,
        python=args.python.get(name, sys.executable),
        pythonpath=args.pythonpath.get(name),
        options=options,
        environment=environment or {},
        verbose=args.verbose,
    )


def parallel_sizes(args: argparse.Namespace) -> dict[str, object]:
    """Arguments of an engine on several devices; none for one, which every engine takes."""
    names = ("tensor_parallel_size", "data_parallel_size")
    return {name: getattr(args, name) for name in names if getattr(args, name) > 1}


def num_devices(args: argparse.Namespace) -> int:
    """Devices that an engine runs on."""
    return args.tensor_parallel_size * args.data_parallel_size


def figure_prefix(engine: str, args: argparse.Namespace) -> str:
    """What stands before a figure's name: `vllm/` for vLLM, nothing for ours; `dp2tp4_` on several devices."""
    short = {"data_parallel_size": "dp", "tensor_parallel_size": "tp"}
    sizes = "".join(f"{short[name]}{size}" for name, size in sorted(parallel_sizes(args).items()))
    return ("" if engine == OURS else f"{engine}/") + (f"{sizes}_" if sizes else "")


def _by_engine(parser: argparse.ArgumentParser, option: str, values: list[str]) -> dict[str, str]:
    for value in values:
        engine, _, setting = value.partition("=")
        if engine not in ENGINES or not setting:
            parser.error(f"{option} {value}: write ENGINE=..., the engine one of {', '.join(ENGINES)}")
    return dict(value.split("=", 1) for value in values)


def _parse_option(option: str) -> tuple[str, object]:
    """`NAME=VALUE`; a value that is no JSON is a string."""
    name, _, value = option.partition("=")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value
