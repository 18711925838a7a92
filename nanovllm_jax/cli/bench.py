"""`nanovllm-jax bench throughput`, and the drawing and measuring that `benchmarks/` shares with it."""

from __future__ import annotations

import json
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from nanovllm_jax.cli import options
from nanovllm_jax.cli.session import open_session, prefill_size
from nanovllm_jax.cli.terminal import note, write
from nanovllm_jax.errors import NanoVLLMError
from nanovllm_jax.model_names import EMBEDDED
from nanovllm_jax.sampling_params import SamplingParams

app = typer.Typer(no_args_is_help=True, help="Measures the engine and servers.", rich_markup_mode="rich")

MAX_TOKEN_ID = 10_000  # of nano-vLLM's benchmark
_WARM_UP_SEED = 99
_LOG_WIDTH = 120


@dataclass(frozen=True)
class Run:
    """One timed `generate` call: from prompts in host memory to all tokens back."""

    seconds: float
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int

    @property
    def output_tok_s(self) -> float:
        """Output tokens over wall time, prefill included."""
        return self.num_output_tokens / self.seconds

    @property
    def prompt_tok_s(self) -> float:
        """All prompt tokens, cached or computed, over wall time."""
        return self.num_prompt_tokens / self.seconds

    @property
    def computed_frac(self) -> float:
        """Prompt tokens that were computed, as a share of all."""
        return 1 - self.num_cached_tokens / self.num_prompt_tokens


Requests = tuple[list[list[int]], list[int]]  # prompts and their output lengths


def random_requests(
    seed: int,
    num_prompts: int,
    input_len: tuple[int, int],
    output_len: tuple[int, int],
    max_token_id: int = MAX_TOKEN_ID,
) -> Requests:
    """Prompts of random ids and their output lengths, drawn as nano-vLLM's `bench.py` draws them.

    Lengths and ids are uniform and include both bounds.
    """
    draw = random.Random(seed)
    prompts = [[draw.randint(0, max_token_id) for _ in range(draw.randint(*input_len))] for _ in range(num_prompts)]
    return prompts, [draw.randint(*output_len) for _ in range(num_prompts)]


def warm_up(llm: Any, max_token_id: int = MAX_TOKEN_ID) -> None:
    """A few short requests, not timed."""
    timed_run(llm, random_requests(_WARM_UP_SEED, 16, (10, 20), (10, 20), max_token_id))


def timed_run(llm: Any, requests: Requests, *, detokenize: bool = False) -> Run:
    """Times one `generate` call at temperature 0.6 with full-length outputs.

    Args:
        llm: an `LLM`.
        requests: what to generate.
        detokenize: make texts too, as a server has to.

    Raises:
        NanoVLLMError: if an output has not the length that was asked for.
    """
    prompts, output_lens = requests
    params = [
        SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=length, detokenize=detokenize)
        for length in output_lens
    ]
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    started = time.perf_counter()
    outputs = llm.generate(inputs, params, use_tqdm=False)
    seconds = time.perf_counter() - started
    for i, (output, length) in enumerate(zip(outputs, output_lens, strict=True)):
        got = len(output.outputs[0].token_ids)
        if got != length:
            raise NanoVLLMError(f"output {i} has {got} tokens, {length} were asked for; the figure is void.")
    return Run(
        seconds,
        sum(map(len, prompts)),
        sum(output.num_cached_tokens or 0 for output in outputs),
        sum(output_lens),
    )


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on stderr, wide enough for a log; the first column is a name, the others are numbers."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns[:1], title=title)
    for column in columns[1:]:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*row)
    Console(stderr=True, width=None if sys.stderr.isatty() else _LOG_WIDTH).print(table)


def length_range(text: str) -> tuple[int, int]:
    """`128` or `100:1024`."""
    low, _, high = text.partition(":")
    try:
        bounds = int(low), int(high or low)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is neither a number nor LOW:HIGH.") from None
    if not 1 <= bounds[0] <= bounds[1]:
        raise typer.BadParameter(f"{text!r} needs 1 <= LOW <= HIGH.")
    return bounds


