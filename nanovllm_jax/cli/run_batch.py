"""`nanovllm-jax run-batch`: a file of requests in OpenAI's batch format."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from nanovllm_jax.cli import options
from nanovllm_jax.cli.serve import import_server
from nanovllm_jax.cli.terminal import note, set_up_logging, stderr
from nanovllm_jax.errors import ConfigError
from nanovllm_jax.model_names import EMBEDDED


def run_batch(
    source: Annotated[Path, typer.Argument(metavar="IN.JSONL", exists=True, dir_okay=False, show_default=False)],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            show_default=False,
            dir_okay=False,
            callback=options.check_folder,
            help="A line for each; what it holds is kept.",
        ),
    ],
    model: options.Model = None,
    served_model_name: Annotated[
        str | None, typer.Option(show_default="the model", help="What the requests call it.")
    ] = None,
    max_num_seqs: Annotated[
        int, typer.Option(min=1, help="Requests that run at once.", rich_help_panel="Engine")
    ] = 256,
    max_num_batched_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens a step computes at most.", rich_help_panel="Engine")
    ] = 16_384,
    tokenizer: options.Tokenizer = None,
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
    """Answers a file of requests in OpenAI's batch format; run again, it goes on where it was interrupted.

    [bold]Example[/bold]

    \b
      nanovllm-jax run-batch in.jsonl -o out.jsonl --model Qwen/Qwen3-0.6B

    A line of the input is [cyan]{"custom_id": "1", "method": "POST", "url": "/v1/completions", "body": {"prompt": "Once"}}[/cyan].
    A line that cannot be served has its error in its place; the others go on.
    """  # noqa: D301, E501
    set_up_logging(verbose)
    server = import_server()
    if source.resolve() == output.resolve():
        raise ConfigError(f"{source} is the input and the output; give another --output.")
    with stderr().status(f"Loading {model or 'the built-in model'}, compiling") as status:
        from nanovllm_jax import AsyncLLM  # brings JAX along
        from nanovllm_jax.serve import batch

        llm = AsyncLLM(
            model,
            tokenizer=tokenizer,
            batching="prefill_first",
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max(max_num_batched_tokens, max_num_seqs),
            dtype=dtype,
            kv_cache_dtype=kv_cache_dtype,
            max_model_len=max_model_len,
            tensor_parallel_size=tensor_parallel_size,
            data_parallel_size=data_parallel_size,
            gpu_memory_utilization=gpu_memory_utilization,
            attention_backend=attention_backend,
            enforce_eager=enforce_eager,
            load_format=load_format,
        )
        ended = 0

        def show() -> None:
            nonlocal ended
            ended += 1
            status.update(f"{ended} lines done")

        try:
            config = server.ServeConfig(served_model_name or model or EMBEDDED)
            counts = asyncio.run(batch.run_batch(llm, config, source, output, show))
        finally:
            llm.close()
    note(f"{counts.answered} answered, {counts.failed} refused or failed, {counts.kept} done before: {output}")
