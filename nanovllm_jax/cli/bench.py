"""`nanovllm-jax bench throughput`."""

from __future__ import annotations

import json
import statistics
from typing import Annotated, Any

import typer

from nanovllm_jax.cli import options
from nanovllm_jax.cli.session import open_session, prefill_size
from nanovllm_jax.cli.terminal import note, write
from nanovllm_jax.loadtest.offline import MAX_TOKEN_ID, print_table, random_requests, timed_run, warm_up
from nanovllm_jax.model_names import EMBEDDED

app = typer.Typer(no_args_is_help=True, help="Measures the engine and servers.", rich_markup_mode="rich")


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
