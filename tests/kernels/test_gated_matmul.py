"""`gated_matmul`: the XLA version, and the Mosaic kernel in the interpreter, which follows every barrier and copy."""

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import config as jaxtyping_config
from kernel_oracle import gated_oracle, relative_error

from nanovllm_kernels import gated_matmul, lowering_for
from nanovllm_kernels._compat import Target
from nanovllm_kernels.gated_matmul.cases import CASES, GatedCase, gated_inputs
from nanovllm_kernels.gated_matmul.mosaic import gated_matmul_mosaic
from nanovllm_kernels.gated_matmul.mosaic_device import Tiling, fits

TOLERANCE = {"bfloat16": 1e-2, "float16": 2e-3, "float32": 1e-5}


@pytest.mark.parametrize("case", [case for case in CASES if case.rows < 4096], ids=lambda case: case.name)
def test_xla_version_matches_the_oracle(case):
    arrays = gated_inputs(case)
    got = jax.jit(lambda arrays: gated_matmul(**arrays, backend="xla"))(arrays)
    assert got.dtype == arrays["x"].dtype
    assert relative_error(got, gated_oracle(**arrays)) < TOLERANCE[case.dtype]


jitted = jax.jit(lambda arrays: gated_matmul(**arrays, backend="xla"))


@settings(deadline=None, max_examples=30)
@given(
    case=st.builds(
        GatedCase,
        name=st.just("any"),
        rows=st.sampled_from([1, 7]),
        inputs=st.sampled_from([8, 96]),
        outputs=st.sampled_from([33, 64]),
        bias=st.booleans(),
        dtype=st.sampled_from(sorted(TOLERANCE)),
    ),
    seed=st.integers(0, 2**32 - 1),
)
def test_xla_version_of_any_shape_matches_the_oracle(case, seed):
    arrays = gated_inputs(case, seed)
    got = jitted(arrays)
    assert got.dtype == arrays["x"].dtype
    # Twice that of the larger cases: one large gate of a row of 33 carries the rounding of its inputs alone.
    assert relative_error(got.reshape(1, -1), gated_oracle(**arrays).reshape(1, -1)) < 2 * TOLERANCE[case.dtype]


@pytest.mark.parametrize(
    ("case", "tiling"),
    [
        # Three programs with several tiles each; the last rows are past the end of x.
        (GatedCase("ahead", 392, 512, 256), Tiling()),
        (GatedCase("single_rows_of_tiles", 392, 512, 256), Tiling(head_start=1, group=1)),
        (GatedCase("more_stages", 264, 384, 128, dtype="float16"), Tiling(head_start=1, num_stages=6)),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_interpreted_kernel_matches_the_oracle(case, tiling):
    arrays = gated_inputs(case)
    with lowering_for(Target(90, 3, 227 * 1024)):
        call = jax.jit(lambda x, w: gated_matmul_mosaic(x, w, tiling=tiling, interpret=plgpu.InterpretGPUParams()))
        got, again = call(**arrays), call(**arrays)
    assert got.dtype == arrays["x"].dtype
    assert relative_error(got, gated_oracle(**arrays)) < TOLERANCE[case.dtype]
    np.testing.assert_array_equal(np.asarray(again), np.asarray(got))


@pytest.mark.parametrize("head_start", [0, 4])
def test_a_head_start_that_the_ring_does_not_hold_is_refused(head_start):
    with pytest.raises(ValueError, match=f"head_start is {head_start}; with 4 stages it must be 1 to one less"):
        Tiling(head_start=head_start)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({"rows": 2048, "inputs": 1024, "outputs": 3072}, True),
        ({"rows": 2049, "inputs": 1024, "outputs": 3072}, False),  # TMA moves rows by eights
        ({"rows": 2048, "inputs": 896, "outputs": 4864}, False),  # three and a half rounds of the ring
        ({"rows": 2048, "inputs": 1024, "outputs": 3136}, False),  # half a tile of columns
    ],
)
def test_the_kernel_takes_whole_tiles(sizes, expected):
    assert fits(**sizes) is expected


@pytest.mark.parametrize(
    ("x", "w", "bias", "message"),
    [
        ((4, 8), (9, 2, 16), None, r"they must be \[T, E\] and \[E, 2, F\], alike"),
        ((4, 8), (8, 3, 16), None, r"they must be \[T, E\] and \[E, 2, F\], alike"),
        ((4, 8), (8, 2, 16), (16,), r"bias is float32\(16,\); it must be \[2, F\], here float32\(2, 16\)"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(x, w, bias, message):
    jaxtyping_config.update("jaxtyping_disable", True)
    try:
        with pytest.raises(ValueError, match=message):
            gated_matmul(jnp.zeros(x), jnp.zeros(w), bias=None if bias is None else jnp.zeros(bias), backend="xla")
    finally:
        jaxtyping_config.update("jaxtyping_disable", False)
