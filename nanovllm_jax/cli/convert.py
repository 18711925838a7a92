"""`nanovllm-jax convert`: writes a model's weights as an Orbax checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nanovllm_jax.cli.terminal import note, set_up_logging, stderr


def convert(
    source: Annotated[str, typer.Argument(help="Directory, hub id, .gguf file or 'smollm2'.")],
    destination: Annotated[Path, typer.Argument(file_okay=False, help="New directory.")],
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32.", metavar="DTYPE")] = "auto",
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
        from nanovllm_jax.weights import convert_to_orbax

        convert_to_orbax(source, destination, dtype=dtype)
    note(f"wrote {destination}; use it with --model {destination}")
