"""`nanovllm-jax bench serve`: load on an OpenAI-compatible server, and the latencies that its clients see."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from nanovllm_jax.cli.bench import length_range
from nanovllm_jax.cli.options import check_folder
from nanovllm_jax.cli.terminal import note, show_error, stderr, write
from nanovllm_jax.errors import ConfigError, NanoVLLMError
from nanovllm_jax.loadtest.offline import MAX_TOKEN_ID, print_table, random_requests

_LOAD, _OUTPUT, _SERVER = "Load", "Output", "Server"


def _rates(text: str) -> list[float]:
    """`8` or `1,2,4,inf`."""
    try:
        rates = [float(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{text!r} is neither a number nor numbers with commas between.") from None
    if not all(rate > 0 for rate in rates):
        raise typer.BadParameter(f"{text!r} has a rate that is not above 0.")
    return rates


def bench_serve(
    more_goals: Annotated[list[str] | None, typer.Argument(metavar="GOAL", hidden=True)] = None,
    base_url: Annotated[
        str, typer.Option(help="With or without /v1; of any OpenAI-compatible server.", rich_help_panel=_SERVER)
    ] = "http://127.0.0.1:8000",
    model: Annotated[
        str | None, typer.Option("--model", "-m", show_default="the server's first", rich_help_panel=_SERVER)
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(envvar=["NANOVLLM_API_KEY", "OPENAI_API_KEY"], show_default=False, rich_help_panel=_SERVER),
    ] = None,
    ignore_eos: Annotated[
        bool,
        typer.Option(help="Outputs of full length; OpenAI's own servers do not know it.", rich_help_panel=_SERVER),
    ] = True,
    request_rate: Annotated[
        Any,
        typer.Option(
            parser=_rates,
            metavar="R[,R...]",
            help="Requests a second, at random moments; several are run one after another.",
            rich_help_panel=_LOAD,
        ),
    ] = "inf",
    max_concurrency: Annotated[
        int | None,
        typer.Option(min=1, show_default="no limit", help="Requests under way at most.", rich_help_panel=_LOAD),
    ] = None,
    num_prompts: Annotated[int, typer.Option(min=1, help="Requests for each rate.", rich_help_panel=_LOAD)] = 200,
    input_len: Annotated[
        Any,
        typer.Option(
            parser=length_range, metavar="N|LOW:HIGH", help="Prompt tokens, drawn uniformly.", rich_help_panel=_LOAD
        ),
    ] = "512",
    output_len: Annotated[
        Any,
        typer.Option(
            parser=length_range, metavar="N|LOW:HIGH", help="Output tokens, drawn uniformly.", rich_help_panel=_LOAD
        ),
    ] = "256",
    prompts: Annotated[
        Literal["ids", "text"],
        typer.Option(help="Random token ids, or their text by the server's tokenizer.", rich_help_panel=_LOAD),
    ] = "ids",
    max_token_id: Annotated[
        int | None,
        typer.Option(min=1, show_default="10000, if the server has so many", rich_help_panel=_LOAD),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of prompts and moments.", rich_help_panel=_LOAD)] = 0,
    goodput: Annotated[
        list[str] | None,
        typer.Option(
            show_default=False,
            metavar="GOAL...",
            help="Limits in ms, such as ttft:200 tpot:50 (also e2e); requests within all of them are counted.",
            rich_help_panel=_OUTPUT,
        ),
    ] = None,
    json_file: Annotated[
        Path | None,
        typer.Option(
            "--json",
            show_default=False,
            callback=check_folder,
            help="Write all figures there.",
            rich_help_panel=_OUTPUT,
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            show_default=False,
            callback=check_folder,
            help="Draw a picture there, such as load.png.",
            rich_help_panel=_OUTPUT,
        ),
    ] = None,
) -> None:
    """Sends random prompts to a server and prints latencies, throughput and goodput as its clients see them.

    [bold]Examples[/bold]

    \b
      nanovllm-jax bench serve --max-concurrency 32
      nanovllm-jax bench serve --request-rate 1,2,4,8 --goodput ttft:200 tpot:50 --plot load.png
      nanovllm-jax bench serve --base-url http://other:8000/v1 --model NAME --prompts text
    """  # noqa: D301
    _need("aiohttp", *(["matplotlib"] if plot else []))
    goals = parse_goals([*(goodput or []), *(more_goals or [])])
    from nanovllm_jax.loadtest.client import Target
    from nanovllm_jax.loadtest.drive import Load, Served, as_text, drive, find_model
    from nanovllm_jax.loadtest.figures import per_request, summarise

    card = {} if model and max_token_id else asyncio.run(find_model(base_url, api_key))
    target = Target(base_url, model or card["id"], api_key, ignore_eos)
    largest = max_token_id or min(MAX_TOKEN_ID, card.get("vocab_size", MAX_TOKEN_ID + 1) - 1)
    runs: list[Served] = []
    summaries: list[dict[str, Any]] = []
    for index, rate in enumerate(request_rate):
        ids, output_lens = random_requests(seed + index, num_prompts, input_len, output_len, largest)
        drawn = asyncio.run(as_text(target, ids)) if prompts == "text" else ids
        with stderr().status("") as status:

            def show(num_ended: int, rate: float = rate, status: Any = status) -> None:
                status.update(f"{rate:g} requests/s: {num_ended} of {num_prompts} ended")

            if not runs:
                asyncio.run(_try(target, drawn[0]))
            runs.append(asyncio.run(drive(target, drawn, output_lens, Load(rate, max_concurrency, seed + index), show)))
        summaries.append(summarise(runs[-1], goals))
        print_run(summaries[-1])
    if len(runs) > 1:
        print_sweep(summaries)
    result = {
        "url": base_url,
        "model": target.model,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "input_len": input_len,
        "output_len": output_len,
        "prompts": prompts,
        "seed": seed,
    }
    write(json.dumps({**result, "runs": summaries}) + "\n")
    if json_file:
        detailed = [{**one, "requests": per_request(run)} for one, run in zip(summaries, runs, strict=True)]
        json_file.write_text(json.dumps({**result, "runs": detailed}, indent=1) + "\n", encoding="utf-8")
        note(f"figures written to {json_file}")
    if plot:
        from nanovllm_jax.loadtest.plot import save_plot

        save_plot(runs, summaries, f"{target.model}: {_lengths(input_len)} in, {_lengths(output_len)} out", plot)
        note(f"picture drawn to {plot}")
    if all(one["num_failed"] == one["num_requests"] for one in summaries):
        raise typer.Exit(1)


def parse_goals(texts: Sequence[str]) -> dict[str, float]:
    """`["ttft:200", "tpot:50"]` as latency -> limit in ms.

    Raises:
        ConfigError: if one is written in another way.
    """
    from nanovllm_jax.loadtest.figures import GOALS

    goals = {}
    for text in " ".join(texts).replace(",", " ").split():
        name, _, limit = text.partition(":")
        try:
            goals[name] = float(limit)
        except ValueError:
            goals[name] = math.nan
        if name not in GOALS or not goals[name] > 0:
            raise ConfigError(f"The goal {text!r} is none; write {', '.join(GOALS)} and a limit in ms: ttft:200.")
    return goals


def print_run(summary: dict[str, Any]) -> None:
    """One run as a table of latencies and a line of rates."""
    from nanovllm_jax.loadtest.figures import LATENCIES, NAMES

    rows = []
    for name in LATENCIES:
        found = summary[f"{name}_ms"]
        numbers = [f"{found[key]:,.2f}" for key in ("mean", "median", "p99")] if found else ["–"] * 3
        rows.append([f"{name.upper()} ({NAMES[name]})", *numbers])
    print_table(_title(summary), ["ms", "mean", "median", "p99"], rows)
    note(
        f"{summary['req_s']:,.2f} requests/s, {summary['output_tok_s']:,.0f} output tok/s, "
        f"{summary['total_tok_s']:,.0f} tok/s with prompts, {summary['seconds']:.1f} s"
    )
    if summary["goodput_req_s"] is not None:
        goals = " ".join(f"{name}:{limit:g}" for name, limit in summary["goals_ms"].items())
        note(f"goodput {summary['goodput_req_s']:,.2f} requests/s within {goals}")
    if summary["num_failed"]:
        show_error(f"{summary['num_failed']} of {summary['num_requests']} requests failed: {summary['errors'][0]}")


def print_sweep(summaries: Sequence[dict[str, Any]]) -> None:
    """All runs as one table."""
    rows = []
    for one in summaries:
        latencies = [f"{one[key][what]:,.1f}" if one[key] else "–" for key, what in _SWEEP_COLUMNS.values()]
        good = "" if one["goodput_req_s"] is None else f"{one['goodput_req_s']:,.2f}"
        rows.append([str(one["request_rate"]), f"{one['req_s']:,.2f}", f"{one['output_tok_s']:,.0f}", *latencies, good])
    print_table("all rates", ["asked req/s", "req/s", "output tok/s", *_SWEEP_COLUMNS, "goodput"], rows)


_SWEEP_COLUMNS = {
    "TTFT p50 ms": ("ttft_ms", "median"),
    "TTFT p99 ms": ("ttft_ms", "p99"),
    "TPOT p50 ms": ("tpot_ms", "median"),
    "TPOT p99 ms": ("tpot_ms", "p99"),
}


async def _try(target: Any, prompt: Any) -> None:
    """One request that is not timed, so that a wrong address or model ends at once."""
    from nanovllm_jax.loadtest.client import complete, open_session

    async with open_session() as session:
        outcome = await complete(session, target, prompt, 1)
    if outcome.error is not None:
        raise NanoVLLMError(f"A first request to {target.root} failed: {outcome.error}")


def _title(summary: dict[str, Any]) -> str:
    rate, limit = summary["request_rate"], summary["max_concurrency"]
    parts = [f"{summary['num_requests']} requests", "all at once" if rate == "inf" else f"{rate:g} a second"]
    return ", ".join([*parts, *([f"at most {limit} under way"] if limit else [])])


def _lengths(bounds: tuple[int, int]) -> str:
    return str(bounds[0]) if bounds[0] == bounds[1] else f"{bounds[0]} to {bounds[1]}"


def _need(*packages: str) -> None:
    """Say which extra brings a package that is missing."""
    from importlib.util import find_spec

    for package in packages:
        if find_spec(package) is None:
            raise ConfigError(
                f"The load generator needs the package {package}: install nanovllm-jax[bench], or run with "
                "uv run --extra bench."
            )
