"""What `kernels.py` compares, and the figures that come of it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import kernel_cases
from kernel_cases import Chain

from nanovllm_kernels.add_rms_norm.cases import BENCHMARKS as NORMS
from nanovllm_kernels.paged_decode.cases import BENCHMARKS as DECODES
from nanovllm_kernels.ragged_prefill.cases import BENCHMARKS as PREFILLS
from nanovllm_kernels.rope_cache_write.cases import BENCHMARKS as WRITES
from nanovllm_kernels.sample.cases import BENCHMARKS as DRAWS
from nanovllm_kernels.sample_head.cases import BENCHMARKS as HEADS
from nanovllm_kernels.silu_mul.cases import BENCHMARKS as ACTIVATIONS
from nanovllm_kernels.skinny_matmul.cases import PRODUCTS

PRODUCT_FIGURES = {
    "skinny_vs_xla_geomean_06b": ("qwen3_0_6b", (1, 8, 32, 64)),
    "skinny_vs_xla_256rows_06b": ("qwen3_0_6b", (128, 256)),
    "skinny_vs_xla_geomean_8b": ("qwen3_8b", (1, 8, 32, 64)),
}


@dataclass(frozen=True)
class Measured:
    """Seconds a call in each run."""

    chain: Chain
    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


Figure = tuple[str, Sequence[float], str]  # name, values, unit


@dataclass(frozen=True)
class Comparison:
    """Chains that are compared, and the figures that they give.

    Attributes:
        figures: of what was measured, in the order of the chains, and of the copy's bytes a second.
        in_turn: chains that are run in turn; None means all.
        quick: whether it is part of `--quick`.
    """

    chains: tuple[Chain, ...]
    figures: Callable[[Sequence[Measured], float], list[Figure]]
    in_turn: int | None = None
    quick: bool = True


def of_copy(name: str, *chains: Chain) -> Comparison:
    """The first chain's share of the copy's rate."""
    return Comparison(chains, lambda found, copy_rate: [(name, _fractions(found[0], copy_rate), "of copy")])


def attention() -> Iterator[Comparison]:
    for case in DECODES:
        name = "decode_fp8_bw_frac" if case.name == "fp8" else f"decode_bw_frac_{case.name}"
        yield of_copy(name, kernel_cases.decode(case))
    for case, name in zip(PREFILLS, ("16x1024", "4x4096", "prefix"), strict=True):
        ours = [kernel_cases.prefill(case, backend) for backend in ("mosaic", "triton")]
        yield Comparison((*ours, kernel_cases.prefill_cudnn(case)), partial(_against_cudnn, f"prefill_vs_cudnn_{name}"))


def _against_cudnn(name: str, found: Sequence[Measured], copy_rate: float) -> list[Figure]:
    """By operations a second."""
    del copy_rate
    ours, _, peer = found
    peer_rate = peer.chain.flops / peer.median
    return [(name, _rates(ours, ours.chain.flops / peer_rate), "x cuDNN")]


def cache() -> Iterator[Comparison]:
    def figures(found: Sequence[Measured], copy_rate: float) -> list[Figure]:
        ours, peer = found
        return [
            ("cache_write_bw_frac", _fractions(ours, copy_rate), "of copy"),
            ("cache_write_vs_xla", _rates(ours, peer.median), "x XLA"),
        ]

    yield Comparison(tuple(kernel_cases.cache_write(WRITES[-1], backend) for backend in ("triton", "xla")), figures)


def elementwise() -> Iterator[Comparison]:
    for name, make, case in (
        ("add_rms_norm_bw_frac", kernel_cases.add_norm, NORMS[0]),
        ("silu_mul_bw_frac", kernel_cases.activation, ACTIVATIONS[0]),
    ):
        yield of_copy(name, *(make(case, backend) for backend in ("triton", "xla")))


def sample() -> Iterator[Comparison]:
    def microseconds(name: str, found: Sequence[Measured], copy_rate: float) -> list[Figure]:
        del copy_rate
        return [(name, [1e6 * each for each in found[0].seconds], "µs")]

    for case, name in zip(DRAWS, ("", "_top_p_alone", "_plain"), strict=False):
        yield Comparison((kernel_cases.draw(case),), partial(microseconds, f"sample_us_256x151936{name}"))
    for case in HEADS:
        name = f"sample_head_us_{case.num_rows}x{case.vocab_size}"
        yield Comparison((kernel_cases.draw_from_head(case),), partial(microseconds, name))


def skinny() -> Iterator[Comparison]:
    def all_of_copy(found: Sequence[Measured], copy_rate: float) -> list[Figure]:
        seconds = [sum(run) for run in zip(*(each.seconds for each in found), strict=True)]
        moved = sum(each.chain.moved for each in found)
        return [("skinny_bw_frac_8b", [moved / copy_rate / each for each in seconds], "of copy")]

    def against_xla(name: str, found: Sequence[Measured], copy_rate: float) -> list[Figure]:
        del copy_rate
        ratios = [_rates(ours, peer.median) for ours, peer in zip(found[::2], found[1::2], strict=True)]
        return [(name, [statistics.geometric_mean(run) for run in zip(*ratios, strict=True)], "x XLA")]

    one_row = [kernel_cases.skinny(replace(product, rows=1), "triton") for product in PRODUCTS["qwen3_8b"]]
    yield Comparison(tuple(one_row), all_of_copy, in_turn=1)
    for name, (model, all_rows) in PRODUCT_FIGURES.items():
        cases = [replace(product, rows=rows) for rows in all_rows for product in PRODUCTS[model]]
        chains = tuple(kernel_cases.skinny(case, backend) for case in cases for backend in ("triton", "xla"))
        yield Comparison(chains, partial(against_xla, name), in_turn=2, quick=False)


MEASURES = {"attention": attention, "cache": cache, "elementwise": elementwise, "sample": sample, "skinny": skinny}


def _rates(ours: Measured, at_one: float) -> list[float]:
    """Each run relative to the seconds that count as 1."""
    return [at_one / each for each in ours.seconds]


def _fractions(ours: Measured, copy_rate: float) -> list[float]:
    return _rates(ours, ours.chain.moved / copy_rate)
