"""Profiles bench256's prefill and decode steps and writes the report with their measured times.

    python benchmarks/profile_steps.py --out docs/example-report.html --trace /tmp/trace

The engine has Qwen3-0.6B's shape and random weights. All 256 prompts are computed, then the first decode steps of all
rows; the rest of the run is left out, since a trace of it would only be longer. Prints the kernels of each kind of
step and one JSON line a figure. Take the pictures of the page with `benchmarks/screenshots.py`.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import math
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import results_log
from models import QWEN3_0_6B, write_config

from nanovllm_jax import LLM, SamplingParams
from nanovllm_jax.cli.terminal import set_up_logging
from nanovllm_jax.inspection.profile_summary import accounted
from nanovllm_jax.loadtest.offline import MAX_TOKEN_ID, Requests, random_requests

LENGTHS = (100, 1024)  # of bench256's prompts and outputs, in tokens
MOST_TOKENS_A_STEP = 4  # that a decode step computes for each row


def main() -> None:
    """Warms up, profiles, writes the report and prints what was measured."""
    args = parse_args()
    set_up_logging(verbose=True)
    with ExitStack() as stack:
        folder = args.trace or stack.enter_context(tempfile.TemporaryDirectory())
        llm = stack.enter_context(LLM(args.model or dummy_model(stack), **engine_args(args)))
        # The second run of a program is the first that XLA replays as a whole.
        for seed in (97, 98):
            decode_s = run_steps(llm, draw(llm, args.prompts, seed), args.decode_steps)
        requests = draw(llm, args.prompts, seed=0)
        with llm.profile(folder) as profile:
            run_steps(llm, requests, args.decode_steps)
        print(profile)
        context = round(statistics.mean(map(len, requests[0]))) + MOST_TOKENS_A_STEP * args.decode_steps // 2
        report = llm.inspect(profile=profile, context=context)
    name = Path(args.model).name if args.model else "Qwen3-0.6B's shape, random weights"
    summary = dataclasses.replace(profile.summary, folder="")  # of no use to others
    report = dataclasses.replace(report, card=dataclasses.replace(report.card, model=name), profile=summary)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(report.html(), encoding="utf-8")
    print(f"wrote {args.out}, {args.out.stat().st_size / 1e6:.2f} MB", file=sys.stderr)
    for line in figures(summary, decode_s):
        print(json.dumps(line))


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=results_log.ROOT / "docs" / "example-report.html")
    parser.add_argument("--trace", metavar="DIR", help="keep the trace there, for XProf or Perfetto")
    parser.add_argument("--model", metavar="DIR", help="another model than Qwen3-0.6B's shape with random weights")
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--decode-steps", type=int, default=32)
    parser.add_argument("--enforce-eager", action="store_true", help="no command buffers: every kernel has its name")
    args = parser.parse_args()
    if args.prompts < 1 or args.decode_steps < 5:
        parser.error(f"--prompts is {args.prompts} and --decode-steps {args.decode_steps}; at least 1 and 5 are needed")
    return args


def dummy_model(stack: ExitStack) -> str:
    """A directory with the config alone."""
    return str(write_config(QWEN3_0_6B, stack.enter_context(tempfile.TemporaryDirectory())))


def engine_args(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `LLM`."""
    options: dict[str, Any] = {"max_num_seqs": args.prompts, "enforce_eager": args.enforce_eager}
    if args.model is None:
        options |= {"load_format": "dummy", "max_model_len": 4096}
    return options | {"skip_tokenizer_init": True}


def draw(llm: LLM, num_prompts: int, seed: int) -> Requests:
    """bench256's prompts, no longer than half of what the model takes."""
    lengths = LENGTHS if llm.max_model_len >= 2 * LENGTHS[1] else (8, llm.max_model_len // 2)
    return random_requests(seed, num_prompts, lengths, LENGTHS, min(MAX_TOKEN_ID, llm.model_config.vocab_size - 1))


def run_steps(llm: LLM, requests: Requests, decode_steps: int) -> float:
    """All prefill steps and then `decode_steps`; what is left is aborted. Returns a decode step's median seconds."""
    prompts, _ = requests
    max_tokens = MOST_TOKENS_A_STEP * (decode_steps + 2)
    params = SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=max_tokens, detokenize=False)
    for number, prompt in enumerate(prompts):
        llm.add_request(str(number), {"prompt_token_ids": prompt}, params)
    num_prefills = math.ceil(sum(map(len, prompts)) / llm.config.max_num_batched_tokens)
    ends = []
    for _ in range(num_prefills + decode_steps):
        llm.step()
        ends.append(time.perf_counter())
    for number in range(len(prompts)):
        llm.abort(str(number))
    # The first two wait for prefill steps, since a step is read after the next is dispatched.
    return statistics.median(after - before for before, after in itertools.pairwise(ends[num_prefills + 2 :]))


def figures(profile: Any, decode_s: float) -> list[dict[str, Any]]:
    """One line a figure."""
    line = functools.partial(results_log.figure_line, **results_log.measured_here())
    found = [line("decode_step_ms_without_profiler", [decode_s * 1e3], "ms", None)]
    for kind in profile.kinds:
        share = accounted(kind)
        if share is not None:
            found.append(line(f"{kind.name}_step_ms", [kind.step_s * 1e3], "ms", None))
            found.append(line(f"{kind.name}_accounted_frac", [share], "1", None))
    return found


if __name__ == "__main__":
    main()