@app.command("throughput")
def throughput(
    model: options.Model = None,
    num_prompts: Annotated[int, typer.Option(min=1, help="Requests a run.")] = 32,
    input_len: Annotated[
        Any, typer.Option(parser=length_range, metavar="N|LOW:HIGH", help="Prompt tokens, drawn uniformly.")
    ] = "128",
    output_len: Annotated[
        Any, typer.Option(parser=length_range, metavar="N|LOW:HIGH", help="Output tokens, drawn uniformly.")
    ] = "128",
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs, each with fresh prompts.")] = 3,
    seed: Annotated[int, typer.Option(help="Seed of the first run's draw.")] = 0,
    max_num_seqs: Annotated[int, typer.Option(min=1, help="Most sequences at once.", rich_help_panel="Engine")] = 256,
    dtype: options.DType = "auto",
    kv_cache_dtype: options.KvCacheDType = "auto",
    max_model_len: options.MaxModelLen = None,
    tensor_parallel_size: options.TensorParallelSize = 1,
    data_parallel_size: options.DataParallelSize = 1,
    gpu_memory_utilization: options.GpuMemoryUtilization = 0.9,
    attention_backend: options.AttentionBackend = "auto",
    enforce_eager: options.EnforceEager = False,
    load_format: options.LoadFormat = "auto",
    verbose: options.Verbose = False,
) -> None:
    """Times offline generation of random prompts: output tokens over wall time, prefill included.

    [bold]Examples[/bold]

    \b
      nanovllm-jax bench throughput
      nanovllm-jax bench throughput --model Qwen/Qwen3-0.6B --num-prompts 256 \\
          --input-len 100:1024 --output-len 100:1024   as nano-vLLM's bench.py
      nanovllm-jax bench throughput --model DIR --load-format dummy
    """  # noqa: D301
    with open_session(
        model,
        verbose=verbose,
        max_num_seqs=min(max_num_seqs, num_prompts),
        max_num_batched_tokens=prefill_size(num_prompts * input_len[1]),
        dtype=dtype,
        kv_cache_dtype=kv_cache_dtype,
        max_model_len=max_model_len,
        tensor_parallel_size=tensor_parallel_size,
        data_parallel_size=data_parallel_size,
        gpu_memory_utilization=gpu_memory_utilization,
        attention_backend=attention_backend,
        enforce_eager=enforce_eager,
        load_format=load_format,
        skip_tokenizer_init=True,
    ) as session:
        note(f"ready after {session.startup_s:.1f} s")
        max_token_id = min(MAX_TOKEN_ID, session.llm.model_config.vocab_size - 1)
        warm_up(session.llm, max_token_id)
        draws = (random_requests(seed + i, num_prompts, input_len, output_len, max_token_id) for i in range(repeats))
        runs = [timed_run(session.llm, requests) for requests in draws]
    print_table(
        f"{num_prompts} prompts, {input_len[0]} to {input_len[1]} in, {output_len[0]} to {output_len[1]} out",
        ["run", "seconds", "prompt tok/s", "output tok/s"],
        [
            [str(i), f"{run.seconds:.2f}", f"{run.prompt_tok_s:,.0f}", f"{run.output_tok_s:,.0f}"]
            for i, run in enumerate(runs)
        ],
    )
    rates = [run.output_tok_s for run in runs]
    result = {
        "model": model or EMBEDDED,
        "num_prompts": num_prompts,
        "input_len": input_len,
        "output_len": output_len,
        "output_tok_s": round(statistics.median(rates), 1),
        "min": round(min(rates), 1),
        "max": round(max(rates), 1),
        "startup_s": round(session.startup_s, 1),
    }
    write(json.dumps(result) + "\n")
