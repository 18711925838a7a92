"""What an engine's arguments mean for its programs, from abstract weights: the same for a start and for a report.

`build.py` compiles what is described here; `inspection/plan.py` looks into it without weights or a GPU.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from nanovllm_jax.config import EngineConfig, ModelConfig
from nanovllm_jax.engine.sampling_plan import MAX_ADJUSTMENTS
from nanovllm_jax.engine.schedule import SchedulerConfig
from nanovllm_jax.errors import ConfigError
from nanovllm_jax.models.params import Params, ParamSpec, abstract_params
from nanovllm_jax.parallel.mesh import MODEL_AXIS, param_shardings
from nanovllm_jax.step.buckets import decode_buckets, filtered_buckets, prefill_buckets, sampling_buckets
from nanovllm_jax.step.catalogue import Catalogue
from nanovllm_jax.step.memory import BLOCK_MULTIPLE
from nanovllm_jax.step.state import StateShape
from nanovllm_jax.step.step import StepConfig


def weight_dtype(asked: str, model: ModelConfig, *, on_gpu: bool) -> jnp.dtype:
    """What "auto" means: float32 on the CPU, where it is fastest; else the checkpoint's, but not float32."""
    if asked != "auto":
        return jnp.dtype(asked)
    if not on_gpu:
        return jnp.dtype("float32")
    return jnp.dtype("bfloat16" if model.dtype == "float32" else model.dtype)


def cache_dtype(config: EngineConfig, weights: jnp.dtype) -> jnp.dtype:
    """Of K and V: "auto" means the weights', "fp8" is e4m3."""
    names = {"auto": weights, "fp8": jnp.float8_e4m3fn}
    return jnp.dtype(names.get(config.kv_cache_dtype, config.kv_cache_dtype))


def abstract_weights(model: ModelConfig, dtype: jnp.dtype, mesh: Mesh) -> Params:
    """Shapes, dtypes and shardings of the weights."""
    return jax.tree.map(
        lambda spec, sharding: jax.ShapeDtypeStruct(spec.shape, dtype, sharding=sharding),
        abstract_params(model),
        param_shardings(model, mesh),
        is_leaf=lambda leaf: isinstance(leaf, ParamSpec),
    )


def decode_steps(config: EngineConfig, *, on_gpu: bool) -> int:
    """Tokens a row in one decode step: several on a GPU, where starting a step costs as much as a small step takes."""
    return config.decode_steps or (min(4, config.block_size) if on_gpu else 1)


def smallest_shape(model: ModelConfig, config: EngineConfig) -> StateShape:
    """The device state with the fewest cache blocks; how many fit is the caller's to find out.

    Raises:
        ConfigError: if max_model_len is more than the model was trained for.
    """
    max_model_len = config.max_model_len or model.max_position_embeddings
    if max_model_len > model.max_position_embeddings:
        raise ConfigError(
            f"max_model_len is {max_model_len}; {model.family} was trained for {model.max_position_embeddings} "
            "positions: lower max_model_len."
        )
    return StateShape(BLOCK_MULTIPLE, config.block_size, config.max_num_seqs, max_model_len, MAX_ADJUSTMENTS)


def length_remedy(model: ModelConfig, config: EngineConfig, shape: StateShape) -> str | None:
    """What would allow longer prompts than this shape does; None if the model does not."""
    if shape.max_model_len == model.max_position_embeddings:
        return None
    if shape.max_model_len == config.max_model_len:
        return "raise max_model_len"
    return f"raise {'gpu_memory_utilization' if config.num_gpu_blocks_override is None else 'num_gpu_blocks_override'}"


def scheduler_limits(model: ModelConfig, config: EngineConfig, shape: StateShape, num_steps: int) -> SchedulerConfig:
    """The scheduler's limits beside a device state of this shape, with `num_steps` tokens a row in a decode step."""
    return SchedulerConfig(
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_model_len=shape.max_model_len,
        block_size=config.block_size,
        num_blocks=shape.num_blocks,
        scheduling_policy=config.scheduling_policy,
        batching=config.batching,
        enable_prefix_caching=config.enable_prefix_caching,
        decode_steps=num_steps,
        length_remedy=length_remedy(model, config, shape),
    )


def describe_programs(
    model: ModelConfig,
    config: EngineConfig,
    shape: StateShape,
    params: Params,
    kv_dtype: jnp.dtype,
    mesh: Mesh,
    *,
    on_gpu: bool,
) -> Catalogue:
    """The programs of an engine.

    Args:
        model: its heads already split over the mesh.
        config: the engine's arguments.
        shape: of the device state.
        params: weights, or their abstract values with shardings.
        kv_dtype: of K and V.
        mesh: the devices.
        on_gpu: whether the programs are for a GPU, which need not be there.

    Raises:
        ConfigError: if the kernels asked for do not run on the devices.
    """
    platform_backend = "triton" if on_gpu else "xla"
    backend = platform_backend if config.attention_backend == "auto" else config.attention_backend
    if backend == "triton" and not on_gpu:
        device = mesh.devices.flat[0]
        raise ConfigError(
            f"attention_backend is 'triton', whose kernels need an NVIDIA GPU, but the engine runs on {device}: take "
            "'auto' or 'xla'."
        )
    # A step never holds more tokens than all rows at their longest.
    tokens = min(config.max_num_batched_tokens, shape.max_num_seqs * shape.max_model_len)
    return Catalogue(
        StepConfig(
            model,
            shape,
            backend,
            axis_name=MODEL_AXIS if config.tensor_parallel_size > 1 else None,
            decode_steps=decode_steps(config, on_gpu=on_gpu),
        ),
        params,
        kv_dtype,
        mesh,
        decode_sizes=decode_buckets(config.max_num_seqs, fine=on_gpu),
        filtered_sizes=filtered_buckets(config.max_num_seqs, fine=on_gpu),
        sampling_sizes=sampling_buckets(config.max_num_seqs),
        prefill_sizes=prefill_buckets(tokens, fine=on_gpu),
        num_logprobs=min(config.max_logprobs, model.vocab_size),
    )
