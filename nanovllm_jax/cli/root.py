"""The command line's root: its commands, and one clean line for each error."""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from nanovllm_jax.cli import bench, bench_serve, chat, convert, generate, inspect, run_batch, serve
from nanovllm_jax.cli.terminal import show_error
from nanovllm_jax.errors import ConfigError, NanoVLLMError, RequestError

_USAGE_ERROR, _FAILURE, _INTERRUPTED = 2, 1, 130


class _Commands(TyperGroup):
    """Prints the package's own errors as one line; anything else is a bug and keeps its traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except NanoVLLMError as error:
            show_error(str(error))
            wrong_use = isinstance(error, ConfigError | RequestError)
            raise typer.Exit(_USAGE_ERROR if wrong_use else _FAILURE) from None
        except KeyboardInterrupt:
            raise typer.Exit(_INTERRUPTED) from None


app = typer.Typer(
    cls=_Commands,
    rich_markup_mode="rich",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("generate")(generate.generate)
app.command("chat")(chat.chat)
app.command("convert")(convert.convert)
app.command("inspect")(inspect.inspect)
app.command("serve")(serve.serve)
app.command("run-batch")(run_batch.run_batch)
bench.app.command("serve")(bench_serve.bench_serve)
app.add_typer(bench.app, name="bench")


def _print_version(wanted: bool) -> bool:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"nanovllm-jax {version('nanovllm-jax')}")
        raise typer.Exit
    return wanted


@app.callback()
def root(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Generates text with large language models on JAX.

    [bold]Examples[/bold]

    \b
      nanovllm-jax generate "Once upon a time"        the small built-in model
      nanovllm-jax chat --model Qwen/Qwen3-0.6B       a model of the hub
      nanovllm-jax chat --model ~/models/Qwen3-0.6B   a model of this machine
    """  # noqa: D301
    # transformers would say at each start that it found no PyTorch; only its tokenizers are used.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
