"""What L2 is to give up first of all that Mosaic kernels copy."""

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import pytest
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith
from lowering import QWEN3, arguments

from nanovllm_kernels import (
    gated_matmul,
    lowering_for,
    ragged_prefill,
    rope_paged_decode,
    skinny_matmul,
    split_counters,
)
from nanovllm_kernels._mosaic import swizzled
from nanovllm_kernels._streaming import stream_copies

EVICT_FIRST = 0x12F0000000000000  # of CUTLASS's `TMA::CacheHintSm90`


@pytest.fixture
def hints(monkeypatch):
    """A list that grows by one with each copy that is given the hint while kernels are lowered."""
    stream_copies(lambda: None)  # what gives it is there from the first such kernel on
    found, constant = [], arith.constant

    def noted(result, value, **options):
        if isinstance(value, ir.IntegerAttr) and value.value == EVICT_FIRST:
            found.append(value)
        return constant(result, value, **options)

    monkeypatch.setattr(arith, "constant", noted)
    return found


def array(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


def lower(call, *args):
    with lowering_for(90):
        text = jax.jit(call).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    assert "custom_call @mosaic_gpu" in text


def test_weights_are_given_up_first(hints):
    lower(lambda x, w: skinny_matmul(x, w, backend="triton"), array(64, 4096), array(4096, 4096))
    assert len(hints) == 2  # x goes the same way: it costs nothing


def test_keys_and_values_are_given_up_first(hints):
    def call(*args):
        return rope_paged_decode(*args, scale=0.1, counters=jax.new_ref(split_counters()), backend="triton")

    lower(call, *arguments(rope_paged_decode, **QWEN3, rows=64, kv_heads=8))
    assert len(hints) == 2 + 4  # raw queries for two consumers; keys and values, two blocks each


def test_what_a_prefill_reads_many_times_is_not(hints):
    lower(lambda *args: ragged_prefill(*args, scale=0.1, backend="mosaic"), *arguments(ragged_prefill, **QWEN3))
    lower(lambda x, w: gated_matmul(x, w, backend="triton"), array(16384, 1024), array(1024, 2, 3072))
    assert not hints


def test_kernels_of_others_are_left_alone(hints):
    def kernel_l2_evict_first_too(x, out, tile, ready):
        plgpu.copy_gmem_to_smem(x, tile, ready)
        plgpu.barrier_wait(ready)
        plgpu.copy_smem_to_gmem(tile, out)
        plgpu.wait_smem_to_gmem(0)

    tile = plgpu.SMEM((64, 64), jnp.bfloat16, transforms=swizzled(jnp.bfloat16, 64))
    lower(
        plgpu.kernel(kernel_l2_evict_first_too, out_type=array(64, 64), scratch_types=[tile, plgpu.Barrier()]),
        array(64, 64),
    )
    assert not hints
