"""Options that several commands share: how to open a model and how to sample."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from nanovllm_jax.model_names import check_model_name

_ENGINE, _SAMPLING = "Engine", "Sampling"


def check_folder(path: Path | None) -> Path | None:
    """A file to write, whose folder is there: told before the work, not after it."""
    if path is not None and not path.parent.is_dir():
        raise typer.BadParameter(f"the folder {path.parent} does not exist; make it first.")
    return path


def check_name(model: str | None) -> str | None:
    """A model that may be there: what cannot be is told before JAX is imported, which takes seconds."""
    if model is not None:
        check_model_name(model)
    return model


Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        callback=check_name,
        show_default="the built-in model",
        help="Directory, hub id, .gguf file, Orbax directory or 'smollm2'.",
    ),
]
Tokenizer = Annotated[
    str | None,
    typer.Option(callback=check_name, show_default="the model's", help="Directory or hub id.", rich_help_panel=_ENGINE),
]
DType = Annotated[
    Literal["auto", "bfloat16", "float16", "float32"],
    typer.Option(help="Of the weights.", rich_help_panel=_ENGINE),
]
KvCacheDType = Annotated[
    Literal["auto", "fp8", "bfloat16", "float16", "float32"],
    typer.Option(help="Of cached keys and values; 'auto' is the weights'.", rich_help_panel=_ENGINE),
]
MaxModelLen = Annotated[
    int | None,
    typer.Option(
        min=2,
        show_default="the model's limit",
        help="Longest prompt and output together, in tokens.",
        rich_help_panel=_ENGINE,
    ),
]
TensorParallelSize = Annotated[
    int,
    typer.Option("--tensor-parallel-size", "-tp", min=1, help="GPUs that share each layer.", rich_help_panel=_ENGINE),
]
DataParallelSize = Annotated[
    int,
    typer.Option(
        "--data-parallel-size", "-dp", min=1, help="Replicas, each on GPUs of its own.", rich_help_panel=_ENGINE
    ),
]
GpuMemoryUtilization = Annotated[
    float, typer.Option(min=0.05, max=1.0, help="Share of the GPU's memory to use.", rich_help_panel=_ENGINE)
]
AttentionBackend = Annotated[
    Literal["auto", "triton", "xla"],
    typer.Option(help="'auto' is triton on GPUs, else xla.", rich_help_panel=_ENGINE),
]
EnforceEager = Annotated[
    bool,
    typer.Option("--enforce-eager", help="Compile on first use, not at the start.", rich_help_panel=_ENGINE),
]
LoadFormat = Annotated[
    Literal["auto", "dummy"],
    typer.Option(help="'dummy' takes random weights and needs a config only.", rich_help_panel=_ENGINE),
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Log what the engine does.", rich_help_panel=_ENGINE)]

MaxTokens = Annotated[int, typer.Option(min=1, help="Longest output, in tokens.", rich_help_panel=_SAMPLING)]
Temperature = Annotated[
    float | None,
    typer.Option(
        show_default="the model's, else 0",
        help="0 always takes the likeliest token; higher is more varied.",
        rich_help_panel=_SAMPLING,
    ),
]
TopP = Annotated[
    float | None,
    typer.Option(
        show_default="the model's, else 1",
        help="Keep the likeliest tokens that sum to this probability.",
        rich_help_panel=_SAMPLING,
    ),
]
TopK = Annotated[
    int | None,
    typer.Option(
        show_default="the model's, else all",
        help="Keep this many of the likeliest tokens.",
        rich_help_panel=_SAMPLING,
    ),
]
MinP = Annotated[
    float | None,
    typer.Option(
        show_default="the model's, else 0",
        help="Drop tokens less likely than this share of the likeliest.",
        rich_help_panel=_SAMPLING,
    ),
]
Seed = Annotated[
    int | None,
    typer.Option(show_default=False, help="Makes sampling repeatable.", rich_help_panel=_SAMPLING),
]
Stop = Annotated[
    list[str] | None,
    typer.Option(show_default=False, help="End the output before this text; repeatable.", rich_help_panel=_SAMPLING),
]
PromptFile = Annotated[
    Path | None,
    typer.Option(
        "--file",
        "-f",
        show_default=False,
        help="Prompts, one a line; - is stdin.",
    ),
]
