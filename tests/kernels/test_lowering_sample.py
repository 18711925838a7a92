"""The sampling kernels compile for every supported architecture, on a machine that has no GPU."""

import functools

import jax
import jax.numpy as jnp
import pytest
from lowering import ARCHITECTURES

from nanovllm_kernels import lowering_for, sample, sample_head


def lower_sample(architecture, rows, vocab_size, filters):
    def of(dtype, *shape):
        return jax.ShapeDtypeStruct((rows, *shape), dtype)

    args = of(jnp.float32, vocab_size), of(jnp.float32), of(jnp.uint32, 2), of(jnp.int32)
    asked = {"top_k": of(jnp.int32), "top_p": of(jnp.float32), "min_p": of(jnp.float32)} if filters else {}

    def call(args, asked):
        return sample(*args, **asked, backend="triton")

    with lowering_for(architecture) as target:
        lowered = jax.jit(call).trace(args, asked).lower(lowering_platforms=("cuda",))
        return lowered.as_text(), target.shared_bytes


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("filters", [False, True], ids=["plain", "filtered"])
def test_sampling_kernels_compile_and_fit_in_shared_memory(compiled, architecture, filters):
    text, limit = lower_sample(architecture, 256, 151_936, filters)
    names = ["scan_kernel", "select_kernel"] if filters else ["plain_kernel", "merge_kernel"]
    assert text.count("custom_call @triton_kernel_call_ffi") == 2
    assert [name for name, _ in compiled] == names
    assert all(shared <= limit for _, shared in compiled)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_shards_of_a_vocabulary_race_in_a_kernel_and_gather_a_score_and_an_id_a_row(compiled, architecture):
    mesh = jax.make_mesh((4,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    of = jax.ShapeDtypeStruct
    args = of((64, 151_936), jnp.float32), of((64,), jnp.float32), of((64, 2), jnp.uint32), of((64,), jnp.int32)
    same = jax.sharding.PartitionSpec()
    specs = jax.sharding.PartitionSpec(None, "model"), same, same, same
    draw = functools.partial(sample, axis_name="model", backend="triton")
    with lowering_for(architecture) as target:
        over_shards = jax.shard_map(draw, mesh=mesh, in_specs=specs, out_specs=same, check_vma=False)
        text = jax.jit(over_shards).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    assert [name for name, _ in compiled] == ["plain_kernel"]
    assert all(shared <= target.shared_bytes for _, shared in compiled)
    gathered = [line.rpartition("->")[2] for line in text.splitlines() if "all_gather" in line and "->" in line]
    assert [shape.split("<")[1].split("x")[:2] for shape in gathered] == [["64", "4"]] * 2


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    ("rows", "vocab_size", "width", "dtype"),
    [(32, 151_936, 1024, "bfloat16"), (1, 151_936, 1024, "bfloat16"), (256, 32_001, 576, "float16")],
)
def test_the_output_head_with_the_sampler_compiles_and_fits_in_shared_memory(
    compiled, architecture, rows, vocab_size, width, dtype
):
    def of(dtype, *shape):
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))

    args = of(dtype, rows, width), of(dtype, vocab_size, width), of("float32", rows), of("uint32", rows, 2)
    with lowering_for(architecture) as target:
        traced = jax.jit(functools.partial(sample_head, backend="triton")).trace(*args, of("int32", rows))
        traced.lower(lowering_platforms=("cuda",))
    assert [name for name, _ in compiled] == ["head_race_kernel", "merge_kernel"]
    assert all(shared <= target.shared_bytes for _, shared in compiled)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("rows", "vocab_size"), [(1, 1), (1, 151_936), (32, 49_152), (3, 128_256), (256, 32_001)])
@pytest.mark.parametrize("filters", [False, True], ids=["plain", "filtered"])
def test_sampling_kernels_compile_for_every_size(compiled, architecture, rows, vocab_size, filters):
    _, limit = lower_sample(architecture, rows, vocab_size, filters)
    assert all(shared <= limit for _, shared in compiled)
