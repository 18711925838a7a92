"""Start-up: from the start of a process to its first token, with empty caches and with filled ones.

    python benchmarks/startup.py --repeats 3 --record
    python benchmarks/startup.py --caches DIR --record       # warm starts alone, in a folder that others have filled

Each repetition makes a cache folder, starts the engine in it (`startup_cold_s`), ends it, and starts it there again
(`startup_warm_s`), each in a fresh process. The folder holds compiled programs and nothing else: XDG_CACHE_HOME, and
what Triton, PyTorch and the CUDA driver use instead of it, point there. Weights are a checkpoint on the local disk,
which the system has just written or read and so has in its memory; the tokenizer is loaded too. The clock runs until
one prompt of 128 ids has one token.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path

import results_log
from arguments import engine_spec, figure_prefix, make_parser, open_model, parse
from engine_process import EngineProcess
from reporting import Outcome, progress
from workloads import uniform

RECORDED_MODEL = "qwen3-0.6b"
KINDS = ("cold", "warm")
PROMPT_LEN = 128


def main() -> int:
    """Measures each engine; the exit status."""
    parser = make_parser(__doc__, model=RECORDED_MODEL)
    parser.add_argument(
        "--caches", type=Path, metavar="DIR", help="measure warm starts alone, with what is cached there"
    )
    args = parse(parser, recorded_model=RECORDED_MODEL)
    outcome = Outcome(args.record)
    with ExitStack() as stack:
        model = open_model(args, stack, weights=True)
        for engine in args.engine:
            with outcome.guard(engine, lambda: "start-up"):
                measure(engine, model, args, outcome)
    return outcome.finish()


def measure(engine: str, model: str, args: argparse.Namespace, outcome: Outcome) -> None:
    """Adds a line for each kind of start; if time runs out, of those that came to an end."""
    deadline = time.monotonic() + args.time_limit
    seconds: dict[str, list[float]] = {kind: [] for kind in (KINDS[1:] if args.caches else KINDS)}
    names = {}
    try:
        for repeat in range(args.repeats):
            with nullcontext(args.caches) if args.caches else tempfile.TemporaryDirectory() as folder:
                for kind in seconds:
                    process, to_first_token = start(engine, model, args, Path(folder), deadline)
                    names = {"device": process.device, "versions": process.versions, "commit": args.commit}
                    seconds[kind].append(to_first_token)
                    progress(f"{engine}: {kind} start {repeat + 1} of {args.repeats}: {to_first_token:.2f} s")
    finally:
        outcome.add(
            [
                results_log.figure_line(f"{figure_prefix(engine, args)}startup_{kind}_s", values, "s", None, **names)
                for kind, values in seconds.items()
                if values
            ]
        )


def start(
    engine: str, model: str, args: argparse.Namespace, caches: Path, deadline: float
) -> tuple[EngineProcess, float]:
    """One process from its start to its first token; it has ended then."""
    spec = engine_spec(args, engine, environment=cache_variables(caches))
    options = {name: value for name, value in spec.options.items() if name != "skip_tokenizer_init"}
    with EngineProcess(replace(spec, options=options), model, deadline) as process:
        process.run(uniform(0, 1, PROMPT_LEN, 1, max_token_id=255))
        to_first_token = time.perf_counter() - process.started
    return process, to_first_token


def cache_variables(folder: Path) -> dict[str, str]:
    """Where the engines and what they build on keep compiled programs."""
    return {
        "XDG_CACHE_HOME": str(folder),
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "CUDA_CACHE_PATH": str(folder / "cuda"),
    }


if __name__ == "__main__":
    sys.exit(main())
