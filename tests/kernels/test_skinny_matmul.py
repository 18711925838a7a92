import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from in_interpreter import run_interpreted
from jaxtyping import config as jaxtyping_config
from kernel_oracle import passed_on_oracle, relative_error, skinny_oracle

from nanovllm_kernels import Scaled, lowering_for, scaled, skinny_matmul, skinny_matmul_scaled
from nanovllm_kernels._integers import ceil_div
from nanovllm_kernels.skinny_matmul import launch
from nanovllm_kernels.skinny_matmul.cases import CASES, PRODUCTS, SkinnyCase, product_of, skinny_inputs

TOLERANCE = {"bfloat16": 5e-3, "float16": 2e-3, "float32": 1e-5}


@functools.cache
def jitted(case: SkinnyCase):
    return jax.jit(lambda arrays: product_of(arrays, **case.options, backend="xla"))


@settings(deadline=None, max_examples=40)
@given(
    case=st.builds(
        SkinnyCase,
        name=st.just("any"),
        rows=st.sampled_from([1, 2, 17]),
        inputs=st.sampled_from([100, 192]),
        outputs=st.sampled_from([33, 64]),
        norm=st.booleans(),
        bias=st.booleans(),
        residual=st.booleans(),
        gated=st.booleans(),
        scale=st.sampled_from([None, "tensor", "channel"]),
        dtype=st.sampled_from(sorted(TOLERANCE)),
        out_dtype=st.sampled_from([None, "float32"]),
    ),
    seed=st.integers(0, 2**32 - 1),
)
def test_reference_matches_the_oracle(case, seed):
    arrays = skinny_inputs(case, seed)
    got, _ = jitted(case)(arrays)
    assert got.dtype == jnp.dtype(case.out_dtype or case.dtype)
    # Over all rows at once, and with the norm rounded as documented: one large gate of a row of 33 carries the
    # rounding of its inputs several times over, and no other output is there to average it.
    expected = skinny_oracle(arrays, case, normed_dtype=arrays["x"].dtype)
    assert relative_error(np.asarray(got).reshape(1, -1), expected.reshape(1, -1)) < TOLERANCE[case.dtype]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_reference_takes_every_case(case):
    arrays = skinny_inputs(case)
    got, passed_on = jitted(case)(arrays)
    assert relative_error(got, skinny_oracle(arrays, case)) < TOLERANCE[case.dtype]
    if case.next_norm:
        rows, squares = passed_on_oracle(got, arrays["next_norm"])
        assert relative_error(passed_on.x, rows) < TOLERANCE[case.dtype]
        assert relative_error(passed_on.squares.sum(axis=0)[: case.rows], squares) < 1e-6


def test_a_product_of_scaled_rows_is_that_of_normed_ones():
    x, w, norm = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(5, 64), (64, 32), (64,)]))
    normed = skinny_matmul(x, w, norm=norm, backend="xla")
    for parts in (1, 3):
        got = skinny_matmul(scaled(x, norm, parts), w, backend="xla")
        np.testing.assert_allclose(np.asarray(got), np.asarray(normed), rtol=1e-5, atol=1e-5)


def test_float16_is_not_scaled():
    x, w = jnp.ones((2, 8), jnp.float16), jnp.ones((8, 4), jnp.float16)
    with pytest.raises(ValueError, match="a float16 x cannot be scaled"):
        skinny_matmul_scaled(x, w, next_norm=jnp.ones(4), backend="xla")


def test_no_rows_give_no_rows():
    arrays = {
        name: array[:0] if name in ("x", "residual") else array for name, array in skinny_inputs(CASES[0]).items()
    }
    assert skinny_matmul(**jax.tree.map(jnp.asarray, arrays), backend="xla").shape == (0, 512)


