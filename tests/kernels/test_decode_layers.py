import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from in_interpreter import run_interpreted
from jaxtyping import config as jaxtyping_config
from kernel_oracle import layers_oracle, relative_error

from nanovllm_kernels import decode_layers, decode_layers_supports, lowering_for
from nanovllm_kernels.decode_layers.cases import CASES, LayerCase, layer_inputs
from nanovllm_kernels.decode_layers.launch import launch_parameters, tilings

SMALL = LayerCase("small", 21, 64, 4, 2, 16, 104, 8)


@pytest.fixture
def shapes_unchecked():
    """Checks by annotation are off, so that errors are the function's own, as for a user."""
    jaxtyping_config.update("jaxtyping_disable", True)
    yield
    jaxtyping_config.update("jaxtyping_disable", False)


@pytest.mark.parametrize("case", [*CASES, SMALL], ids=lambda case: case.name)
def test_reference_matches_the_oracle(case):
    assert_like_the_oracle(case, layer_inputs(case))


ONE_LAYER = replace(SMALL, num_layers=1)


@settings(deadline=None, max_examples=16)
@given(
    # Contexts of the same number of blocks share a program.
    case=st.builds(replace, st.just(ONE_LAYER), context=st.integers(1, 8))
    | st.builds(
        replace,
        st.just(replace(ONE_LAYER, qk_norm=False, qkv_bias=True, sliding_window=5)),
        context=st.integers(17, 24),
    ),
    seed=st.integers(0, 2**32 - 1),
)
def test_small_layers_of_any_contents_match_the_oracle(case, seed):
    assert_like_the_oracle(case, layer_inputs(case, seed))


@functools.cache
def jitted(**options):
    return jax.jit(functools.partial(decode_layers, **options, backend="xla"))


def assert_like_the_oracle(case, inputs):
    x, caches = jitted(**case.options)(*inputs)
    expected_x, expected = layers_oracle(*inputs, **case.options)
    assert relative_error(x, expected_x) < 1e-2
    for got, cache in zip(jax.tree.leaves(caches), jax.tree.leaves(expected), strict=True):
        seen = ~np.isnan(cache)
        got = np.asarray(got, np.float64)
        assert np.isnan(got[~seen]).all()
        assert relative_error(got[seen][None], cache[seen][None]) < 1e-2


def test_device_code_matches_the_oracle_in_tritons_interpreter():
    run_interpreted("interpreted_layers.py")


def abstract_layers(case, dtype=jnp.bfloat16):
    """Weights and caches, of layers that are all alike."""
    _, layers, _, _, caches, *_ = layer_inputs(replace(case, num_layers=1))
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, dtype), (layers, caches))
    return tuple(one * case.num_layers for one in abstract)


def test_what_fits_in_the_registers_of_a_gpu_is_supported():
    with lowering_for(90):
        assert all(decode_layers_supports(*abstract_layers(case)) for case in CASES)
        for name, changes in (
            ("wide", {"width": 2048}),
            ("long_mlp", {"mlp": 8192}),
            ("many_heads", {"num_heads": 64, "num_kv_heads": 32}),
            ("odd_head", {"head_dim": 80}),
        ):
            assert not decode_layers_supports(*abstract_layers(LayerCase(name, 9, **changes)))
        layers, caches = abstract_layers(CASES[0])
        narrow = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, jnp.float8_e4m3fn), caches)
        assert not decode_layers_supports(layers, narrow)
        assert not decode_layers_supports(*abstract_layers(CASES[0], jnp.float32))
        assert not decode_layers_supports([layer | {"o_bias": layer["input_norm"]} for layer in layers], caches)
        (other, *_), _ = abstract_layers(LayerCase("other", 9, mlp=2048))
        assert not decode_layers_supports([*layers[:-1], other], caches)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_tasks_cover_every_weight_once(case):
    (weights, *_), _ = abstract_layers(case)
    with lowering_for(90) as target:
        launch = launch_parameters(target, case.num_kv_heads)
    tiles = tilings(launch, weights)
    for tiling in (tiles.qkv, tiles.o, tiles.gate_up, tiles.down):
        covered = np.zeros((tiling.inputs, tiling.outputs), np.int32)
        for task in range(tiling.tasks):
            column, split = divmod(task, tiling.splits)
            rows = slice(split * tiling.split_inputs, (split + 1) * tiling.split_inputs)
            covered[rows, column * tiling.cols : (column + 1) * tiling.cols] += 1
        assert (covered == 1).all()
    assert tiles.fit(launch.programs)
    assert launch.most_pieces * case.num_kv_heads <= launch.programs


@pytest.mark.usefixtures("shapes_unchecked")
def test_arguments_that_do_not_fit_are_refused():
    names = ("x", "layers", "cos", "sin", "caches", "block_tables", "context_lens")
    given = dict(zip(names, jax.tree.map(jnp.asarray, layer_inputs(SMALL)), strict=True))
    first, *others = given["layers"]

    def with_first(weights):
        return {"layers": [weights, *others]}

    for wrong, words in (
        ({"backend": "cuda"}, "backend is 'cuda'; it must be 'xla' or 'triton'"),
        ({"x": jnp.ones((2, 64))}, r"x has shape \(2, 64\); it must be \[1, E\]: one row"),
        ({"layers": others}, "there are 2 layers and 3 caches; give one cache a layer"),
        (with_first({"qkv": first["qkv"]}), "weights lack input_norm, o, post_norm, gate_up, down"),
        (with_first(first | {"o": first["down"]}), r"o has shape \(104, 64\); it must be \[K, G, D, E\]"),
        (with_first({k: v for k, v in first.items() if k != "k_norm"}), "q_norm and k_norm go together"),
        ({"cos": jnp.ones((1, 3))}, r"cos has shape \(1, 3\); it must be \[1, D / 2\]"),
        ({"block_tables": jnp.ones((2, 3), jnp.int32)}, r"block_tables has shape \(2, 3\); it must be \[1, P\]"),
        ({"context_lens": jnp.ones(1)}, "context_lens has dtype float32; it must be int32"),
    ):
        with pytest.raises(ValueError, match=words):
            decode_layers(**given | {"backend": "xla", **SMALL.options} | wrong)


def test_triton_refuses_what_it_does_not_support():
    inputs = jax.tree.map(jnp.asarray, layer_inputs(SMALL))
    wide = [array.astype(jnp.float32) if array.dtype == jnp.bfloat16 else array for array in jax.tree.leaves(inputs)]
    wide = jax.tree.unflatten(jax.tree.structure(inputs), wide)
    with lowering_for(90), pytest.raises(ValueError, match=r"down float32\[104, 64\].* use backend='xla'"):
        decode_layers(*wide, **SMALL.options, backend="triton")


def test_triton_without_a_gpu_says_what_to_do():
    inputs = jax.tree.map(jnp.asarray, layer_inputs(SMALL))
    with pytest.raises(RuntimeError, match="use backend='xla'"):
        decode_layers(*inputs, **SMALL.options, backend="triton")
