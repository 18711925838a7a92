"""Tunes launch parameters on the GPU at hand: `python benchmarks/tune_kernels.py skinny_matmul [--time-limit 60]`.

Every product of the chosen models at every bucket of rows is timed with about ten launches, beside XLA's version of
the same (norm, product, addition or activation). A run is one compiled chain of calls over copies of the weight that
together are several times the L2 cache; its time is that of the device, from a trace, and the best of several runs
counts. The winners replace those of the same shapes
in `kernels/nanovllm_kernels/skinny_matmul/tuning/<GPU>.json`; nothing is ever tuned while a model runs. When the time
is up the remaining shapes keep what they had.
"""

import argparse
import itertools
import math
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import kernel_timing  # before JAX starts its device
import results_log

from nanovllm_kernels import split_counters
from nanovllm_kernels._compat import current_target, import_jax_triton
from nanovllm_kernels._integers import ceil_div, next_power_of_2
from nanovllm_kernels._mosaic import CONSUMER_ROWS, CONSUMERS, ROW_ALIGNMENT
from nanovllm_kernels.add_shards import parts_of_row
from nanovllm_kernels.skinny_matmul import has_mosaic_kernel, passes_on
from nanovllm_kernels.skinny_matmul import launch as launches
from nanovllm_kernels.skinny_matmul.cases import PRODUCTS, SkinnyCase, as_in_a_layer, product_of
from nanovllm_kernels.skinny_matmul.launch import LEAST_COLUMNS, MOST_CLUSTERS, TILE_ROWS, Entry, Launch, Tiling
from nanovllm_kernels.skinny_matmul.mosaic_shape import shape_of as shape_of_product

ROWS = (1, 16, 32, 64, 128, 256)
ROTATED_BYTES = 300e6  # of weights in a chain: six times the L2 of an H100
PASSED_ON_COLUMNS = 16  # that a program finishes of a product that passes on sums of squares
MAX_CALLS, MIN_CALLS, RUNS = 48, 8, 4
MAX_CANDIDATES, MAX_TILINGS = 20, 5


@dataclass(frozen=True)
class Timed:
    """Best seconds a call."""

    launch: Launch | Tiling
    seconds: float
    in_kernel_merge: bool = True


