"""The Mosaic kernel of `skinny_matmul` in the interpreter, which follows every barrier and copy."""

import math

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_oracle import passed_on_oracle, relative_error, skinny_oracle

from nanovllm_kernels import split_counters
from nanovllm_kernels.skinny_matmul.cases import SkinnyCase, skinny_inputs
from nanovllm_kernels.skinny_matmul.launch import Target, Tiling, table_of
from nanovllm_kernels.skinny_matmul.mosaic import scratch_types_of, skinny_matmul_mosaic
from nanovllm_kernels.skinny_matmul.mosaic_device import ProductShape

ENTRIES = table_of(Target(90, 132, 227 * 1024, "NVIDIA H200"))
TUNED = [entry for entry in ENTRIES if isinstance(entry.launch, Tiling)]


@pytest.mark.parametrize(
    ("case", "tiling"),
    [
        # Two consumers take the stages of 64 rows in turn.
        (SkinnyCase("norm_gated", 64, 256, 64, norm=True, gated=True), Tiling(64, 32, 64, 4)),
        (SkinnyCase("residual_bias", 72, 512, 128, residual=True, bias=True), Tiling(64, 32, 64, 4)),
        # Rows past the end of x are zeros, and are not stored.
        (SkinnyCase("few_rows", 24, 256, 64, norm=True, gated=True, residual=True), Tiling(64, 32, 64, 4)),
        # Of 32 and 16 rows only those are fetched; wgmma multiplies 64, the rest of which is what lies behind them.
        (SkinnyCase("tile_32", 24, 512, 64, norm=True, gated=True, residual=True), Tiling(32, 32, 64, 4)),
        (SkinnyCase("tile_32_twice", 40, 256, 32, residual=True, bias=True), Tiling(32, 32, 64, 4)),
        (SkinnyCase("tile_16", 16, 512, 32, norm=True), Tiling(16, 32, 64, 6)),
        # Tiles of 96 columns, which are moved by 32.
        (SkinnyCase("wide", 64, 256, 192, norm=True, gated=True), Tiling(64, 96, 32, 8)),
        # Of 128 rows each takes half; the last tile is partly past the end.
        (SkinnyCase("norm_bias", 200, 256, 128, norm=True, bias=True), Tiling(128, 64, 64, 3)),
        (SkinnyCase("gated_bias", 136, 256, 64, gated=True, bias=True), Tiling(128, 64, 64, 2)),
        # What a product before a norm passes on, and one after it takes.
        (SkinnyCase("passed_on", 72, 256, 128, scaled=True, residual=True, next_norm=True), Tiling(64, 64, 64, 4)),
        (SkinnyCase("passed_on_few", 40, 256, 64, bias=True, next_norm=True), Tiling(32, 32, 64, 4)),
        (SkinnyCase("passed_on_many", 200, 256, 64, scaled=True, gated=True, next_norm=True), Tiling(128, 32, 64, 3)),
        (SkinnyCase("float16", 136, 384, 64, residual=True, dtype="float16"), Tiling(128, 32, 128, 2)),
        # Each tile has a helper, unless there is a norm or there are gate and up.
        (SkinnyCase("helped", 64, 640, 128, residual=True), Tiling(64, 64, 64, 4, 4)),
        (SkinnyCase("helped_bias", 24, 1024, 64, bias=True, residual=True), Tiling(32, 32, 64, 6, 8)),
        (SkinnyCase("helped_tiles", 72, 1024, 64, residual=True), Tiling(64, 64, 64, 4, 6)),
        (SkinnyCase("norm_unhelped", 64, 640, 64, norm=True, residual=True), Tiling(64, 64, 64, 4, 4)),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_interpreted_kernel_matches_the_oracle(case, tiling):
    arrays = skinny_inputs(case)
    options = dict.fromkeys(("norm", "bias", "residual")) | {name: arrays[name] for name in arrays if name != "x"}
    assert tiling.fits(rows=case.rows, inputs=case.inputs, outputs=case.outputs)
    call = jax.jit(
        lambda x, options, counters: skinny_matmul_mosaic(
            x, **options, eps=1e-6, tiling=tiling, counters=counters, interpret=plgpu.InterpretGPUParams()
        )
    )
    counters = jax.new_ref(split_counters())
    got, *passed_on = call(arrays["x"], options, counters)
    assert not counters[...].any()
    assert got.dtype == arrays["x"].dtype
    assert relative_error(got, skinny_oracle(arrays, case)) < 5e-3
    np.testing.assert_array_equal(np.asarray(call(arrays["x"], options, counters)[0]), np.asarray(got))
    if case.next_norm:
        scaled, squares = passed_on_oracle(got, arrays["next_norm"])
        assert relative_error(passed_on[0], scaled) < 5e-3
        assert relative_error(np.asarray(passed_on[1]).sum(axis=0)[: case.rows], squares) < 1e-5


@pytest.mark.parametrize(("rows", "stages"), [(8, 4), (256, 4), (32, 2), (64, 5), (128, 1)])
def test_a_tile_that_the_consumers_cannot_share_is_refused(rows, stages):
    with pytest.raises(ValueError, match=f"a tile of {rows} rows with {stages} stages; it must have 128 rows and 2"):
        Tiling(rows, 64, 64, stages)


@pytest.mark.parametrize(("rows", "steps"), [(64, 2), (64, 5), (128, 4)])
def test_help_that_the_consumers_cannot_share_is_refused(rows, steps):
    with pytest.raises(ValueError, match=f"{steps} helped steps of a tile of {rows} rows with 4 stages; it must be an"):
        Tiling(rows, 64, 64, 4, steps)


@pytest.mark.parametrize(("inputs", "fits"), [(640, True), (512, False)])
def test_who_is_helped_still_fills_its_ring(inputs, fits):
    assert Tiling(64, 64, 64, 4, 6).fits(rows=64, inputs=inputs, outputs=256) == fits


def test_without_counters_nobody_helps():
    case = SkinnyCase("alone", 64, 640, 128, residual=True)
    arrays, tiling = skinny_inputs(case), Tiling(64, 64, 64, 4, 4)
    options = {"norm": None, "bias": None, "eps": 1e-6, "tiling": tiling, "interpret": plgpu.InterpretGPUParams()}
    got = jax.jit(lambda arrays: skinny_matmul_mosaic(**arrays, **options)[0])(arrays)
    assert relative_error(got, skinny_oracle(arrays, case)) < 5e-3


@pytest.mark.parametrize(
    ("sizes", "fits"),
    [
        ({"rows": 200, "inputs": 256, "outputs": 128}, True),
        ({"rows": 201, "inputs": 256, "outputs": 128}, False),  # TMA moves rows by eights
        ({"rows": 200, "inputs": 192, "outputs": 128}, False),  # an odd number of stages for two consumers
        ({"rows": 200, "inputs": 256, "outputs": 96}, False),
    ],
)
def test_whole_tiles_must_cover_inputs_and_outputs(sizes, fits):
    assert Tiling(64, 64, 64, 4).fits(**sizes) == fits


@pytest.mark.parametrize("entry", TUNED, ids=str)
def test_tuned_tiles_fit_in_shared_memory_with_every_option(entry):
    shape = ProductShape(
        num_rows=entry.rows,
        num_inputs=entry.inputs,
        num_outputs=entry.outputs,
        gated=entry.gated,
        norm=not entry.launch.helped_steps,  # which has none
        bias=True,
        residual=True,
        eps=1e-6,
        dtype=jnp.dtype("bfloat16"),
        tiling=entry.launch,
        next_norm=entry.outputs < entry.inputs,
    )
    arrays = [each for each in scratch_types_of(shape).values() if hasattr(each, "transforms")]
    assert sum(math.prod(each.shape) * jnp.dtype(each.dtype).itemsize for each in arrays) < 226 * 1024


@pytest.mark.gpu
@pytest.mark.parametrize("entry", TUNED, ids=str)
def test_tuned_tiles_match_the_oracle_on_a_gpu(entry):
    tiling = entry.launch
    inputs, outputs = min(2 * tiling.num_stages * tiling.tile_inputs, entry.inputs), 2 * tiling.tile_cols
    if tiling.helped_steps:
        inputs = entry.inputs
    norm = not tiling.helped_steps  # which has none
    case = SkinnyCase("tuned", entry.rows, inputs, outputs, norm=norm, residual=True, gated=entry.gated)
    arrays = skinny_inputs(case)
    counters = jax.new_ref(split_counters())
    call = jax.jit(
        lambda arrays, counters: skinny_matmul_mosaic(
            **{"norm": None, "bias": None} | arrays, eps=1e-6, tiling=tiling, counters=counters
        )[0]
    )
    got = call(arrays, counters)
    assert relative_error(got, skinny_oracle(arrays, case)) < 5e-3
    np.testing.assert_array_equal(np.asarray(call(arrays, counters)), np.asarray(got))
    assert not counters[...].any()
