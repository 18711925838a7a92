"""The Mosaic kernel of `skinny_matmul` in the interpreter, which follows every barrier and copy."""

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_oracle import passed_on_oracle, relative_error, skinny_oracle

from nanovllm_kernels.skinny_matmul.cases import SkinnyCase, skinny_inputs
from nanovllm_kernels.skinny_matmul.launch import Target, Tiling, table_of
from nanovllm_kernels.skinny_matmul.mosaic import skinny_matmul_mosaic
from nanovllm_kernels.skinny_matmul.mosaic_shape import shape_of, takes

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
        # Tiles of 96 columns, which are moved by 32, or by 64 and 32; and of 48.
        (SkinnyCase("wide", 64, 256, 192, norm=True, gated=True), Tiling(64, 96, 32, 8)),
        (SkinnyCase("pieces", 64, 512, 384, norm=True, gated=True), Tiling(64, 96, 64, 4, pieces=2)),
        (SkinnyCase("narrow_pieces", 24, 512, 96, norm=True), Tiling(32, 48, 64, 6, pieces=2)),
        (SkinnyCase("pieces_scaled", 136, 256, 192, scaled=True, gated=True), Tiling(128, 48, 64, 3, pieces=2)),
        (SkinnyCase("two_stages", 136, 256, 64, norm=True), Tiling(128, 64, 64, 2)),
        (SkinnyCase("one_step", 64, 128, 64, norm=True), Tiling(64, 32, 64, 6)),
        # What is read by columns leaves a tile whole, and so does an odd number of tiles.
        (SkinnyCase("one_piece", 40, 256, 192, norm=True, bias=True), Tiling(64, 96, 64, 4, pieces=2)),
        (SkinnyCase("odd_tiles", 64, 512, 288, norm=True, gated=True), Tiling(64, 96, 64, 4, pieces=2)),
        # Of 128 rows each takes half; the last tile is partly past the end.
        (SkinnyCase("norm_bias", 200, 256, 128, norm=True, bias=True), Tiling(128, 64, 64, 3)),
        (SkinnyCase("gated_bias", 136, 256, 64, gated=True, bias=True), Tiling(128, 64, 64, 2)),
        # What a product before a norm passes on, and one after it takes.
        (SkinnyCase("passed_on", 72, 256, 128, scaled=True, residual=True, next_norm=True), Tiling(64, 64, 64, 4)),
        (SkinnyCase("passed_on_few", 40, 256, 64, bias=True, next_norm=True), Tiling(32, 32, 64, 4)),
        (SkinnyCase("passed_on_many", 200, 256, 64, scaled=True, gated=True, next_norm=True), Tiling(128, 32, 64, 3)),
        (SkinnyCase("float16", 136, 384, 64, residual=True, dtype="float16"), Tiling(128, 32, 128, 2)),
        # The interpreter has no clusters: there nothing is split.
        (SkinnyCase("unsplit", 64, 512, 128, residual=True), Tiling(64, 64, 64, 4, 2)),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_interpreted_kernel_matches_the_oracle(case, tiling):
    arrays = skinny_inputs(case)
    options = dict.fromkeys(("norm", "bias", "residual")) | {name: arrays[name] for name in arrays if name != "x"}
    assert tiling.fits(rows=case.rows, inputs=case.inputs, outputs=case.outputs)
    call = jax.jit(
        lambda x, options: skinny_matmul_mosaic(
            x, **options, eps=1e-6, tiling=tiling, interpret=plgpu.InterpretGPUParams()
        )
    )
    got, *passed_on = call(arrays["x"], options)
    assert got.dtype == arrays["x"].dtype
    assert relative_error(got, skinny_oracle(arrays, case)) < 5e-3
    np.testing.assert_array_equal(np.asarray(call(arrays["x"], options)[0]), np.asarray(got))
    if case.next_norm:
        scaled, squares = passed_on_oracle(got, arrays["next_norm"])
        assert relative_error(passed_on[0], scaled) < 5e-3
        assert relative_error(np.asarray(passed_on[1]).sum(axis=0)[: case.rows], squares) < 1e-5


@pytest.mark.parametrize(("rows", "stages"), [(8, 4), (256, 4), (32, 2), (64, 5), (128, 1)])
def test_a_tile_that_the_consumers_cannot_share_is_refused(rows, stages):
    with pytest.raises(ValueError, match=f"a tile of {rows} rows with {stages} stages; it must have 128 rows and 2"):
        Tiling(rows, 64, 64, stages)


@pytest.mark.parametrize(("columns", "splits"), [(64, 3), (128, 8), (32, 4), (96, 4)])
def test_columns_that_a_cluster_cannot_share_are_refused(columns, splits):
    with pytest.raises(
        ValueError, match=f"{splits} splits of K in tiles of {columns} columns; there must be 1, 2 or 4"
    ):
        Tiling(64, columns, 64, 4, splits)


