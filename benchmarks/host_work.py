"""What the host does for each token of each row, and before a first step: the engine over devices that are a clock.

    python benchmarks/host_work.py                                   # devices that need no time: all is the host's
    python benchmarks/host_work.py --data-parallel-size 8 --step-ms 24 --launch-ms 1.4
    python benchmarks/host_work.py --case shared-prefix --step-ms 15 --launch-ms 4
    python benchmarks/host_work.py --texts 100000 --step-ms 6   # does a long list slow the steps or fill memory?

Scheduler, block manager, packing, reading and outputs are the engine's own; its programs return at once. With
`--step-ms` a decode step is ready that long after the one before it (a prefill of 16,384 tokens after twice that), and
`--launch-ms` is how long the runtime keeps the calling thread for each program without needing Python. `--case` times
`LLM.generate` on a case of `throughput.py`, its sampling parameters included, and says when its first step was ready
to be launched. `--texts` gives `LLM.generate` that many short texts, tokenised and detokenised, and says for each tenth
of the steps what they cost and how much memory the process holds after them.
Needs no GPU; the times are this machine's and say nothing of a device.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from workloads import CASES, Case

from nanovllm_jax import LLM
from nanovllm_jax.config import EngineConfig, ModelConfig, RopeConfig
from nanovllm_jax.engine.build import Built
from nanovllm_jax.engine.engine import Engine
from nanovllm_jax.engine.plan import abstract_weights, describe_programs, scheduler_limits, smallest_shape
from nanovllm_jax.engine.replica import Replica
from nanovllm_jax.engine.scheduler import Scheduler
from nanovllm_jax.loadtest.offline import print_table, random_requests
from nanovllm_jax.parallel.mesh import make_mesh
from nanovllm_jax.sampling_params import SamplingParams
from nanovllm_jax.step.catalogue import ProgramKey
from nanovllm_jax.step.runner import Runner
from nanovllm_jax.step.state import StateShape
from nanovllm_jax.weights import GenerationDefaults, ModelSource, load_tokenizer, locate

ROWS, MAX_MODEL_LEN, DECODE_STEPS = 256, 2048, 4
# Its size changes nothing on the host.
MODEL = ModelConfig(
    family="qwen3", vocab_size=151_936, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=1, num_kv_heads=1,
    head_dim=8, max_position_embeddings=MAX_MODEL_LEN, rms_norm_eps=1e-6, rope=RopeConfig(),
)  # fmt: skip
_sleep_without_python = ctypes.CDLL(None).usleep  # ctypes lets other threads run meanwhile


class Clock:
    """A device: what it was given to do is done one after the other.

    Args:
        launch_s: how long the runtime keeps the thread that starts a program.
    """

    def __init__(self, launch_s: float) -> None:
        self.launch_s, self.free_at = launch_s, 0.0
        self.launched: tuple[float, float] | None = None  # when it first was, wall and CPU time; to be reset

    def run(self, seconds: float) -> float:
        """Starts a program; when it will be done."""
        self.launched = self.launched or (time.perf_counter(), time.process_time())
        if self.launch_s:
            _sleep_without_python(int(self.launch_s * 1e6))
        self.free_at = max(self.free_at, time.perf_counter()) + seconds
        return self.free_at


class Tokens:
    """The sampled tokens of a program, on the host at `done_at`."""

    def __init__(self, shape: tuple[int, ...], done_at: float) -> None:
        self._tokens, self._done_at = np.zeros(shape, np.int32), done_at

    def copy_to_host_async(self) -> None:
        """Nothing to do."""

    def is_ready(self) -> bool:
        """Whether the device has done it."""
        return time.perf_counter() >= self._done_at

    def block_until_ready(self) -> None:
        """Until the device has done it."""
        if (left := self._done_at - time.perf_counter()) > 0:
            time.sleep(left)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        self.block_until_ready()
        return self._tokens


class StandInPrograms:
    """Programs with the real ones' arguments and results, and no computation."""

    def __init__(self, catalogue: Any, clock: Clock, step_s: float) -> None:
        self.catalogue, self.clock, self._step_s = catalogue, clock, step_s

    def __getitem__(self, key: ProgramKey) -> Callable[..., Any]:
        clock, size = self.clock, key.size
        match key.kind:
            case "decode" | "decode_filtered":
                return lambda params, caches, rows, delta: (
                    caches, rows, Tokens((DECODE_STEPS, size), clock.run(self._step_s * size / ROWS))
                )  # fmt: skip
            case "prefill":
                seconds = 2 * self._step_s * size / 16_384
                return lambda params, caches, rows, delta: (caches, rows, clock.run(seconds), None, None)
            case "decode_forward":
                return lambda params, caches, rows, delta: (caches, rows, clock.run(self._step_s), None)
            case "plain" | "filtered":
                return lambda head, rows, hidden, sampled: (rows, Tokens((size,), clock.run(0)))
            case "update_rows":
                return lambda rows, packed: rows
            case _:
                raise KeyError(key)