def test_wrong_arguments_are_refused_with_what_was_got_and_what_is_allowed():
    jaxtyping_config.update("jaxtyping_disable", True)
    try:
        x, w, vector = jnp.ones((2, 8)), jnp.ones((8, 4)), jnp.ones(4)
        fp8 = w.astype(jnp.float8_e4m3fn)
        for wrong, words in (
            ({"backend": "cuda"}, "backend is 'cuda'"),
            ({"w_layout": "mn"}, "w_layout is 'mn'; it must be 'kn' or 'nk'"),
            ({"x": x[0]}, r"x has shape \(8,\); it must be \[M, K\]"),
            ({"w": w[:4]}, r"w has shape \(4, 4\); it must be \[K, N\] or \[K, 2, N\] with K = 8"),
            ({"w": jnp.ones((8, 3, 4))}, r"w has shape \(8, 3, 4\)"),
            ({"w_layout": "nk"}, r"w has shape \(8, 4\); it must be \[N, K\] with K = 8"),
            ({"w": w.astype(jnp.bfloat16)}, "w has dtype bfloat16; it must be x's, float32, or float8_e4m3fn"),
            ({"w": fp8}, "w is fp8 without w_scale"),
            ({"w_scale": vector}, "only fp8 weights have a scale"),
            ({"w": fp8, "w_scale": vector[:2]}, r"w_scale has shape \(2,\); it must be \[N\] = \(4,\)"),
            ({"norm": vector}, r"norm has shape \(4,\); it must be \[K\] = \(8,\)"),
            (
                {"x": Scaled(x, jnp.ones((3, 2)))},
                r"squares .* have shape \(3, 2\); it must be \[parts, 128\]",
            ),
            ({"x": scaled(x, x[0]), "norm": x[0]}, "x is scaled, and norm is given"),
            ({"bias": x}, r"bias has shape \(2, 8\); it must be \[N\] = \(4,\)"),
            ({"residual": x}, r"residual has shape \(2, 8\); it must be \[M, N\] = \(2, 4\)"),
        ):
            with pytest.raises(ValueError, match=words):
                skinny_matmul(**{"x": x, "w": w, "backend": "xla"} | wrong)
    finally:
        jaxtyping_config.update("jaxtyping_disable", False)


def test_triton_without_a_gpu_says_what_to_do():
    x, w = jnp.ones((2, 8), jnp.bfloat16), jnp.ones((8, 4), jnp.bfloat16)
    with pytest.raises(RuntimeError, match="use backend='xla'"):
        skinny_matmul(x, w, backend="triton")


@pytest.mark.parametrize("architecture", [80, 86, 90, 100])
@pytest.mark.parametrize("rows", [1, 8, 64, 256])
def test_untuned_launches_fill_the_chip_and_fit_in_it(architecture, rows):
    with lowering_for(architecture) as target:
        for case in (*PRODUCTS["qwen3_0_6b"], *PRODUCTS["qwen3_8b"]):
            shape = {"inputs": case.inputs, "outputs": case.outputs, "gated": case.gated, "w_bytes": 2}
            chosen = launch.default_launch(target, rows=rows, **shape)
            tiles = ceil_div(rows, chosen.tile_rows) * ceil_div(case.outputs, chosen.tile_cols)
            assert tiles * chosen.splits >= target.multiprocessors // 2
            stage = chosen.stage_bytes(gated=case.gated, w_bytes=2)
            assert chosen.num_stages * stage <= target.shared_bytes


def test_a_tuned_shape_is_used_for_the_nearest_shapes_and_no_others(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "TABLES", tmp_path)
    one, sixteen, many = (launch.Launch(rows, 32, 64, 2, 4, 3) for rows in (1, 16, 64))
    entries = [launch.Entry(rows, 1024, 4096, False, 2, True, it) for rows, it in ((64, many), (16, sixteen), (1, one))]
    launch.save_table(launch.table_path("NVIDIA H200"), entries, device="NVIDIA H200")
    assert json.loads((tmp_path / "h200.json").read_text())["device"] == "NVIDIA H200"
    try:
        with lowering_for(90) as target:

            def chosen(rows, inputs=1024, outputs=4096, gated=False, normed=True):
                options = {"inputs": inputs, "outputs": outputs, "gated": gated, "w_bytes": 2, "normed": normed}
                return launch.launch_parameters(target, rows=rows, **options)

            assert [chosen(rows) for rows in (1, 2, 16, 17, 64)] == [one, sixteen, sixteen, many, many]
            assert chosen(8, outputs=3072) == sixteen
            untuned = {"rows": 8, "inputs": 1024, "outputs": 512, "gated": False, "w_bytes": 2}
            assert launch.launch_parameters(target, **untuned, normed=True) == launch.default_launch(target, **untuned)
            assert chosen(8, gated=True) not in (one, sixteen, many)
            assert chosen(65) not in (one, sixteen, many)
            # Of equal shapes those with a norm before them, or without, are preferred.
            assert chosen(8, normed=False) == sixteen
            plain = launch.Entry(16, 1024, 4096, False, 2, False, many)
            launch.save_table(launch.table_path("NVIDIA H200"), [*entries, plain])
            assert (chosen(8), chosen(8, normed=False), chosen(64, normed=False)) == (sixteen, many, many)
            assert chosen(8, outputs=3072, normed=False) == many
    finally:
        launch.load_table.cache_clear()