@pytest.mark.parametrize(
    "tiling",
    [
        {"tile_cols": 64, "tile_inputs": 64, "pieces": 2},  # a row of a swizzle already
        {"tile_cols": 96, "tile_inputs": 32, "pieces": 2},  # fewer inputs than wgmma takes of such a row
        {"tile_cols": 96, "tile_inputs": 64, "pieces": 3},
        {"tile_cols": 96, "tile_inputs": 64, "pieces": 2, "splits": 2},
    ],
    ids=str,
)
def test_columns_that_are_not_a_wide_and_a_narrow_row_are_refused(tiling):
    with pytest.raises(
        ValueError, match="there must be 1, or 2 of 48 by a multiple of 32, or of 96 by a multiple of 64"
    ):
        Tiling(64, num_stages=4, **tiling)


@pytest.mark.parametrize(
    ("rows", "splits", "fits"), [(64, 4, True), (72, 4, False), (256, 2, True), (256, 4, False), (264, 2, False)]
)
def test_clusters_that_would_wait_for_others_do_not_fit(rows, splits, fits):
    assert Tiling(64, 64, 64, 4, splits).fits(rows=rows, inputs=2048, outputs=1024) == fits


@pytest.mark.parametrize(("splits", "fits"), [(1, True), (2, True), (4, False)])
def test_each_consumer_of_a_cluster_has_as_many_steps(splits, fits):
    assert Tiling(64, 64, 64, 4, splits).fits(rows=64, inputs=768, outputs=256) == fits


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
def test_tuned_tiles_fit_in_shared_memory_as_models_run_them(entry):
    """With a norm inside, or before and after, where K is not split; as after a sum, or before a norm, where it is."""
    of = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)  # noqa: E731
    columns = (2, entry.outputs) if entry.gated else (entry.outputs,)
    given = dict.fromkeys(("norm", "bias", "residual", "squares", "next_norm"))
    if entry.launch.splits == 1:
        given["norm" if entry.normed else "residual"] = of(entry.inputs)
    shape = shape_of(of(entry.rows, entry.inputs), of(entry.inputs, *columns), entry.launch, **given)
    assert takes(shape, 227 * 1024)


@pytest.mark.gpu
@pytest.mark.parametrize("entry", TUNED, ids=str)
def test_tuned_tiles_match_the_oracle_on_a_gpu(entry):
    tiling = entry.launch
    inputs = min(2 * tiling.splits * tiling.num_stages * tiling.tile_inputs, entry.inputs)
    outputs, norm = 4 * tiling.tile_cols, tiling.splits == 1  # with a norm K is not split
    # Where a tile is in pieces nothing else may be read by its columns, and there must be an even number of tiles.
    residual = tiling.pieces == 1
    case = SkinnyCase("tuned", entry.rows, inputs, outputs, norm=norm, residual=residual, gated=entry.gated)
    arrays = skinny_inputs(case)
    call = jax.jit(
        lambda arrays: skinny_matmul_mosaic(
            **dict.fromkeys(("norm", "bias", "residual")) | arrays, eps=1e-6, tiling=tiling
        )[0]
    )
    got = call(arrays)
    assert relative_error(got, skinny_oracle(arrays, case)) < 5e-3
    np.testing.assert_array_equal(np.asarray(call(arrays)), np.asarray(got))


SPLIT = [
    (SkinnyCase("two", 64, 512, 128, residual=True), Tiling(64, 64, 64, 4, 2)),
    (SkinnyCase("four", 64, 1024, 256, bias=True, residual=True), Tiling(64, 64, 64, 4, 4)),
    (SkinnyCase("few_rows", 24, 1024, 192, residual=True), Tiling(32, 96, 64, 4, 2)),
    (SkinnyCase("sixteen_rows", 16, 512, 64), Tiling(16, 64, 64, 4, 2)),
    (SkinnyCase("rows_past_the_end", 136, 512, 128, bias=True), Tiling(128, 64, 64, 3, 2)),
    (SkinnyCase("passed_on", 200, 1024, 256, residual=True, next_norm=True), Tiling(128, 64, 64, 4, 4)),
    (SkinnyCase("between_norms", 72, 512, 128, scaled=True, residual=True, next_norm=True), Tiling(64, 64, 64, 4, 2)),
    (SkinnyCase("float16", 64, 512, 128, residual=True, dtype="float16"), Tiling(64, 128, 64, 4, 4)),
]


@pytest.mark.gpu
@pytest.mark.parametrize(("case", "tiling"), SPLIT, ids=lambda value: getattr(value, "name", ""))
def test_sums_of_a_cluster_match_the_oracle_on_a_gpu(case, tiling):
    arrays = skinny_inputs(case)
    assert tiling.fits(rows=case.rows, inputs=case.inputs, outputs=case.outputs)

    def calls(arrays):
        options = dict.fromkeys(("norm", "bias", "residual")) | arrays
        return [skinny_matmul_mosaic(**options, eps=1e-6, tiling=tiling) for _ in range(20)]

    (got, *passed_on), *others = jax.jit(calls)(arrays)
    assert relative_error(got, skinny_oracle(arrays, case)) < 5e-3
    for other in others:
        np.testing.assert_array_equal(np.asarray(other[0]), np.asarray(got))
    if case.next_norm:
        scaled, squares = passed_on_oracle(got, arrays["next_norm"])
        assert relative_error(passed_on[0], scaled) < 5e-3
        assert relative_error(np.asarray(passed_on[1]).sum(axis=0)[: case.rows], squares) < 1e-5
