"""Every program of the engine lowers for NVIDIA GPUs, on a machine that has none."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from nanovllm_jax.config import ModelConfig, RopeConfig
from nanovllm_jax.models.params import abstract_params, map_specs
from nanovllm_jax.step.programs import Programs
from nanovllm_jax.step.state import StateShape
from nanovllm_jax.step.step import StepConfig
from nanovllm_kernels import lowering_for

QWEN3 = ModelConfig(
    family="qwen3",
    vocab_size=1024,
    hidden_size=256,
    intermediate_size=512,
    num_layers=2,
    num_heads=16,
    num_kv_heads=8,
    head_dim=128,
    max_position_embeddings=4096,
    rms_norm_eps=1e-6,
    rope=RopeConfig(theta=1e6),
    tie_word_embeddings=True,
    qk_norm=True,
)
SINGLE = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])


def programs(backend: str) -> Programs:
    params = map_specs(
        lambda spec: jax.ShapeDtypeStruct(spec.shape, jnp.bfloat16, sharding=SINGLE), abstract_params(QWEN3)
    )
    shape = StateShape(num_blocks=512, block_size=16, max_num_seqs=16, max_model_len=4096)
    return Programs(
        StepConfig(QWEN3, shape, backend),
        params,
        jnp.bfloat16,
        SINGLE,
        decode_sizes=[4, 16],
        prefill_sizes=[64, 256],
        num_logprobs=20,
        command_buffers=True,
    )


@pytest.mark.parametrize("index", range(len(programs("triton").all_keys())))
def test_every_program_lowers_for_cuda(index):
    triton = programs("triton")
    key = triton.all_keys()[index]
    with lowering_for(90):
        text = triton.trace(key).lower(lowering_platforms=("cuda",)).as_text()
    assert ("triton" in text) == (key.kind in ("decode", "prefill"))


@pytest.mark.parametrize("kind", ["decode", "prefill"])
def test_the_cache_is_updated_in_place(kind):
    compiled = programs("xla")[next(key for key in programs("xla").all_keys() if key.kind == kind)]
    memory = compiled.memory_analysis()
    cache_bytes = 2 * 2 * 512 * 16 * 8 * 128 * 2
    assert memory.alias_size_in_bytes >= cache_bytes
    assert memory.temp_size_in_bytes < cache_bytes
