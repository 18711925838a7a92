"""Measures the kernels on the GPU at hand: `python benchmarks/kernels.py [--quick] [--record [DIR]]`.

A figure is a share of the device copy's rate, or a ratio to a peer (XLA, cuDNN) that does the same, all of one run of
this command. Times are those of the device, from a trace: from the start of a call's first kernel to the end of its
last one, merges and the gaps between kernels included. Programs run as captured graphs, peers at XLA's default
autotuning. `--quick` leaves out the products; `--plot` draws every case under the roofline, and writes the points
beside the picture for `chart.py roofline`, since machines that measure need not have matplotlib.
"""

import argparse
import json
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import kernel_cases
import kernel_timing  # before JAX starts its device
import results_log
from kernel_cases import Chain
from reporting import draw

from nanovllm_kernels.add_rms_norm.cases import BENCHMARKS as NORMS
from nanovllm_kernels.paged_decode.cases import BENCHMARKS as DECODES
from nanovllm_kernels.ragged_prefill.cases import BENCHMARKS as PREFILLS
from nanovllm_kernels.rope_cache_write.cases import BENCHMARKS as WRITES
from nanovllm_kernels.sample.cases import BENCHMARKS as DRAWS
from nanovllm_kernels.silu_mul.cases import BENCHMARKS as ACTIVATIONS
from nanovllm_kernels.skinny_matmul.cases import PRODUCTS

REACH = {
    "decode_bw_frac_uniform": 0.95,
    "decode_bw_frac_skewed": 0.85,
    "decode_bw_frac_one_row": 0.75,
    "decode_bw_frac_32q8kv": 0.95,
    "decode_fp8_bw_frac": 0.85,
    "prefill_vs_cudnn_4x4096": 0.9,
    "prefill_vs_cudnn_16x1024": 1.0,
    "prefill_vs_cudnn_prefix": 0.9,
    "cache_write_bw_frac": 0.85,
    "cache_write_vs_xla": 3.0,
    "add_rms_norm_bw_frac": 0.9,
    "silu_mul_bw_frac": 0.95,
    "sample_us_256x151936": 150.0,
    "skinny_vs_xla_geomean_06b": 1.6,
    "skinny_vs_xla_256rows_06b": 1.4,
    "skinny_vs_xla_geomean_8b": 1.2,
    "skinny_bw_frac_8b": 0.8,
}
PRODUCT_FIGURES = {
    "skinny_vs_xla_geomean_06b": ("qwen3_0_6b", (1, 8, 32, 64)),
    "skinny_vs_xla_256rows_06b": ("qwen3_0_6b", (128, 256)),
    "skinny_vs_xla_geomean_8b": ("qwen3_8b", (1, 8, 32, 64)),
}
# Bytes a second of a device copy, by kind of GPU, below which the machine is not fit to be measured on.
LEAST_COPY = {"NVIDIA H200": 4.1e12, "NVIDIA H100 80GB HBM3": 2.8e12}


@dataclass(frozen=True)
class Measured:
    """Seconds a call in each run."""

    chain: Chain
    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