def make_engine(
    num_replicas: int, step_s: float, launch_s: float, source: ModelSource | None = None
) -> tuple[Engine, LLM]:
    """The engine as a start on GPUs makes it, over clocks instead of GPUs, with a source's tokenizer; and its LLM."""
    config = EngineConfig(max_num_seqs=ROWS, max_model_len=MAX_MODEL_LEN, decode_steps=DECODE_STEPS)
    mesh = make_mesh(1, 1)
    smallest = smallest_shape(MODEL, config)
    shape = StateShape(ROWS * smallest.blocks_per_row, config.block_size, ROWS, MAX_MODEL_LEN)
    weights = abstract_weights(MODEL, jnp.dtype("bfloat16"), mesh)
    catalogue = describe_programs(MODEL, config, shape, weights, jnp.dtype("bfloat16"), mesh, on_gpu=True)
    params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), catalogue.params)
    limits = scheduler_limits(MODEL, config, shape, DECODE_STEPS)
    replicas = [
        Replica(Scheduler(limits), Runner(StandInPrograms(catalogue, Clock(launch_s), step_s), params))  # pyright: ignore
        for _ in range(num_replicas)
    ]
    tokenizer = load_tokenizer(source) if source else None
    engine = Engine(
        replicas, tokenizer, eos_token_ids=frozenset({1}), vocab_size=MODEL.vocab_size, max_logprobs=20, seed=0
    )
    built = Built(engine, source or ModelSource("safetensors", Path(), "clock"), MODEL, shape, GenerationDefaults())
    return engine, LLM.from_built(built, config)


@dataclass(frozen=True)
class Run:
    """One bench256 for each replica; seconds, on the wall and of this process's CPU time."""

    queued_s: float  # until all requests are queued
    cpu_s: float  # after that
    total_s: float
    num_tokens: int


def timed_run(engine: Engine, seed: int) -> Run:
    """Queues all requests, then steps until they are done."""
    prompts, lengths = random_requests(seed, ROWS * len(engine.replicas), (100, 1024), (100, 1024))
    params = [SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=n, detokenize=False) for n in lengths]
    gc.collect()
    started = time.perf_counter()
    for i, (prompt, its_params) in enumerate(zip(prompts, params, strict=True)):
        engine.add_request(f"{seed}-{i}", {"prompt_token_ids": prompt}, its_params)
    queued_s, cpu, num_tokens = time.perf_counter() - started, time.process_time(), 0
    while engine.has_unfinished:
        num_tokens += sum(len(output.outputs[0].token_ids) for output in engine.step())
    return Run(queued_s, time.process_time() - cpu, time.perf_counter() - started, num_tokens)


def timed_case(llm: LLM, clock: Clock, case: Case, repeat: int) -> list[float]:
    """ms: the whole call and its CPU time; until the first step is launched, and the CPU time of that."""
    prompts, lengths = case.draw(case.first_seed + repeat)
    clock.launched = None
    started, cpu = time.perf_counter(), time.process_time()
    params = [SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=n, detokenize=False) for n in lengths]
    llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
    ended, cpu_ended = time.perf_counter(), time.process_time()
    assert clock.launched
    times = ended - started, cpu_ended - cpu, clock.launched[0] - started, clock.launched[1] - cpu
    return [1e3 * seconds for seconds in times]


