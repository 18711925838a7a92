"""`nanovllm-jax inspect`: what the step compiles to, what it costs and what is wrong with it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from nanovllm_jax.cli import options
from nanovllm_jax.cli.terminal import note, set_up_logging, stderr, write
from nanovllm_jax.errors import ConfigError
from nanovllm_jax.model_names import EMBEDDED

_LOG_WIDTH = 140  # where the terminal's is not known
_CONFIG_FILES = ["config.json", "generation_config.json"]


def inspect(
    model: Annotated[
        str | None,
        typer.Argument(
            callback=options.check_name, help="Directory, hub id, .gguf file or 'smollm2'; none: the built-in model."
        ),
    ] = None,
    phase: Annotated[
        Literal["decode", "prefill", "mixed"] | None, typer.Option(show_default="all", help="Only this kind of step.")
    ] = None,
    rows: Annotated[int | None, typer.Option(min=1, show_default="most", help="Sequences a decode step has.")] = None,
    tokens: Annotated[int | None, typer.Option(min=1, show_default="most", help="Tokens a prefill step has.")] = None,
    context: Annotated[int, typer.Option(min=1, help="Tokens a sequence has, for the costs of attention.")] = 1024,
    tp: Annotated[int, typer.Option("--tensor-parallel-size", "--tp", "-tp", min=1, help="Number of GPUs.")] = 1,
    ir: Annotated[
        Literal["jaxpr", "stablehlo", "hlo", "triton", "ptx"] | None,
        typer.Option(show_default="none", help="Print the programs in this language instead of the summary."),
    ] = None,
    html_file: Annotated[
        Path | None,
        typer.Option("--html", dir_okay=False, callback=options.check_folder, help="Write the report as a page here."),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", dir_okay=False, callback=options.check_folder, help="Write it here.")
    ] = None,
    diff: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Compare with a report that --json wrote.")
    ] = None,
    no_weights: Annotated[
        bool, typer.Option("--no-weights", help="From the config alone: only that is downloaded, nothing is loaded.")
    ] = False,
    gpu: Annotated[
        str | None,
        typer.Option(show_default="the device here", help="Lower for h200, a100, rtx3090, ...; needs none of them."),
    ] = None,
    dtype: options.DType = "auto",
    kv_cache_dtype: options.KvCacheDType = "auto",
    max_model_len: options.MaxModelLen = None,
    max_num_seqs: Annotated[int, typer.Option(min=1, help="Most sequences at a time.")] = 256,
    max_num_batched_tokens: Annotated[int, typer.Option(min=1, help="Most tokens a step.")] = 16_384,
    attention_backend: options.AttentionBackend = "auto",
    verbose: options.Verbose = False,
) -> None:
    """Shows what the step compiles to: programs, kernels, flops, bytes, memory, and what is wrong.

    The weights are never needed. With --gpu the programs are lowered for that GPU on any machine.

    [bold]Examples[/bold]

    \b
      nanovllm-jax inspect --no-weights
      nanovllm-jax inspect Qwen/Qwen3-0.6B --no-weights --gpu h200 --json today.json --html today.html
      nanovllm-jax inspect Qwen/Qwen3-0.6B --no-weights --gpu h200 --diff yesterday.json --html diff.html
      nanovllm-jax inspect Qwen/Qwen3-0.6B --no-weights --gpu a100 --phase decode --rows 8 --ir ptx
    """  # noqa: D301
    set_up_logging(verbose)
    if gpu is not None and not no_weights:
        raise typer.BadParameter("--gpu lowers without a GPU and goes with --no-weights.")
    with stderr().status(f"Inspecting {model or 'the built-in model'}"):
        import jax

        if tp > 1 and gpu is not None:
            jax.config.update("jax_num_cpu_devices", tp)
        if gpu is not None:
            jax.config.update("jax_platforms", "cpu")
        from nanovllm_jax.config import EngineConfig
        from nanovllm_jax.inspection import Report, collect
        from nanovllm_jax.inspection.gpus import find_gpu
        from nanovllm_jax.inspection.plan import bucket_keys, choose_keys, plan_catalogue
        from nanovllm_jax.step.programs import Programs, use_persistent_cache

        before = Report.load(diff) if diff else None
        target = find_gpu(gpu) if gpu else None
        engine = EngineConfig(
            dtype=dtype,
            kv_cache_dtype=kv_cache_dtype,
            tensor_parallel_size=tp,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max(max_num_batched_tokens, max_num_seqs),
            attention_backend=attention_backend,
        )
        catalogue = plan_catalogue(_model_config(model, no_weights), engine, target)
        use_persistent_cache()
        programs = None if target else Programs(catalogue, command_buffers=True)
        keys = choose_keys(catalogue, phase, rows, tokens)
        name = model or "the built-in model"
        buckets = bucket_keys(catalogue, keys) if rows is None and tokens is None else keys
        report = collect(catalogue, keys, model=name, programs=programs, gpu=target, context=context, buckets=buckets)
    if ir is not None:
        _print_text(report, ir)
    else:
        _print_summary(report, before)
    for file, write_it in ((html_file, lambda: report.html(before)), (json_file, report.json)):
        if file is not None:
            file.write_text(write_it(), encoding="utf-8")
            note(f"wrote {file}")


def _model_config(model: str | None, no_weights: bool) -> Any:
    """The model's shape; of a hub id with `no_weights` only the config is fetched."""
    from nanovllm_jax.weights import load_model_config, locate
    from nanovllm_jax.weights.source import ModelSource, download

    on_disk = model is None or model in (EMBEDDED, "smollm2") or Path(model).expanduser().exists()
    if on_disk:
        path = Path(model).expanduser() if model else None
        if path is not None and path.is_file() and path.suffix == ".json":
            return load_model_config(ModelSource("safetensors", path.parent, str(path)))
        return load_model_config(locate(model))
    if not no_weights:
        raise ConfigError(f"Model {model!r} is not on this machine; --no-weights fetches its config alone.")
    return load_model_config(ModelSource("safetensors", download(str(model), _CONFIG_FILES), str(model)))


def _print_text(report: Any, ir: str) -> None:
    shown = False
    for program in report.programs:
        if ir in program.texts:
            write(f"// {program.name}\n" + "\n".join(program.texts[ir].lines) + "\n")
            shown = True
    if not shown:
        needs = {"hlo": "compiling for a GPU that is here", "triton": "--gpu or a GPU", "ptx": "--gpu or a GPU"}
        raise ConfigError(f"There is no {ir} of these programs: it needs {needs.get(ir, 'another program')}.")


def _print_summary(report: Any, before: Any) -> None:
    from rich.console import Console

    from nanovllm_jax.inspection.summary import difference_table, summary

    console = Console(highlight=False, width=None if sys.stdout.isatty() else _LOG_WIDTH)
    console.print(summary(report))
    if before is not None:
        console.print(difference_table(report.diff(before)))