class Bench:
    """Compiles and times chains; keeps what it measured."""

    def __init__(self, runs: int) -> None:
        self.runs = runs
        self.measured: list[Measured] = []
        self.pool = ThreadPoolExecutor(os.cpu_count())
        self.programs: dict[str, Future] = {}

    def prepare(self, *chains: Chain) -> None:
        """Begins to compile what does not need the device to itself for that."""
        for chain in chains:
            if chain.name not in self.programs and not chain.times_itself:
                self.programs[chain.name] = self.pool.submit(chain.lower().compile)

    def time(self, *chains: Chain, runs: int | None = None) -> list[Measured]:
        """Chains that are compared, run in turn."""
        self.prepare(*chains)
        programs = {chain.name: self.programs.pop(chain.name).result() for chain in chains if not chain.times_itself}
        found = self.measure(chains, programs, runs or self.runs)
        for each in found:
            gigabytes, teraflops = each.chain.moved / each.median / 1e9, each.chain.flops / each.median / 1e12
            print(
                f"{each.chain.name:62} {each.median * 1e6:8.2f} µs {gigabytes:6.0f} GB/s {teraflops:6.1f} TFLOP/s",
                flush=True,
            )
        self.measured += found
        return found

    def measure(self, chains: Sequence[Chain], programs: dict[str, Callable], runs: int) -> list[Measured]:
        calls = [_call(chain, programs.get(chain.name) or chain.lower().compile()) for chain in chains]
        for call in calls * 2:  # the driver loads a kernel at its first launch, XLA captures a graph at its second
            jax.block_until_ready(call())
        spans = kernel_timing.spans(calls * runs)
        return [
            Measured(chain, tuple(span / chain.calls for span in spans[i :: len(chains)]))
            for i, chain in enumerate(chains)
        ]


def _call(chain: Chain, program: Callable) -> Callable[[], object]:
    args = chain.fill()
    donated = list(args[: chain.donated])

    def call():
        results = program(*donated, *args[chain.donated :])
        donated[:] = results[: chain.donated] if chain.donated else []
        return results

    return call


Figure = tuple[str, Sequence[float], str]  # name, values, unit


def attention(bench: Bench, copy_rate: float) -> Iterator[Figure]:
    for case in DECODES:
        (ours,) = bench.time(kernel_cases.decode(case))
        name = "decode_fp8_bw_frac" if case.name == "fp8" else f"decode_bw_frac_{case.name}"
        yield name, _rates(ours, ours.chain.moved / copy_rate), "of copy"
    for case, name in zip(PREFILLS, ("16x1024", "4x4096", "prefix"), strict=True):
        chains = [kernel_cases.prefill(case, backend) for backend in ("mosaic", "triton")]
        ours, _, peer = bench.time(*chains, kernel_cases.prefill_cudnn(case))
        peer_rate = peer.chain.flops / peer.median
        yield f"prefill_vs_cudnn_{name}", _rates(ours, ours.chain.flops / peer_rate), "x cuDNN"


def cache(bench: Bench, copy_rate: float) -> Iterator[Figure]:
    ours, peer = bench.time(*(kernel_cases.cache_write(WRITES[-1], backend) for backend in ("triton", "xla")))
    yield "cache_write_bw_frac", _rates(ours, ours.chain.moved / copy_rate), "of copy"
    yield "cache_write_vs_xla", _rates(ours, peer.median), "x XLA"


def elementwise(bench: Bench, copy_rate: float) -> Iterator[Figure]:
    for name, make, case in (
        ("add_rms_norm_bw_frac", kernel_cases.add_norm, NORMS[0]),
        ("silu_mul_bw_frac", kernel_cases.activation, ACTIVATIONS[0]),
    ):
        ours, _ = bench.time(*(make(case, backend) for backend in ("triton", "xla")))
        yield name, _rates(ours, ours.chain.moved / copy_rate), "of copy"


def sample(bench: Bench, copy_rate: float) -> Iterator[Figure]:
    del copy_rate
    for case, name in zip(DRAWS, ("", "_top_p_alone", "_plain"), strict=False):
        (ours,) = bench.time(kernel_cases.draw(case))
        yield f"sample_us_256x151936{name}", [1e6 * each for each in ours.seconds], "µs"


def skinny(bench: Bench, copy_rate: float) -> Iterator[Figure]:
    for figure, (model, all_rows) in PRODUCT_FIGURES.items():
        cases = [replace(product, rows=rows) for rows in all_rows for product in PRODUCTS[model]]
        bench.prepare(*(kernel_cases.skinny(case, "triton") for case in cases))
        pairs = [bench.time(*(kernel_cases.skinny(case, backend) for backend in ("triton", "xla"))) for case in cases]
        ratios = [_rates(ours, peer.median) for ours, peer in pairs]
        yield figure, [statistics.geometric_mean(run) for run in zip(*ratios, strict=True)], "x XLA"
        if model == "qwen3_8b":
            one_row = [ours for case, (ours, _) in zip(cases, pairs, strict=True) if case.rows == 1]
            seconds = [sum(run) for run in zip(*(each.seconds for each in one_row), strict=True)]
            moved = sum(each.chain.moved for each in one_row)
            yield "skinny_bw_frac_8b", [moved / copy_rate / each for each in seconds], "of copy"


