"""The roofline of a case: what an ideal scheduler would need, from a model's config and measured ceilings.

    python benchmarks/limit.py --model qwen3-0.6b                 # every case, bf16 and fp8 cache, on an H200
    python benchmarks/limit.py --gpu H100
    python benchmarks/limit.py --model DIR --ceilings 1.8 290     # another GPU: TB/s and TFLOP/s measured there

All prompts are computed in one step, then every row gives a token a step until it has its length, with memory for
all. A step takes what is slower, its bytes or its floating-point operations:

- bytes: each weight once (the head too, the embedding's rows not), and the keys and values that decode rows attend
  over, at their contexts of that moment;
- operations: two a weight and token, the head only for tokens that are sampled from, and four a head's dimension for
  each pair of a query and a key that it sees.

Norms, activations, sampling, launches and the host are not counted, so nothing reaches this. A shared prefix is
computed once, token by token.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from nanovllm_jax.loadtest.offline import Requests


@dataclass(frozen=True)
class Ceilings:
    """What a device was measured to reach: bytes a second (copy, read + write), bf16 operations a second."""

    bytes_per_s: float
    flops_per_s: float

    def seconds(self, num_bytes: float, flops: float) -> float:
        """What is slower of both."""
        return max(num_bytes / self.bytes_per_s, flops / self.flops_per_s)

    def of_devices(self, count: int) -> Ceilings:
        """`count` devices that share the work evenly, communication not counted."""
        return replace(self, bytes_per_s=count * self.bytes_per_s, flops_per_s=count * self.flops_per_s)


# By device kind: a device copy of 2 to 4 GiB, and the largest bf16 product (8192 cubed).
MEASURED = {"NVIDIA H200": Ceilings(4.3e12, 790e12), "NVIDIA H100 80GB HBM3": Ceilings(2.94e12, 784e12)}


@dataclass(frozen=True)
class Shape:
    """What a dense decoder-only transformer moves and computes.

    Attributes:
        layer_params: weights of the products of all layers.
        head_params: weights of the head.
        weight_bytes: of one weight.
        kv_bytes: of the keys and values of one token, all layers.
        pair_flops: operations of one query and one key that it sees, all layers and heads.
    """

    layer_params: int
    head_params: int
    weight_bytes: int
    kv_bytes: int
    pair_flops: int

    @property
    def step_bytes(self) -> int:
        """Weights that every step reads."""
        return self.weight_bytes * (self.layer_params + self.head_params)

    def flops(self, num_tokens: int, num_sampled: int, num_pairs: float) -> float:
        """Of one step."""
        return 2 * (num_tokens * self.layer_params + num_sampled * self.head_params) + num_pairs * self.pair_flops


def shape_of(config: Mapping[str, Any], *, kv_cache_bytes: int = 2) -> Shape:
    """From a Hugging Face config (Qwen3, Qwen2, Llama, Mistral); weights are bf16, `kv_cache_bytes` an element."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    kv_heads, layers = config.get("num_key_value_heads") or heads, config["num_hidden_layers"]
    attention = hidden * head_dim * (2 * heads + 2 * kv_heads)
    return Shape(
        layer_params=layers * (attention + 3 * hidden * config["intermediate_size"]),
        head_params=hidden * config["vocab_size"],
        weight_bytes=2,
        kv_bytes=layers * 2 * kv_heads * head_dim * kv_cache_bytes,
        pair_flops=layers * 4 * heads * head_dim,
    )


def kv_cache_bytes(options: Mapping[str, object]) -> int:
    """Of an element of the cache, with these arguments of LLM."""
    return 1 if str(options.get("kv_cache_dtype")).startswith("fp8") else 2


def prefill_seconds(shape: Shape, ceilings: Ceilings, spans: Sequence[tuple[int, int]]) -> float:
    """One step that computes positions [start, end) of each prompt and samples once from each."""
    tokens = sum(end - start for start, end in spans)
    pairs = sum((end * (end + 1) - start * (start + 1)) / 2 for start, end in spans)
    cached = sum(start for start, _ in spans)
    return ceilings.seconds(
        shape.step_bytes + (cached + tokens) * shape.kv_bytes, shape.flops(tokens, len(spans), pairs)
    )


