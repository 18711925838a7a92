"""`nanovllm-jax generate`: continues prompts."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from nanovllm_jax.cli import options
from nanovllm_jax.cli.session import Session, open_session, prefill_size, sampling_params
from nanovllm_jax.cli.terminal import note, show_error, write, write_prompt
from nanovllm_jax.sampling_params import SamplingParams

_MAX_SEQUENCES = 256


def generate(
    prompts: Annotated[list[str] | None, typer.Argument(show_default=False, help="Texts to continue.")] = None,
    file: options.PromptFile = None,
    model: options.Model = None,
    json_lines: Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")] = False,
    echo: Annotated[bool, typer.Option(help="Print each prompt before its continuation.")] = True,
    max_tokens: options.MaxTokens = 64,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    min_p: options.MinP = None,
    n: Annotated[int, typer.Option(min=1, help="Samples a prompt.", rich_help_panel="Sampling")] = 1,
    seed: options.Seed = None,
    stop: options.Stop = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on past the end.", rich_help_panel="Sampling")
    ] = False,
    tokenizer: options.Tokenizer = None,
    dtype: options.DType = "auto",
    kv_cache_dtype: options.KvCacheDType = "auto",
    max_model_len: options.MaxModelLen = None,
    tensor_parallel_size: options.TensorParallelSize = 1,
    data_parallel_size: options.DataParallelSize = 1,
    gpu_memory_utilization: options.GpuMemoryUtilization = 0.9,
    attention_backend: options.AttentionBackend = "auto",
    enforce_eager: options.EnforceEager = False,
    verbose: options.Verbose = False,
) -> None:
    """Continues prompts. One prompt is streamed to the terminal as it grows.

    [bold]Examples[/bold]

    \b
      nanovllm-jax generate "Once upon a time"
      nanovllm-jax generate --model smollm2 "The capital of France is"
      nanovllm-jax generate --temperature 0.8 --n 3 "To be" "Or not to be"
      nanovllm-jax generate --model Qwen/Qwen3-0.6B --file prompts.txt --json > answers.jsonl
    """  # noqa: D301
    texts = _read_prompts(prompts or [], file)
    max_num_seqs = min(_MAX_SEQUENCES, len(texts) * n)
    with open_session(
        model,
        verbose=verbose,
        tokenizer=tokenizer,
        dtype=dtype,
        kv_cache_dtype=kv_cache_dtype,
        max_model_len=max_model_len,
        tensor_parallel_size=tensor_parallel_size,
        data_parallel_size=data_parallel_size,
        gpu_memory_utilization=gpu_memory_utilization,
        attention_backend=attention_backend,
        enforce_eager=enforce_eager,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=prefill_size(max(_most_tokens(texts), max_num_seqs)),
    ) as session:
        params = sampling_params(
            session.llm,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            n=n,
            seed=seed,
            stop=stop or None,
            ignore_eos=ignore_eos or None,
        )
        started = time.perf_counter()
        if len(texts) == 1 and n == 1 and not json_lines:
            outputs = [_stream(session.llm, texts[0], params, echo)]
        else:
            outputs = session.llm.generate(texts, params, use_tqdm=sys.stderr.isatty())
            _print(outputs, echo, json_lines)
        _finish(outputs, session, time.perf_counter() - started)


def _read_prompts(prompts: Sequence[str], file: Path | None) -> list[str]:
    """The prompts of the command line, then the file's lines that are not blank."""
    texts = list(prompts)
    if file is not None:
        try:
            content = sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise typer.BadParameter(f"--file {file} cannot be read: {error}") from None
        texts += [line for line in content.splitlines() if line.strip()]
    if not texts:
        raise typer.BadParameter("there is no prompt; give one, or --file with one a line.")
    if "" in texts:
        raise typer.BadParameter("a prompt is empty; give at least 1 character.")
    return texts


def _most_tokens(texts: Sequence[str]) -> int:
    """Tokens of all prompts at most: one of each byte, and a special token or two."""
    return sum(len(text.encode()) + 2 for text in texts)


def _stream(llm: Any, prompt: str, params: SamplingParams, echo: bool) -> Any:
    """Writes the text as it grows; returns the finished output."""
    outputs, output, shown = llm.stream(prompt, params), None, 0  # refuses a prompt before it is echoed
    if echo:
        write_prompt(prompt)
    try:
        for output in outputs:
            text = output.outputs[0].text
            write(text[shown:])
            shown = len(text)
    finally:
        if echo or shown:
            write("\n")
    return output


def _print(outputs: Sequence[Any], echo: bool, json_lines: bool) -> None:
    for output in outputs:
        for completion in output.outputs:
            if json_lines:
                fields = {
                    "prompt": output.prompt,
                    "index": completion.index,
                    "text": completion.text,
                    "token_ids": list(completion.token_ids),
                    "finish_reason": completion.finish_reason,
                }
                write(json.dumps(fields, ensure_ascii=False) + "\n")
                continue
            if echo:
                write_prompt(output.prompt)
            write(completion.text + "\n")
            if echo:
                write("\n")


def _finish(outputs: Sequence[Any], session: Session, seconds: float) -> None:
    """The summary line; a failed request is an error."""
    completions = [completion for output in outputs for completion in output.outputs]
    num_tokens = sum(len(completion.token_ids) for completion in completions)
    note(
        f"{num_tokens} tokens in {seconds:.2f} s ({num_tokens / seconds:.1f} tok/s), "
        f"after {session.startup_s:.1f} s of loading and compiling"
    )
    failed = sum(completion.finish_reason == "error" for completion in completions)
    if failed:
        show_error(f"{failed} of {len(completions)} outputs ended with an error; their text is incomplete.")
        raise typer.Exit(1)
