"""How long the GPU waits for the host over a whole run of bench256, from a profiler trace of every step.

    python benchmarks/host_gap.py --record
    python benchmarks/host_gap.py --smoke --model nanovllm_jax/assets/tiny        # any machine; figures mean nothing

`host_gap_frac` is the idle time between one step's last and the next one's first device activity, summed, over the
time from the first activity to the last. The engine has Qwen3-0.6B's shape and random weights. Two runs come before the
traced one: XLA replays a program as a whole from its second run on, and the time of the second shows on stderr what
tracing costs.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import results_log
from models import QWEN3_0_6B, write_config
from reporting import progress
from workloads import CASES

from nanovllm_jax import LLM
from nanovllm_jax.cli.terminal import set_up_logging
from nanovllm_jax.loadtest.offline import timed_run

BENCH256 = next(case for case in CASES if case.name == "bench256")


def main() -> None:
    """Runs three draws, the last of them traced, and prints one JSON line."""
    args = parse_args()
    set_up_logging(verbose=True)
    draw = BENCH256.smoke if args.smoke else BENCH256.draw
    with ExitStack() as stack:
        folder = args.trace or stack.enter_context(tempfile.TemporaryDirectory())
        llm = stack.enter_context(engine(args.model, stack))
        for seed in (1, 2):
            progress(f"without a trace: {timed_run(llm, draw(seed)).output_tok_s:,.0f} output tok/s")
        with llm.profile(folder) as profile:
            traced = timed_run(llm, draw(0))
        progress(f"traced: {traced.output_tok_s:,.0f} output tok/s")
    print(profile, file=sys.stderr)
    about = results_log.measured_here() | {"commit": args.commit}
    line = results_log.figure_line("host_gap_frac", [profile.summary.host_gap_frac], "1", None, **about)
    print(json.dumps(line))
    if args.record:
        results_log.append([line], Path(args.record))


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="DIR", help="another model than Qwen3-0.6B's shape with random weights")
    parser.add_argument("--smoke", action="store_true", help="tiny draws: shows that everything works, nothing else")
    parser.add_argument("--trace", metavar="DIR", help="keep the trace there, for XProf or Perfetto")
    parser.add_argument("--record", nargs="?", const=str(results_log.DEFAULT_FOLDER), help="folder to append to")
    parser.add_argument("--commit", help="commit to record where there is no checkout")
    args = parser.parse_args()
    if args.record and (args.smoke or args.model):
        parser.error("--record is for bench256 and the shape of Qwen3-0.6B; the figure's name stands for them")
    return args


def engine(model: str | None, stack: ExitStack) -> LLM:
    """The engine as `throughput.py` starts it."""
    if model is not None:
        return LLM(model, skip_tokenizer_init=True)
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    write_config(QWEN3_0_6B, folder)
    return LLM(folder, load_format="dummy", max_model_len=4096, skip_tokenizer_init=True)


if __name__ == "__main__":
    main()