def test_a_tuned_mosaic_tile_is_used_where_the_operands_suit_it(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "TABLES", tmp_path)
    mosaic, triton = launch.Tiling(64, 64, 64, 8), launch.Launch(64, 32, 64, 2, 4, 3)
    entries = [launch.Entry(128, 1024, 4096, False, 2, True, it) for it in (triton, mosaic)]
    launch.save_table(launch.table_path("NVIDIA H200"), entries)
    try:
        with lowering_for(90) as target:
            chosen = functools.partial(
                launch.launch_parameters, target, inputs=1024, gated=False, w_bytes=2, normed=True
            )
            assert chosen(rows=128, outputs=4096, takes=lambda _: True) == mosaic
            assert chosen(rows=128, outputs=4096) == triton
            assert chosen(rows=100, outputs=4096, takes=lambda _: True) == triton  # TMA moves rows by eights
            assert chosen(rows=128, outputs=4000, takes=lambda _: True) == triton  # columns that no whole tiles cover
    finally:
        launch.load_table.cache_clear()


def test_of_tuned_tiles_those_that_split_are_for_shapes_whose_clusters_run_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "TABLES", tmp_path)
    whole, split = launch.Tiling(64, 64, 64, 8), launch.Tiling(64, 64, 64, 8, 4)
    entries = [launch.Entry(64, 2048, 1024, False, 2, False, it) for it in (whole, split)]
    launch.save_table(launch.table_path("NVIDIA H200"), entries)
    try:
        with lowering_for(90) as target:
            sizes = {"rows": 64, "inputs": 2048, "gated": False, "w_bytes": 2, "normed": False, "takes": lambda _: True}
            assert launch.launch_parameters(target, outputs=1024, **sizes) == split
            assert launch.launch_parameters(target, outputs=1536, **sizes) == whole
    finally:
        launch.load_table.cache_clear()


def test_a_gpu_without_an_entry_takes_that_of_one_with_the_same_chip(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "TABLES", tmp_path)
    of_h200, of_h100 = launch.Launch(64, 32, 64, 2, 4, 3), launch.Launch(64, 64, 64, 1, 4, 3)
    launch.save_table(
        launch.table_path("NVIDIA H200"), [launch.Entry(64, n, 4096, False, 2, True, of_h200) for n in (512, 4096)]
    )
    try:
        launch.save_table(launch.table_path("NVIDIA H100"), [launch.Entry(64, 512, 4096, False, 2, True, of_h100)])
        target = launch.Target(90, 132, 227 * 1024, "NVIDIA H100 80GB HBM3")
        chosen = functools.partial(
            launch.launch_parameters, target, rows=64, outputs=4096, gated=False, w_bytes=2, normed=True
        )
        assert (chosen(inputs=512), chosen(inputs=4096)) == (of_h100, of_h200)
        a_part = launch.Target(90, 16, 227 * 1024, "NVIDIA H100 80GB HBM3 MIG 1g.10gb")
        for other in (
            a_part,
            launch.Target(80, 108, 163 * 1024, "NVIDIA A100"),
            launch.Target(90, 132, 227 * 1024, "GPU"),
        ):
            assert of_h200 not in [entry.launch for entry in launch.table_of(other)]
    finally:
        launch.load_table.cache_clear()


@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(2**20, 2048, 16), (2**20, 16, 2048)])
def test_rows_past_what_32_bits_count_are_refused(rows, inputs, outputs):
    def shape(num_rows):
        x, w = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((num_rows, inputs), (inputs, outputs)))
        return jax.eval_shape(functools.partial(skinny_matmul, backend="xla"), x, w).shape

    assert shape(rows - 1) == (rows - 1, outputs)
    with pytest.raises(ValueError, match=r"below 2\^31: multiply fewer rows"):
        shape(rows)


def test_a_table_of_another_format_is_refused(tmp_path):
    (tmp_path / "h200.json").write_text('{"format": 0, "entries": []}')
    with pytest.raises(ValueError, match="format 0; this version reads 2: tune again"):
        launch.load_table(tmp_path / "h200.json")


def test_device_code_matches_the_oracle_in_tritons_interpreter():
    run_interpreted("interpreted.py")
