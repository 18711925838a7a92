"""Measures the kernels on the GPU at hand: `python benchmarks/kernels.py [--quick] [--record [DIR]]`.

A figure is a share of the device copy's rate, or a ratio to a peer (XLA, cuDNN) that does the same, all of one run of
this command. Times are those of the device, from a trace: from the start of a call's first kernel to the end of its
last one, merges and the gaps between kernels included. Programs run as captured graphs, peers at XLA's default
autotuning. `--quick` leaves out what waits for XLA to try kernels for every product; `--plot` draws every case under
the roofline, and writes the points beside the picture for `chart.py roofline`, since machines that measure need not
have matplotlib.
"""

import argparse
import itertools
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

import jax
import kernel_cases
import kernel_timing  # before JAX starts its device
import results_log
from kernel_cases import Chain
from kernel_figures import MEASURES, Measured
from reporting import draw

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
# Bytes a second of a device copy, by kind of GPU, below which the machine is not fit to be measured on.
LEAST_COPY = {"NVIDIA H200": 4.1e12, "NVIDIA H100 80GB HBM3": 2.8e12}


class Bench:
    """Compiles and times chains; keeps what it measured."""

    def __init__(self, runs: int) -> None:
        self.runs = runs
        self.measured: list[Measured] = []
        self.pool = ThreadPoolExecutor(min(16, len(os.sched_getaffinity(0))))
        self.compiled: dict[str, tuple[Future | None, Future]] = {}

    def prepare(self, *chains: Chain) -> None:
        """Compiles in threads: what makes arguments, and programs that do not need the device to themselves for that.

        Returns when all is done: nothing else goes on while something is measured.
        """
        for chain in chains:
            if chain.name not in self.compiled:
                program = None if chain.times_itself else self.pool.submit(_compile, chain.lower)
                self.compiled[chain.name] = program, self.pool.submit(_compile, jax.jit(chain.fill).lower)
        wait([future for pair in self.compiled.values() for future in pair if future])

    def time(self, *chains: Chain, runs: int | None = None) -> list[Measured]:
        """Chains that are compared, run in turn."""
        self.prepare(*chains)
        calls = [_call(chain, *self.compiled.pop(chain.name)) for chain in chains]
        for call in calls * 2:  # the driver loads a kernel at its first launch, XLA captures a graph at its second
            jax.block_until_ready(call())
        spans = kernel_timing.spans(calls * (runs or self.runs))
        found = [
            Measured(chain, tuple(span / chain.calls for span in spans[i :: len(chains)]))
            for i, chain in enumerate(chains)
        ]
        for each in found:
            gigabytes, teraflops = each.chain.moved / each.median / 1e9, each.chain.flops / each.median / 1e12
            print(
                f"{each.chain.name:62} {each.median * 1e6:8.2f} µs {gigabytes:6.0f} GB/s {teraflops:6.1f} TFLOP/s",
                flush=True,
            )
        self.measured += found
        return found


def _compile(lower: Callable[[], jax.stages.Lowered]) -> jax.stages.Compiled:
    return lower().compile()


def _call(chain: Chain, program: Future | None, fill: Future) -> Callable[[], object]:
    compiled = _compile(chain.lower) if program is None else program.result()
    args = fill.result()()
    donated = list(args[: chain.donated])

    def call():
        results = compiled(*donated, *args[chain.donated :])
        donated[:] = results[: chain.donated] if chain.donated else []
        return results

    return call


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
    parser.add_argument("--quick", action="store_true", help="under a minute: fewer runs, no products beside XLA's")
    parser.add_argument("--record", nargs="?", const=str(results_log.DEFAULT_FOLDER), help="folder to append to")
    parser.add_argument("--commit", help="hash to record where there is no git")
    parser.add_argument("--plot", type=Path, help="PNG to draw; needs matplotlib")
    options = parser.parse_args()
    device = jax.devices()[0]
    if device.platform != "gpu":
        raise SystemExit(f"needs an NVIDIA GPU, but the devices are {jax.devices()}")
    bench = Bench(3 if options.quick else 7)
    comparisons = [each for group in options.only for each in MEASURES[group]() if each.quick or not options.quick]
    bench.prepare(*(chain for each in comparisons for chain in each.chains))
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
    for each in comparisons:
        batches = itertools.batched(each.chains, each.in_turn or len(each.chains))
        found = [one for batch in batches for one in bench.time(*batch)]
        for figure in each.figures(found, copy_rate):
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
