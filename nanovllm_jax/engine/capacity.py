"""How many cache blocks an engine has, and the programs for them."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import jax.numpy as jnp
from jax.sharding import Mesh

from nanovllm_jax.config import EngineConfig, ModelConfig
from nanovllm_jax.engine.lowering_worker import LoweringOrder
from nanovllm_jax.engine.plan import abstract_weights, cache_dtype, describe_programs, smallest_shape, weight_dtype
from nanovllm_jax.errors import DeviceError
from nanovllm_jax.models.params import Params
from nanovllm_jax.step.lowering import LoweringWorkers
from nanovllm_jax.step.memory import blocks_that_fit, expected_temporary_bytes
from nanovllm_jax.step.programs import Programs, cache_folder
from nanovllm_jax.step.state import StateShape, abstract_extras, abstract_rows, block_bytes, device_bytes
from nanovllm_kernels._compat import current_target

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Planned:
    """The programs of an engine, not compiled yet.

    Attributes:
        programs: for a device state of `shape`.
        shape: with the cache blocks that fit, or that the user asks for.
        temporary: bytes left free for what a program needs while it runs; None where the blocks do not depend on it.
    """

    programs: Programs
    shape: StateShape
    temporary: int | None


def plan_programs(model: ModelConfig, config: EngineConfig, mesh: Mesh, temporary: int | None = None) -> Planned:
    """Choose the number of cache blocks, and describe the programs for it.

    Args:
        model: its heads already split over the mesh.
        config: the engine's arguments.
        mesh: the devices.
        temporary: bytes that the hungriest program needs while it runs; None for an estimate.

    Raises:
        ConfigError: if max_model_len is more than the model was trained for.
        DeviceError: if the device is too small.
    """
    device = mesh.devices.flat[0]
    on_gpu = device.platform != "cpu"
    dtype = weight_dtype(config.dtype, model, on_gpu=on_gpu)
    kv_dtype, weights = cache_dtype(config, dtype), abstract_weights(model, dtype, mesh)
    shape = smallest_shape(model, config)
    if config.num_gpu_blocks_override is not None:
        shape, temporary = replace(shape, num_blocks=config.num_gpu_blocks_override), None
    else:
        if not on_gpu:
            temporary = None
        elif temporary is None:
            smallest = describe_programs(model, config, shape, weights, kv_dtype, mesh, on_gpu=on_gpu)
            temporary = expected_temporary_bytes(smallest)
        num_blocks = blocks_that_fit(
            device,
            fixed_bytes=device_bytes((weights, abstract_rows(shape, mesh), abstract_extras(model, shape, mesh))),
            temporary=temporary or 0,
            block_bytes=_shard_block_bytes(model, config, kv_dtype),
            gpu_memory_utilization=config.gpu_memory_utilization,
        )
        if not on_gpu:
            num_blocks = min(num_blocks, config.max_num_seqs * shape.blocks_per_row)
        shape = replace(shape, num_blocks=num_blocks)
    shape = _checked(shape, model, config, kv_dtype)
    return Planned(_programs(model, config, shape, weights, dtype, kv_dtype, mesh, on_gpu=on_gpu), shape, temporary)


def _programs(
    model: ModelConfig,
    config: EngineConfig,
    shape: StateShape,
    weights: Params,
    dtype: jnp.dtype,
    kv_dtype: jnp.dtype,
    mesh: Mesh,
    *,
    on_gpu: bool,
) -> Programs:
    catalogue = describe_programs(model, config, shape, weights, kv_dtype, mesh, on_gpu=on_gpu)
    command_buffers = not config.enforce_eager
    if not on_gpu:  # XLA's own cache does as much as ours, and without kernels lowering is quick
        return Programs(catalogue, command_buffers=command_buffers)
    order = LoweringOrder(model, config, shape, dtype, kv_dtype, current_target())
    return Programs(
        catalogue,
        command_buffers=command_buffers,
        kept_in=cache_folder() / "executables",
        workers=LoweringWorkers("nanovllm_jax.engine.lowering_worker", order),
    )


def _checked(shape: StateShape, model: ModelConfig, config: EngineConfig, kv_dtype: jnp.dtype) -> StateShape:
    """The shape, its max_model_len lowered to what the cache holds if the user did not ask for one."""
    one_block = _shard_block_bytes(model, config, kv_dtype)
    if shape.num_blocks < config.max_num_seqs:
        raise DeviceError(
            f"The KV cache has {shape.num_blocks} blocks of {one_block / 1e6:.2f} MB, fewer than one for each of the "
            f"max_num_seqs {config.max_num_seqs} requests: raise gpu_memory_utilization or lower max_num_seqs."
        )
    capacity = shape.num_blocks * config.block_size
    if capacity < shape.max_model_len:
        if config.max_model_len is not None and config.num_gpu_blocks_override is None:
            raise DeviceError(
                f"The KV cache holds {capacity} tokens, less than one request of max_model_len {shape.max_model_len}: "
                "raise gpu_memory_utilization or lower max_model_len."
            )
        logger.warning("max_model_len is lowered from %d to the cache's %d tokens", shape.max_model_len, capacity)
        shape = replace(shape, max_model_len=capacity)
    logger.info(
        "KV cache: %d tokens in %d blocks, %.2f GB of %s; %.1f requests of %d tokens at once",
        capacity,
        shape.num_blocks,
        shape.num_blocks * one_block / 1e9,
        kv_dtype,
        capacity / shape.max_model_len,
        shape.max_model_len,
    )
    return shape


def _shard_block_bytes(model: ModelConfig, config: EngineConfig, kv_dtype: jnp.dtype) -> int:
    return block_bytes(model, config.block_size, kv_dtype) // config.tensor_parallel_size
