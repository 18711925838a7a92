"""What clients of the server see, as a table and one JSON line a figure; it ends within 5 minutes on a GPU.

    python benchmarks/serving.py --model qwen3-0.6b --record

`qwen3-0.6b` is that model's shape with random weights and a tokenizer of its size. For each `batching` the server runs
in a process of its own, and this one sends it prompts of random ids, all different:

- all at once: throughput at saturation, as a ratio to offline `LLM.generate` on the same requests with texts, which
  runs in a process of its own too (`serve_offline_ratio`);
- 32 under way: median time per output token (`serve_tpot_p50_ms_at_32`);
- at rising rates, shares of that throughput: the highest at which 99% of requests, and those of each lower rate, get
  their first token within 200 ms (`serve_max_rps_ttft_p99_200ms`).

The names are for "mixed", the server's default; those of "prefill_first" end with that.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import results_log
from models import QWEN3_0_6B, write_tokenizer

from nanovllm_jax.cli.bench_serve import print_run
from nanovllm_jax.cli.session import open_session
from nanovllm_jax.errors import NanoVLLMError
from nanovllm_jax.loadtest.client import Target
from nanovllm_jax.loadtest.drive import Load, drive, find_model
from nanovllm_jax.loadtest.figures import summarise
from nanovllm_jax.loadtest.offline import MAX_TOKEN_ID, Requests, print_table, random_requests, timed_run

MODELS = {"qwen3-0.6b": QWEN3_0_6B}
RECORDED_MODEL = "qwen3-0.6b"
RESULTS = results_log.ROOT / "benchmarks" / "results"
MAX_TTFT_MS = 200.0
CONCURRENCY = 32
SHARES = (0.3, 0.5, 0.65, 0.8, 0.9, 1.0)  # of the rate at saturation
MAX_NUM_SEQS = 256
START_LIMIT_S = 120.0


def main() -> None:
    """Runs all, or with --offline only that part, for the process that asked for it."""
    args = parse_args()
    if args.offline:
        print(json.dumps({"output_tok_s": offline_rate(args)}))
        return
    deadline = time.monotonic() + args.time_limit
    with tempfile.TemporaryDirectory() as folder:
        args.model_dir = model_directory(args.model, Path(folder))
        offline = run_offline(args)
        found = {name: measure(args, name, offline, deadline) for name in args.batching}
    lines = [line for name, figures in found.items() for line in figure_lines(name, figures, args.commit)]
    for line in lines:
        print(json.dumps(line))
    rows = [[line["figure"], f"{line['value']:,}", line["unit"]] for line in lines]
    print_table(f"{lines[0]['device']}, offline {offline:,.0f} output tok/s", ["figure", "value", "unit"], rows)
    if args.record:
        print(f"recorded in {results_log.append(lines, Path(args.record))}", file=sys.stderr)


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=RECORDED_MODEL, help=f"{', '.join(MODELS)}, a model's directory or 'tiny'")
    parser.add_argument("--batching", nargs="+", choices=["mixed", "prefill_first"], default=["mixed", "prefill_first"])
    parser.add_argument("--input-len", type=int, default=512)
    parser.add_argument("--output-len", type=int, default=256)
    parser.add_argument("--max-model-len", type=int, default=4096)
    parser.add_argument("--num-prompts", type=int, default=1536, help="requests at saturation, six rounds of all rows")
    parser.add_argument("--seconds", type=float, default=6.0, help="how long requests come at each rate")
    parser.add_argument("--time-limit", type=float, default=225.0, help="s after which no more rates are tried")
    parser.add_argument(
        "--record",
        nargs="?",
        const=str(RESULTS),
        metavar="DIR",
        help="append the figures to DIR/<device>.jsonl (default: benchmarks/results)",
    )
    parser.add_argument("--commit", help="commit to record where there is no checkout")
    parser.add_argument("--offline", action="store_true", help="print offline throughput on the same requests alone")
    args = parser.parse_args()
    if args.record == str(RESULTS) and args.model != RECORDED_MODEL:
        parser.error(f"--record there is for --model {RECORDED_MODEL}; the figures' names stand for it")
    return args


def model_directory(model: str, folder: Path) -> str | None:
    """A directory with config and tokenizer for a model of `MODELS`; None for the built-in one."""
    if config := MODELS.get(model):
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        write_tokenizer(folder, config["vocab_size"])
        return str(folder)
    return None if model == "tiny" else model


class Draws:
    """Requests that no earlier draw shares a prompt with, so that the prefix cache is of no help."""

    def __init__(self, args: argparse.Namespace, max_token_id: int) -> None:
        self._args, self._max_token_id, self._seed = args, max_token_id, 0

    def next(self, count: int) -> Requests:
        """As many more."""
        self._seed += 1
        lengths = (self._args.input_len,) * 2, (self._args.output_len,) * 2
        return random_requests(self._seed, count, *lengths, self._max_token_id)


@dataclass
class Measured:
    """The figures of one `batching`; None for what there was no time to measure."""

    offline_ratio: float
    tpot_p50_ms: float
    max_rps: float | None


def measure(args: argparse.Namespace, batching: str, offline: float, deadline: float) -> Measured:
    """Starts a server and sends it all loads."""
    with server(args, batching) as url:
        card = asyncio.run(find_model(url, None))
        target = Target(url, card["id"])
        draws = Draws(args, min(MAX_TOKEN_ID, card["vocab_size"] - 1))
        asyncio.run(drive(target, *draws.next(16), Load()))  # not timed
        full = send(target, draws.next(args.num_prompts), Load())  # the requests of the offline run
        held = send(target, draws.next(3 * CONCURRENCY), Load(max_concurrency=CONCURRENCY))
        max_rps = 0.0
        for share in SHARES:
            rate = round(share * full["req_s"], 1)
            if time.monotonic() + 1.5 * args.seconds > deadline:
                print(f"no time left for {rate} requests/s; the highest rate is not recorded", file=sys.stderr)
                max_rps = None
                break
            run = send(target, draws.next(math.ceil(rate * args.seconds)), Load(rate))
            if run["ttft_ms"]["p99"] > MAX_TTFT_MS:
                break
            max_rps = rate
    return Measured(full["output_tok_s"] / offline, held["tpot_ms"]["median"], max_rps)


def send(target: Target, requests: Requests, load: Load) -> dict:
    """One run's figures, printed.

    Raises:
        NanoVLLMError: if a request failed or has not the length that was asked for.
    """
    prompts, output_lens = requests
    found = summarise(asyncio.run(drive(target, prompts, output_lens, load)), {})
    print_run(found)
    if found["num_failed"] or found["num_output_tokens"] != sum(output_lens):
        raise NanoVLLMError(f"The run is void: {found['num_failed']} failed, {found['num_output_tokens']} tokens.")
    return found


@contextmanager
def server(args: argparse.Namespace, batching: str) -> Iterator[str]:
    """`nanovllm-jax serve` in a process of its own; yields its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = [*([args.model_dir] if args.model_dir else []), "--port", port, "--batching", batching]
    options += ["--max-model-len", args.max_model_len, "--max-num-seqs", MAX_NUM_SEQS]
    options += ["--load-format", "dummy"] if args.model in MODELS else []
    command = [sys.executable, "-c", "from nanovllm_jax.cli import main; main()", "serve", *map(str, options)]
    started = time.monotonic()
    process = subprocess.Popen(command)
    try:
        url = f"http://127.0.0.1:{port}"
        while not answers(url):
            if process.poll() is not None or time.monotonic() - started > START_LIMIT_S:
                raise NanoVLLMError(f"The server did not start within {START_LIMIT_S:.0f} s.")
            time.sleep(0.2)
        print(f"{batching}: server ready after {time.monotonic() - started:.1f} s", file=sys.stderr)
        yield url
    finally:
        process.terminate()
        process.wait(60)