MEASURES = {"attention": attention, "cache": cache, "elementwise": elementwise, "sample": sample, "skinny": skinny}


def _rates(ours: Measured, at_one: float) -> list[float]:
    """Each run relative to the seconds that count as 1."""
    return [at_one / each for each in ours.seconds]


def ceilings(bench: Bench, device_kind: str) -> tuple[float, float]:
    """Bytes and operations a second that the device reaches now.

    Raises:
        SystemExit: if the copy is slower than it should be on this kind of GPU.
    """
    (copied,) = bench.time(kernel_cases.copy(), runs=20)
    copy_rate = copied.chain.moved / min(copied.seconds)
    least = LEAST_COPY.get(device_kind, 0.0)
    if copy_rate < least:
        raise SystemExit(
            f"the device copy reaches {copy_rate / 1e12:.2f} TB/s of {least / 1e12:.2f}: not a fit machine"
        )
    (product,) = bench.time(kernel_cases.product(), runs=20)
    return copy_rate, product.chain.flops / min(product.seconds)


def points(measured: Sequence[Measured]) -> list[dict]:
    """Every case with operations: operations a byte that has to move, operations a second."""
    return [
        {
            "name": each.chain.name,
            "intensity": each.chain.flops / each.chain.moved,
            "rate": each.chain.flops / each.median,
        }
        for each in measured
        if each.chain.flops
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", choices=MEASURES, default=list(MEASURES), help="groups of kernels, all by default"
    )
    parser.add_argument("--quick", action="store_true", help="under a minute: fewer runs, no products")
    parser.add_argument("--record", nargs="?", const=str(results_log.DEFAULT_FOLDER), help="folder to append to")
    parser.add_argument("--commit", help="hash to record where there is no git")
    parser.add_argument("--plot", type=Path, help="PNG to draw; needs matplotlib")
    options = parser.parse_args()
    device = jax.devices()[0]
    if device.platform != "gpu":
        raise SystemExit(f"needs an NVIDIA GPU, but the devices are {jax.devices()}")
    bench = Bench(3 if options.quick else 7)
    copy_rate, product_rate = ceilings(bench, device.device_kind)
    lines = []

    def add(name: str, values: Sequence[float], unit: str) -> None:
        about = results_log.measured_here()
        lines.append(results_log.figure_line(name, values, unit, None, **about, commit=options.commit))
        print(json.dumps(lines[-1]), flush=True)
        if options.record:
            results_log.append(lines[-1:], Path(options.record))

    add("device_copy_tb_s", [copy_rate / 1e12], "TB/s")
    add("bf16_product_tflop_s", [product_rate / 1e12], "TFLOP/s")
    for group in options.only:
        if not (options.quick and group == "skinny"):
            for figure in MEASURES[group](bench, copy_rate):
                add(*figure)
    if options.plot:
        roofline = {
            "device": device.device_kind,
            "copy_rate": copy_rate,
            "product_rate": product_rate,
            "points": points(bench.measured),
        }
        options.plot.with_suffix(".json").write_text(json.dumps(roofline))
        draw("roofline", roofline, options.plot)
    print(f"\n{device.device_kind}: device copy {copy_rate / 1e12:.2f} TB/s, product {product_rate / 1e12:.0f} TFLOP/s")
    for line in lines:
        reach = REACH.get(line["figure"])
        print(f"{line['figure']:32} {line['value']:8.3f} {line['unit']:8} reach {'' if reach is None else reach}")


if __name__ == "__main__":
    main()