def print_cases(names: list[str], step_s: float, launch_s: float, repeats: int) -> None:
    """Medians over the repeats, after one that is not timed."""
    engine, llm = make_engine(1, step_s, launch_s)
    programs, rows = engine.replicas[0].runner.programs, []
    gc.collect()
    gc.freeze()  # as after a start
    for case in (case for case in CASES if case.name in names):
        runs = [timed_case(llm, programs.clock, case, i) for i in range(repeats + 1)][1:]  # pyright: ignore
        rows.append([case.name, *(f"{statistics.median(times):.2f}" for times in zip(*runs, strict=True))])
    engine.close()
    columns = ["case", "ms in all", "of CPU", "ms until the first launch", "of CPU"]
    print_table(f"medians of {repeats}", columns, rows)


def resident_mb() -> float:
    """Memory that this process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def print_tenths(num_texts: int, step_s: float, launch_s: float) -> None:
    """What a step costs, and the memory after it, from the first tenth of the steps of one call to the last."""
    engine, llm = make_engine(1, step_s, launch_s, locate(None))
    step, costs = engine.step, []

    def timed_step(**options: Any) -> list[Any]:
        started = time.thread_time()
        outputs = step(**options)
        costs.append((1e3 * (time.thread_time() - started), resident_mb()))
        return outputs

    texts = [f"Story {i}: once upon a time, in a small village," for i in range(num_texts)]
    gc.collect()
    gc.freeze()  # as after a start
    engine.step, started, at_start = timed_step, time.perf_counter(), resident_mb()
    llm.generate(texts, SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=16), use_tqdm=False)
    seconds = time.perf_counter() - started
    engine.close()
    rows = []
    for i in range(10):
        cpu_ms, held = zip(*costs[len(costs) * i // 10 : len(costs) * (i + 1) // 10], strict=True)
        times = f"{statistics.median(cpu_ms):.3f}", f"{statistics.mean(cpu_ms):.3f}", f"{max(cpu_ms):.1f}"
        rows.append([str(i + 1), *times, f"{held[-1] - at_start:,.0f}"])
    columns = ["tenth of the steps", "CPU ms a step, median", "mean", "most", "MB more than before"]
    print_table(f"{num_texts:,} texts, {len(costs):,} steps, {seconds:.1f} s", columns, rows)


def main() -> None:
    """Times `--repeats` runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-parallel-size", type=int, default=1, help="replicas, each with 256 requests")
    parser.add_argument("--step-ms", type=float, default=0, help="of a decode step of 256 rows and 4 tokens")
    parser.add_argument("--launch-ms", type=float, default=0, help="that a program keeps its thread")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--case", action="append", choices=[case.name for case in CASES], help="repeatable")
    parser.add_argument("--texts", type=int, help="short prompts of one call")
    args = parser.parse_args()
    if args.texts:
        return print_tenths(args.texts, args.step_ms / 1e3, args.launch_ms / 1e3)
    if args.case:
        return print_cases(args.case, args.step_ms / 1e3, args.launch_ms / 1e3, args.repeats)
    engine, _ = make_engine(args.data_parallel_size, args.step_ms / 1e3, args.launch_ms / 1e3)
    rows = []
    for seed in range(args.repeats):
        run = timed_run(engine, seed)
        rates = f"{run.num_tokens / run.total_s:,.0f}", f"{run.cpu_s / run.num_tokens * 1e6:.2f}"
        rows.append([str(seed), f"{run.queued_s * 1e3:.1f}", f"{run.total_s:.3f}", *rates])
    engine.close()
    columns = ["run", "ms until all are queued", "s in all", "output tok/s", "CPU us a token after that"]
    print_table(f"{args.data_parallel_size} replicas", columns, rows)


if __name__ == "__main__":
    main()