def answers(url: str) -> bool:
    """Whether a server is there."""
    try:
        asyncio.run(find_model(url, None))
    except NanoVLLMError:
        return False
    return True


def run_offline(args: argparse.Namespace) -> float:
    """Output tokens a second of `LLM.generate`, in a process of its own."""
    names = ("input_len", "output_len", "max_model_len", "num_prompts")
    options = [text for name in names for text in (f"--{name.replace('_', '-')}", str(getattr(args, name)))]
    command = [sys.executable, __file__, "--offline", "--model", args.model, *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])["output_tok_s"]


def offline_rate(args: argparse.Namespace) -> float:
    """The requests of the saturation run through `LLM.generate`, with texts as the server makes them."""
    with tempfile.TemporaryDirectory() as folder:
        directory = model_directory(args.model, Path(folder))
        options = {"load_format": "dummy"} if args.model in MODELS else {}
        limits = {"max_model_len": args.max_model_len, "max_num_seqs": MAX_NUM_SEQS}
        with open_session(directory, verbose=True, **limits, **options) as session:
            largest = min(MAX_TOKEN_ID, session.llm.model_config.vocab_size - 1)
            draws = Draws(args, largest)
            timed_run(session.llm, draws.next(16), detokenize=True)  # not counted, as at the servers
            run = timed_run(session.llm, draws.next(args.num_prompts), detokenize=True)
    print(f"offline: {run.output_tok_s:,.0f} output tok/s, {run.seconds:.1f} s", file=sys.stderr)
    return run.output_tok_s


def figure_lines(batching: str, measured: Measured, commit: str | None) -> list[dict]:
    """As they are recorded. Only called at the end: it opens the device, which the servers need for themselves."""
    suffix = "" if batching == "mixed" else f"_{batching}"
    values = [
        ("serve_max_rps_ttft_p99_200ms", measured.max_rps, "req/s"),
        ("serve_tpot_p50_ms_at_32", measured.tpot_p50_ms, "ms"),
        ("serve_offline_ratio", measured.offline_ratio, "1"),
    ]
    return [
        results_log.figure_line(name + suffix, [value], unit, None, **results_log.measured_here(), commit=commit)
        for name, value, unit in values
        if value is not None
    ]


if __name__ == "__main__":
    main()
