"""A catalogue from a model's config alone: nothing is downloaded, allocated or compiled."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from nanovllm_jax.config import EngineConfig, ModelConfig
from nanovllm_jax.engine.sampling_plan import MAX_ADJUSTMENTS
from nanovllm_jax.errors import ConfigError
from nanovllm_jax.inspection.gpus import Gpu
from nanovllm_jax.models.params import ParamSpec, abstract_params, param_bytes
from nanovllm_jax.parallel.mesh import MODEL_AXIS, make_mesh, param_shardings, split_heads
from nanovllm_jax.step.buckets import bucket_for, decode_buckets, prefill_buckets
from nanovllm_jax.step.catalogue import Catalogue, ProgramKey
from nanovllm_jax.step.memory import BLOCK_MULTIPLE, RESERVE_BYTES
from nanovllm_jax.step.state import StateShape, block_bytes
from nanovllm_jax.step.step import StepConfig


def plan_catalogue(model: ModelConfig, config: EngineConfig, gpu: Gpu | None) -> Catalogue:
    """The programs of an engine for `gpu`, or for the device at hand.

    The number of cache blocks is estimated, since temporaries are only known after compiling for the GPU; it changes
    the cache's shape in the programs and nothing else.

    Raises:
        ConfigError: if the model does not divide over the devices.
    """
    model = split_heads(model, config.tensor_parallel_size)
    mesh = make_mesh(config.tensor_parallel_size, config.data_parallel_size)
    on_gpu = gpu is not None or mesh.devices.flat[0].platform != "cpu"
    dtype = jnp.dtype(_dtype(config, model, on_gpu))
    cache_dtype = dtype if config.kv_cache_dtype == "auto" else jnp.dtype(config.kv_cache_dtype)
    params: Any = jax.tree.map(
        lambda spec, sharding: jax.ShapeDtypeStruct(spec.shape, dtype, sharding=sharding),
        abstract_params(model),
        param_shardings(model, mesh),
        is_leaf=lambda leaf: isinstance(leaf, ParamSpec),
    )
    max_model_len = config.max_model_len or model.max_position_embeddings
    shards = config.tensor_parallel_size
    one_block = block_bytes(model, config.block_size, cache_dtype) // shards
    if config.num_gpu_blocks_override is not None:
        num_blocks = config.num_gpu_blocks_override
    elif gpu is None:
        num_blocks = config.max_num_seqs * -(-min(max_model_len, 512) // config.block_size)
    else:
        free = gpu.memory_bytes * config.gpu_memory_utilization - param_bytes(model, dtype) / shards - RESERVE_BYTES
        num_blocks = int(free // one_block // BLOCK_MULTIPLE * BLOCK_MULTIPLE)
        if num_blocks <= 0:
            raise ConfigError(
                f"{gpu.name} has {gpu.memory_bytes / 1e9:.0f} GB, which {shards} device(s) fill with weights of "
                f"{param_bytes(model, dtype) / 1e9:.1f} GB: choose more devices or a larger GPU."
            )
    backend = "triton" if on_gpu else "xla"
    shape = StateShape(num_blocks, config.block_size, config.max_num_seqs, max_model_len, MAX_ADJUSTMENTS)
    return Catalogue(
        StepConfig(
            model,
            shape,
            backend if config.attention_backend == "auto" else config.attention_backend,
            MODEL_AXIS if shards > 1 else None,
        ),
        params,
        cache_dtype,
        mesh,
        decode_sizes=decode_buckets(config.max_num_seqs, fine=on_gpu),
        prefill_sizes=prefill_buckets(
            min(config.max_num_batched_tokens, config.max_num_seqs * max_model_len), fine=on_gpu
        ),
        num_logprobs=config.max_logprobs,
    )


def choose_keys(catalogue: Catalogue, phase: str | None, rows: int | None, tokens: int | None) -> list[ProgramKey]:
    """The step's programs and the plain sampler, at the buckets that hold `rows` and `tokens` (None: the largest).

    Raises:
        ConfigError: if no bucket is large enough.
    """
    decode = ProgramKey("decode", _bucket("rows", rows, catalogue.decode_sizes))
    # A mixed step runs the program of a prefill: decode rows are chunks of one token.
    prefill = ProgramKey("prefill", _bucket("tokens", tokens, catalogue.prefill_sizes))
    sample = ProgramKey("plain", decode.size)
    if phase == "decode":
        return [decode, sample]
    return [prefill, sample] if phase in ("prefill", "mixed") else [decode, prefill, sample]


def _bucket(name: str, wanted: int | None, sizes: Any) -> int:
    if wanted is None:
        return sizes[-1]
    if wanted > sizes[-1]:
        raise ConfigError(f"{wanted} {name} are more than the largest bucket, {sizes[-1]}: ask for fewer.")
    return bucket_for(wanted, sizes)


def _dtype(config: EngineConfig, model: ModelConfig, on_gpu: bool) -> str:
    if config.dtype != "auto":
        return config.dtype
    if not on_gpu:
        return "float32"
    return "bfloat16" if model.dtype == "float32" else model.dtype
