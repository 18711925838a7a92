"""`nanovllm-jax serve`: the OpenAI-compatible server."""

from __future__ import annotations

import logging
from typing import Annotated, Any, Literal

import typer

from nanovllm_jax.cli import options
from nanovllm_jax.cli.terminal import note, set_up_logging, stderr
from nanovllm_jax.errors import ConfigError
from nanovllm_jax.model_names import EMBEDDED

_SERVER = "Server"
_BACKLOG = 2048  # connections that wait to be accepted; uvicorn's


def serve(
    model_argument: Annotated[
        str | None,
        typer.Argument(metavar="[MODEL]", callback=options.check_name, show_default=False, help="As --model."),
    ] = None,
    model: options.Model = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is all.", rich_help_panel=_SERVER)] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.", rich_help_panel=_SERVER)] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            envvar="NANOVLLM_API_KEY",
            show_default=False,
            help="Key that requests must bring; repeatable. Cached prefixes are kept apart by key.",
            rich_help_panel=_SERVER,
        ),
    ] = None,
    served_model_name: Annotated[
        str | None, typer.Option(show_default="the model", help="What clients call it.", rich_help_panel=_SERVER)
    ] = None,
    max_queue: Annotated[
        int | None,
        typer.Option(min=0, show_default="no limit", help="Waiting requests before 503.", rich_help_panel=_SERVER),
    ] = None,
    max_body_size: Annotated[int, typer.Option(min=1, help="Bytes of a request's body.", rich_help_panel=_SERVER)] = 4
    * 2**20,
    drain_timeout: Annotated[
        int | None,
        typer.Option(min=0, show_default="no limit", help="Seconds to finish at the end.", rich_help_panel=_SERVER),
    ] = None,
    batching: Annotated[
        Literal["mixed", "prefill_first"],
        typer.Option(help="'mixed' evens the time between tokens.", rich_help_panel="Engine"),
    ] = "mixed",
    max_num_seqs: Annotated[
        int, typer.Option(min=1, help="Requests that run at once.", rich_help_panel="Engine")
    ] = 256,
    max_num_batched_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens a step computes at most.", rich_help_panel="Engine")
    ] = 8192,
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
    """Serves a model to OpenAI's clients. Ctrl-C finishes what runs; a second one stops at once.

    While a request with logprobs, logit_bias, bad words, min_tokens or a penalty runs, all rows of a step get one token
    instead of several: slower for everyone.

    [bold]Examples[/bold]

    \b
      nanovllm-jax serve                              the small built-in model on port 8000
      nanovllm-jax serve Qwen/Qwen3-0.6B --host 0.0.0.0 --api-key secret
      curl localhost:8000/v1/completions -H 'Content-Type: application/json' \\
          -d '{"prompt": "Once upon a time"}'
    """  # noqa: D301
    set_up_logging(verbose)
    logging.getLogger("nanovllm_jax").setLevel(logging.INFO)
    server = import_server()
    model = model_argument or model
    config = server.ServeConfig(
        served_model_name or model or EMBEDDED, tuple(api_key or ()), max_queue=max_queue, max_body_size=max_body_size
    )
    opened = server.open_socket(host, port)
    with stderr().status(f"Loading {model or 'the built-in model'}, compiling"):
        from nanovllm_jax import AsyncLLM  # brings JAX along

        llm = AsyncLLM(
            model,
            tokenizer=tokenizer,
            batching=batching,
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
    try:
        opened.listen(_BACKLOG)
        note(f"serving {config.model_name} on http://{host}:{opened.getsockname()[1]}")
        server.run_server(llm, config, opened, drain_timeout=drain_timeout, log_requests=verbose)
    finally:
        opened.close()
        llm.close()


def import_server() -> Any:
    """The module `nanovllm_jax.serve.server`.

    Raises:
        ConfigError: without the extra `serve`.
    """
    try:
        import fastapi
        import prometheus_client
        import uvicorn
    except ImportError as error:
        raise ConfigError(
            f"The server needs the package {error.name}: install nanovllm-jax[serve], or run with uv run --extra serve."
        ) from error
    del fastapi, prometheus_client, uvicorn
    from nanovllm_jax.serve import server

    return server