def decode_seconds(shape: Shape, ceilings: Ceilings, num_rows: int, context: int) -> float:
    """One step of `num_rows` tokens that attend over `context` tokens together."""
    return ceilings.seconds(shape.step_bytes + context * shape.kv_bytes, shape.flops(num_rows, num_rows, context))


def case_seconds(shape: Shape, ceilings: Ceilings, requests: Requests, *, share_prefixes: bool = True) -> float:
    """All steps of a case."""
    prompts, output_lens = requests
    starts = computed_from(prompts) if share_prefixes else [0] * len(prompts)
    spans = [(start, len(prompt)) for start, prompt in zip(starts, prompts, strict=True)]
    seconds = prefill_seconds(shape, ceilings, spans)
    return seconds + sum(decode_seconds(shape, ceilings, *step) for step in decode_steps(prompts, output_lens))


def decode_steps(prompts: Sequence[Sequence[int]], output_lens: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Rows and the sum of their contexts of each step after the prompts', which gave the first tokens."""
    lengths, outputs = np.array([len(prompt) for prompt in prompts]), np.array(output_lens)
    for step in range(1, outputs.max()):
        running = outputs > step
        rows = int(running.sum())
        yield rows, int(lengths[running].sum()) + rows * step


def computed_from(prompts: Sequence[Sequence[int]], block_size: int = 1) -> list[int]:
    """Of each prompt, how many of its first tokens an earlier one shares, in whole blocks and never all of them."""
    starts = []
    for i, prompt in enumerate(prompts):
        shared = max((_equal_ids(prompt, earlier) for earlier in prompts[:i]), default=0)
        starts.append(min(shared, len(prompt) - 1) // block_size * block_size)
    return starts


def _equal_ids(first: Sequence[int], second: Sequence[int]) -> int:
    """How many ids both begin with."""
    differing = (i for i, (one, other) in enumerate(zip(first, second, strict=False)) if one != other)
    return next(differing, min(len(first), len(second)))


def add_ceilings_argument(parser: argparse.ArgumentParser) -> None:
    """`--ceilings`, for devices that `MEASURED` does not know."""
    parser.add_argument(
        "--ceilings",
        nargs=2,
        type=float,
        metavar=("TB/S", "TFLOP/S"),
        help=f"this device's measured copy bandwidth and bf16 products (known: {', '.join(MEASURED)})",
    )


def ceilings_for(device: str, given: Sequence[float] | None) -> Ceilings | None:
    """Those that were given, else those measured on this kind of device, else None."""
    if given:
        return Ceilings(given[0] * 1e12, given[1] * 1e12)
    return MEASURED.get(device)


def main() -> None:
    """Prints the limits of all cases."""
    import results_log
    from models import MODELS, config_of
    from workloads import CASES

    from nanovllm_jax.loadtest.offline import print_table

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen3-0.6b", help=f"{', '.join(MODELS)} or a model's directory")
    parser.add_argument("--repeats", type=int, default=3, help="draws of each case")
    by_name = {kind.split()[1]: kind for kind in MEASURED}
    parser.add_argument("--gpu", default="H200", choices=by_name, help="whose measured ceilings")
    add_ceilings_argument(parser)
    args = parser.parse_args()
    ceilings, config = ceilings_for(by_name[args.gpu], args.ceilings), config_of(args.model)
    rows = []
    for case in CASES:
        shape = shape_of(config, kv_cache_bytes=kv_cache_bytes(case.options))
        for figure in case.figures:
            limits = [figure.limit(shape, ceilings, case.draw(case.first_seed + i)) for i in range(args.repeats)]
            rows.append([figure.name, figure.unit, *map(results_log.number, limits)])
    rates = f"{ceilings.bytes_per_s / 1e12:g} TB/s, {ceilings.flops_per_s / 1e12:g} TFLOP/s"
    title = f"{args.model}, {'given' if args.ceilings else by_name[args.gpu]}: {rates}"
    print_table(title, ["limit", "unit", *(f"draw {i}" for i in range(args.repeats))], rows)


if __name__ == "__main__":
    main()
