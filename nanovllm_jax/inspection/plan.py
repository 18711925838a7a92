"""A catalogue from a model's config alone: nothing is downloaded, allocated or compiled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from nanovllm_jax.config import EngineConfig, ModelConfig
from nanovllm_jax.engine.plan import abstract_weights, cache_dtype, describe_programs, smallest_shape, weight_dtype
from nanovllm_jax.errors import ConfigError
from nanovllm_jax.inspection.gpus import Gpu
from nanovllm_jax.models.params import param_bytes
from nanovllm_jax.parallel.collectives import exchange_params
from nanovllm_jax.parallel.mesh import make_mesh, split_heads
from nanovllm_jax.step.buckets import bucket_for
from nanovllm_jax.step.catalogue import Catalogue, ProgramKey
from nanovllm_jax.step.memory import BLOCK_MULTIPLE, RESERVE_BYTES, expected_temporary_bytes
from nanovllm_jax.step.state import block_bytes


def plan_catalogue(model: ModelConfig, config: EngineConfig, gpu: Gpu | None) -> Catalogue:
    """The programs of an engine for `gpu`, or for the device at hand.

    The number of cache blocks is what the engine would begin with, but for row state and what the device's allocator
    keeps back; it changes the cache's shape in the programs and nothing else.

    Raises:
        ConfigError: if the model does not divide over the devices, or the weights fill the GPU.
    """
    model = split_heads(model, config.tensor_parallel_size)
    mesh = make_mesh(config.tensor_parallel_size, 1)  # replicas are equal
    on_gpu = gpu is not None or mesh.devices.flat[0].platform != "cpu"
    dtype = weight_dtype(config.dtype, model, on_gpu=on_gpu)
    kv_dtype = cache_dtype(config, dtype)
    params = abstract_weights(model, dtype, mesh) | exchange_params(mesh, exchanged=on_gpu, abstract=True)
    shape = smallest_shape(model, config)
    shards = config.tensor_parallel_size
    one_block = block_bytes(model, config.block_size, kv_dtype) // shards
    if config.num_gpu_blocks_override is not None:
        num_blocks = config.num_gpu_blocks_override
    elif gpu is None:
        num_blocks = config.max_num_seqs * -(-min(shape.max_model_len, 512) // config.block_size)
    else:
        trial = describe_programs(model, config, shape, params, kv_dtype, mesh, on_gpu=True)
        fixed = param_bytes(model, dtype) / shards + expected_temporary_bytes(trial) + RESERVE_BYTES
        free = gpu.memory_bytes * config.gpu_memory_utilization - fixed
        num_blocks = int(free // one_block // BLOCK_MULTIPLE * BLOCK_MULTIPLE)
        if num_blocks <= 0:
            raise ConfigError(
                f"{gpu.name} has {gpu.memory_bytes / 1e9:.0f} GB, which {shards} device(s) fill with weights of "
                f"{param_bytes(model, dtype) / 1e9:.1f} GB: choose more devices or a larger GPU."
            )
    shape = replace(shape, num_blocks=num_blocks)
    return describe_programs(model, config, shape, params, kv_dtype, mesh, on_gpu=on_gpu)


def choose_keys(catalogue: Catalogue, phase: str | None, rows: int | None, tokens: int | None) -> list[ProgramKey]:
    """The step's programs, at the buckets that hold `rows` and `tokens` (None: the largest).

    Decode steps sample in one program; behind a prefill the plain sampler runs.

    Raises:
        ConfigError: if no bucket is large enough.
    """
    decode = ProgramKey("decode", _bucket("rows", rows, catalogue.decode_sizes))
    # A mixed step runs the program of a prefill: decode rows are chunks of one token.
    prefill = ProgramKey("prefill", _bucket("tokens", tokens, catalogue.prefill_sizes))
    sample = ProgramKey("plain", _bucket("rows", rows, catalogue.sampling_sizes))
    if phase == "decode":
        return [decode]
    return [prefill, sample] if phase in ("prefill", "mixed") else [decode, prefill, sample]


def bucket_keys(catalogue: Catalogue, keys: Sequence[ProgramKey]) -> list[ProgramKey]:
    """Every bucket of the kinds that `keys` have, the largest first."""
    kinds = {key.kind for key in keys}
    return [key for key in catalogue.all_keys() if key.kind in kinds]


def _bucket(name: str, wanted: int | None, sizes: Any) -> int:
    if wanted is None:
        return sizes[-1]
    if wanted > sizes[-1]:
        raise ConfigError(f"{wanted} {name} are more than the largest bucket, {sizes[-1]}: ask for fewer.")
    return bucket_for(wanted, sizes)
