"""`nanovllm-jax convert`: writes a model's weights as an Orbax checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from nanovllm_jax.cli.terminal import note, set_up_logging, stderr


def convert(
    source: Annotated[str, typer.Argument(help="Directory, hub id, .gguf file or 'smollm2'.")],
    destination: Annotated[Path, typer.Argument(file_okay=False, help="New directory.")],
    dtype: Annotated[
        Literal["auto", "bfloat16", "float16", "float32"],
        typer.Option(help="Of the weights; 'auto' keeps what they were saved in."),
    ] = "auto",
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what is done.")] = False,
) -> None:
    """Writes a model as an Orbax checkpoint, which loads sharded, straight to its devices.

    [bold]Examples[/bold]

    \b
      nanovllm-jax convert Qwen/Qwen3-0.6B qwen3-0.6b-orbax
      nanovllm-jax convert model.gguf model-orbax --dtype bfloat16
      nanovllm-jax generate --model qwen3-0.6b-orbax "Hello"
    """  # noqa: D301
    set_up_logging(verbose)
    with stderr().status(f"Converting {source}"):
        from nanovllm_jax import weights  # brings JAX along

        weights.convert(source, destination, None if dtype == "auto" else dtype)
    note(f"wrote {destination}; use it with --model {destination}")