def candidates(case: SkinnyCase) -> list[Launch]:
    """Launches worth a try: about one program or two for each multiprocessor, and most of its K in flight."""
    target, gate = current_target(), 1 + case.gated
    default = launches.default_launch(target, **shape_of(case))
    found, doubled = [], []
    if case.rows == 1:
        sizes = ((128, 4), (256, 8), (32, 2))
        shapes = [(1, cols // gate, inputs, warps) for cols in (32, 64, 128) for inputs, warps in sizes]
        shapes += [(16, cols, 128, 4) for cols in (32, 64)]
    elif case.rows <= 32:
        rows = max(16, next_power_of_2(case.rows))
        shapes = [(rows, cols, inputs, 4) for cols in (32, 64) for inputs in (64, 128, 256)]
        shapes += [(rows, 128 // gate, 64, 4), (rows, 64, 128, 8)]
    else:
        shapes = [(64, cols, inputs, 4) for cols in (32, 64, 128) for inputs in (64, 128)]
        shapes += [(128, cols, 64, warps) for cols in (64, 128) for warps in (4, 8) if case.rows > 64]
    for rows, cols, inputs, warps in shapes:
        tiles = ceil_div(case.rows, rows) * ceil_div(case.outputs, max(16, cols))
        # The power of two that brings the programs nearest to the multiprocessors, and where it helps twice that.
        nearest = 2 ** max(0, round(math.log2(target.multiprocessors / tiles)))
        tries = [(nearest, found), (2 * nearest, doubled)]
        for splits, into in tries if tiles < 2 * target.multiprocessors else tries[:1]:
            if splits > 1 and case.inputs // splits < 128:
                continue
            one = Launch(rows, max(16, cols), inputs, splits, warps, 1)
            fitting = target.shared_bytes * 7 // 8 // one.stage_bytes(gated=case.gated, w_bytes=2)
            stages = min(8, fitting, ceil_div(case.inputs, splits * inputs) + 1)
            if stages >= 2:
                into.append(replace(one, num_stages=stages))
    found += doubled
    # Stable: among launches that fill the chip once or twice, those that split less come first.
    found.sort(key=lambda one: max(0.6, abs(math.log2(programs(case, one) / (1.4 * target.multiprocessors)))))
    # Wgmma takes 64 columns of the weight as its long side where there are fewer rows than that.
    swapped = [replace(one, swap=True) for one in found if 16 <= one.tile_rows < 64 and one.tile_cols >= 64][:6]
    return list(dict.fromkeys([default, *swapped, *found]))[:MAX_CANDIDATES]


def tilings(case: SkinnyCase) -> list[Tiling]:
    """Of the Mosaic kernel, where it runs: one program for most multiprocessors, rings as deep as they fit."""
    if case.rows < ROW_ALIGNMENT or not has_mosaic_kernel():
        return []
    target, found = current_target(), []
    # Rows past the end cost as much as others: few rows have the smallest tile that holds them all.
    large_enough = [rows for rows in TILE_ROWS if rows >= min(case.rows, CONSUMER_ROWS)]
    tile_rows = large_enough[: 1 + (case.rows > CONSUMER_ROWS)]
    shapes = itertools.product(tile_rows, (16, 32, 48, 64, 96, 128), (64, 128))
    for rows, cols, inputs in shapes:
        one = Tiling(rows, cols, inputs, 2 * CONSUMERS)
        # Outputs and norm, float32 sums where the consumers divide the inputs, and x where 64 rows are read of fewer.
        whole = max(rows, CONSUMER_ROWS)
        others = (
            2 * whole * cols * (1 + case.residual)
            + 2 * case.inputs
            + one.splits_inputs * 4 * whole * cols * (1 + case.gated)
        )
        others += 2 * (whole - rows) * inputs
        # 4 KB for barriers, and for arrays that begin at multiples of 1 KB.
        fitting = (target.shared_bytes - 4096 - others) // one.stage_bytes(gated=case.gated)
        stages = min(12, fitting, case.inputs // inputs) // CONSUMERS * CONSUMERS
        fits = one.fits(rows=case.rows, inputs=case.inputs, outputs=case.outputs)
        if fits and stages >= 2 * CONSUMERS and tiles_of(case, one) <= target.multiprocessors:
            found.append(replace(one, num_stages=stages))
    found = sorted(found, key=lambda one: -tiles_of(case, one))[:MAX_TILINGS]
    ours = in_the_engine(case)
    return found + [other for one in found for other in split_over_clusters(ours, one) + in_pieces(ours, one)]


def split_over_clusters(case: SkinnyCase, one: Tiling) -> list[Tiling]:
    """The same with K split, where the kernel does that; only clusters that run at once fit."""
    if case.gated or case.norm:
        return []
    tries = [replace(one, splits=splits) for splits in MOST_CLUSTERS if one.tile_cols % (splits * LEAST_COLUMNS) == 0]
    return [one for one in tries if one.fits(rows=case.rows, inputs=case.inputs, outputs=case.outputs)]


def in_pieces(case: SkinnyCase, one: Tiling) -> list[Tiling]:
    """The same with tiles of w in two pieces, where the kernel takes them so."""
    if not one.splits_columns:
        return []
    arrays, (w, *_) = shapes_of(case)
    given = dict.fromkeys(("norm", "bias", "residual", "squares", "next_norm")) | arrays
    in_two = replace(one, pieces=2)
    return [in_two] if len(shape_of_product(w=w, tiling=in_two, **given).pieces) == 2 else []


def tiles_of(case: SkinnyCase, one: Launch | Tiling) -> int:
    return ceil_div(case.rows, one.tile_rows) * ceil_div(case.outputs, one.tile_cols)


def programs(case: SkinnyCase, one: Launch) -> int:
    return tiles_of(case, one) * one.splits


def shape_of(case: SkinnyCase) -> dict:
    return {
        "rows": case.rows,
        "inputs": case.inputs,
        "outputs": case.outputs,
        "gated": case.gated,
        "w_bytes": 2,
    }


def key_of(case: SkinnyCase) -> dict:
    return shape_of(case) | {"normed": case.norm}


def xla_product(arrays, w):
    """The same as a model without fused kernels writes it: every step in the operands' dtype."""
    x = arrays["x"]
    if "norm" in arrays:
        wide = x.astype(jnp.float32)
        x = (wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + 1e-6)).astype(x.dtype) * arrays["norm"]
    y = jnp.einsum("mk,kzn->mzn" if w.ndim == 3 else "mk,kn->mn", x, w)
    if w.ndim == 3:
        y = jax.nn.silu(y[:, 0]) * y[:, 1]
    return y + arrays["residual"] if "residual" in arrays else y


def in_the_engine(case: SkinnyCase) -> SkinnyCase:
    """The product as a model runs it: products, or sums over shards, pass on what the one after a norm takes."""
    shards = shards_with(case)
    if shards > 1:
        x = jax.ShapeDtypeStruct((case.rows, case.inputs), case.dtype)
        return replace(case, norm=False, scaled=True) if case.norm and parts_of_row(x, shards) else case
    width = case.outputs if case.residual else case.inputs
    hidden = jax.ShapeDtypeStruct((case.rows, width), case.dtype)
    return as_in_a_layer(case) if passes_on(hidden) else case


def shards_with(case: SkinnyCase) -> int:
    """Over how many shards a model is split that has such a product; 1 if it is whole."""
    same = lambda each: (each.name, each.inputs, each.outputs) == (case.name, case.inputs, case.outputs)  # noqa: E731
    models = [model for model, products in PRODUCTS.items() if any(map(same, products))]
    return min(int(model.rpartition("_tp")[2]) if "_tp" in model else 1 for model in models)


def shapes_of(case: SkinnyCase):
    """Arguments but the weight, and the copies of the weight, as shapes."""
    of = lambda *shape: jax.ShapeDtypeStruct(shape, case.dtype)  # noqa: E731
    arrays = {"x": of(case.rows, case.inputs)}
    if case.norm:
        arrays["norm"] = of(case.inputs)
    if case.scaled:
        shards = shards_with(case)
        parts = parts_of_row(arrays["x"], shards) if shards > 1 else ceil_div(case.inputs, PASSED_ON_COLUMNS)
        arrays["squares"] = jax.ShapeDtypeStruct((parts, launches.padded_rows(case.rows)), jnp.float32)
    if case.residual:
        arrays["residual"] = of(case.rows, case.outputs)
    if case.next_norm:
        arrays["next_norm"] = of(case.outputs)
    copies = max(2, min(MAX_CALLS, round(ROTATED_BYTES / (2 * math.prod(case.w_shape)))))
    return arrays, [of(*case.w_shape)] * copies


def device_arrays(case: SkinnyCase):
    """The same filled with normal numbers, so that outputs are of the order of 1."""
    arrays, weights = shapes_of(case)
    keys = iter(jax.random.split(jax.random.key(0), 1 + len(arrays)))
    arrays = {name: jax.random.normal(next(keys), array.shape, array.dtype) for name, array in arrays.items()}
    if case.scaled:
        arrays["squares"] = jnp.full_like(arrays["squares"], case.inputs / len(arrays["squares"]))
    w = jax.random.normal(next(keys), case.w_shape, case.dtype) * jnp.asarray(case.inputs**-0.5, case.dtype)
    return arrays, [w + 0 for _ in weights]


def chain_of(call):
    """A function of a call for each copy of the weight, over again where the copies are few."""

    @jax.jit
    def one(arrays, w, counters):
        ref = jax.new_ref(counters)
        return call(arrays, w, ref), jax.freeze(ref)

    def chain(arrays, weights):
        counters, results = split_counters(), []
        for w in weights * repeats(weights):
            if results:  # else XLA would run calls with equal weights once, and the norm of equal x once for all
                x, w, _ = jax.lax.optimization_barrier((arrays["x"], w, results[-1]))
                arrays = arrays | {"x": x}
            result, counters = one(arrays, w, counters)
            results.append(result)
        return results

    return chain


def trace_chain(call, case: SkinnyCase):
    return jax.jit(chain_of(call)).trace(*shapes_of(case))


def repeats(weights) -> int:
    return ceil_div(MIN_CALLS, len(weights))


def call_with(one: Launch | Tiling, in_kernel_merge: bool):
    """A call whose launch is fixed while it is traced."""
    import_jax_triton()

    def call(arrays, w, counters):
        chosen, launches.launch_parameters = launches.launch_parameters, lambda *_, **__: one
        try:
            return product_of(arrays | {"w": w}, counters=counters if in_kernel_merge else None, backend="triton")
        finally:
            launches.launch_parameters = chosen

    return call


def tune(case: SkinnyCase, pool: ThreadPoolExecutor) -> tuple[list[Timed], float]:
    """All candidates, best first, and XLA's seconds."""
    launches_tried = candidates(case)
    takes = (lambda _: True) if has_mosaic_kernel() else None
    now = launches.launch_parameters(current_target(), **key_of(case), takes=takes)
    wanted = [(one, True) for one in dict.fromkeys([now, *launches_tried])]
    # What the merge inside the kernel is worth: the first that splits, with a second kernel instead.
    wanted += [(one, False) for one in launches_tried if isinstance(one, Launch) and one.splits > 1][:1]
    wanted += [(one, True) for one in tilings(case) if one != now]
    # Tracing holds Python's lock; Triton, XLA and ptxas run in threads.
    ours = in_the_engine(case)
    futures = [pool.submit(trace_chain(call_with(*each), ours).lower().compile) for each in wanted]
    compiled = {}
    for each, future in zip(wanted, futures, strict=True):
        if (error := future.exception()) is None:
            compiled[each] = future.result()
        else:
            print(f"  {each[0]} failed: {error}", flush=True)
    return measure(case, compiled)


def measure(case: SkinnyCase, compiled: dict) -> tuple[list[Timed], float]:
    """Best seconds a call of each program, and of XLA's, which is compiled here: it times its products by itself."""
    (arrays, weights), (plain, _) = device_arrays(in_the_engine(case)), device_arrays(case)
    xla = trace_chain(lambda arrays, w, _: xla_product(arrays, w), case).lower().compile()
    runs = [lambda program=program: program(arrays, weights) for program in compiled.values()]
    runs.append(lambda: xla(plain, weights))
    for run in runs * 2:  # the driver loads a kernel at its first launch, XLA captures a graph at its second
        jax.block_until_ready(run())
    spans = kernel_timing.spans(runs * RUNS)
    calls = len(weights) * repeats(weights)
    *seconds, xla_seconds = [min(spans[i :: len(runs)]) / calls for i in range(len(runs))]
    timed = [Timed(one, each, merge) for (one, merge), each in zip(compiled, seconds, strict=True)]
    return sorted(timed, key=lambda each: each.seconds), xla_seconds


def report(model: str, case: SkinnyCase, timed: list[Timed], xla: float, *, verbose: bool) -> Timed:
    """Prints a shape's line and returns its best candidate that merges inside the kernel."""
    best = next(each for each in timed if each.in_kernel_merge)
    moved = 2 * (math.prod(case.w_shape) + case.rows * (case.inputs + case.outputs * (1 + case.residual)))
    line = f"{model} {case.name} x {case.rows}"
    print(
        f"{line:24} {best.seconds * 1e6:7.2f} µs, XLA {xla * 1e6:7.2f}: {xla / best.seconds:5.2f} x "
        f"{moved / best.seconds / 1e9:6.0f} GB/s  {short(best)}",
        flush=True,
    )
    for each in timed if verbose else [each for each in timed if not each.in_kernel_merge]:
        print(f"{'':24} {each.seconds * 1e6:7.2f} µs  {short(each)}", flush=True)
    return best


def short(each: Timed) -> str:
    one = each.launch
    tile = f"{one.tile_rows} x {one.tile_cols} x {one.tile_inputs}"
    if isinstance(one, Tiling):
        return f"{tile}, {one.num_stages} stages, {one.splits} splits, {one.pieces} pieces, Mosaic"
    tile += " swapped" if one.swap else ""
    merge = "" if one.splits == 1 or each.in_kernel_merge else " (second kernel merges)"
    return f"{tile}, {one.splits} splits{merge}, {one.num_warps} warps, {one.num_stages} stages"


def tune_skinny_matmul(options: argparse.Namespace) -> None:
    device = jax.devices()[0]
    path = launches.table_path(device.device_kind)
    if path is None:
        raise SystemExit(f"no table can be named after the device kind {device.device_kind!r}")
    end = time.perf_counter() + options.time_limit
    models = list(PRODUCTS) if options.model == "all" else [options.model]
    kept: dict[tuple, list[Entry]] = {}
    for entry in launches.load_table(path):
        kept.setdefault((entry.rows, entry.inputs, entry.outputs, entry.gated, entry.w_bytes, entry.normed), []).append(
            entry
        )
    ratios: dict[str, list[float]] = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        # Rows first, so that a short run covers every product at some of them.
        for rows, model in itertools.product(options.rows, models):
            for product in PRODUCTS[model]:
                if time.perf_counter() > end:
                    print(f"time is up before {model} {product.name} x {rows}")
                    continue
                case = replace(product, rows=rows)
                timed, xla = tune(case, pool)
                best = report(model, case, timed, xla, verbose=options.verbose)
                kept[tuple(key_of(case).values())] = entries_of(case, timed)
                ratios.setdefault(f"{model} x {rows}", []).append(xla / best.seconds)
    for name, values in ratios.items():
        print(f"{name}: geometric mean {math.prod(values) ** (1 / len(values)):.2f} x XLA over {len(values)} products")
    launches.save_table(path, list(itertools.chain(*kept.values())), **results_log.measured_here())
    print(f"wrote {len(kept)} shapes to {path}")


def entries_of(case: SkinnyCase, timed: list[Timed]) -> list[Entry]:
    """The best launch, and beside one of the Mosaic kernel, or one that splits K there, the best without.

    What has a norm inside is not split, and what Mosaic's kernel does not take is Triton's.
    """
    merged = [each.launch for each in timed if each.in_kernel_merge]
    best = [merged[0], next(one for one in merged if isinstance(one, Launch))]
    if isinstance(merged[0], Tiling) and merged[0].splits > 1:
        best[1:1] = [one for one in merged if isinstance(one, Tiling) and one.splits == 1][:1]
    return [Entry(**key_of(case), launch=one) for one in dict.fromkeys(best)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("kernel", choices=["skinny_matmul"])
    parser.add_argument("--model", choices=[*PRODUCTS, "all"], default="all")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, help="buckets; an entry serves up to its rows")
    parser.add_argument("--time-limit", type=float, default=600, help="seconds after which no shape is begun")
    parser.add_argument("--verbose", action="store_true", help="print every candidate")
    options = parser.parse_args()
    if jax.devices()[0].platform != "gpu":
        raise SystemExit(f"needs an NVIDIA GPU, but the devices are {jax.devices()}")
    tune_skinny_matmul(options)


if __name__ == "__main__":
    main()
