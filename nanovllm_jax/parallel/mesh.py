"""The mesh ("data", "model"), which logical axis is split over which of its axes, and whether a model divides."""

from __future__ import annotations

from dataclasses import replace

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nanovllm_jax.config import ModelConfig
from nanovllm_jax.errors import ConfigError, DeviceError
from nanovllm_jax.models.params import Params, ParamSpec, abstract_params, map_specs

DATA_AXIS, MODEL_AXIS = "data", "model"
_AXIS_TYPES = (jax.sharding.AxisType.Auto, jax.sharding.AxisType.Auto)
# Tensor parallelism splits heads, the MLP and the vocabulary; nothing else is split.
AXIS_RULES: dict[str | None, str] = {"kv_heads": MODEL_AXIS, "mlp": MODEL_AXIS, "vocab": MODEL_AXIS}


def check_devices(tensor_parallel_size: int, data_parallel_size: int) -> None:
    """Whether there are as many local devices; does not start them to find the one that there always is.

    Raises:
        DeviceError: if there are fewer.
    """
    count = data_parallel_size * tensor_parallel_size
    if count == 1 or len(devices := jax.local_devices()) >= count:
        return
    more = "make more devices visible"
    if devices[0].platform == "cpu":
        more = f"set XLA_FLAGS=--xla_force_host_platform_device_count={count}"
    raise DeviceError(
        f"data_parallel_size {data_parallel_size} x tensor_parallel_size {tensor_parallel_size} needs {count} devices, "
        f"but JAX sees {len(devices)} ({devices[0]}{', ...' * (len(devices) > 1)}): lower one of them or {more}."
    )


def make_mesh(tensor_parallel_size: int, data_parallel_size: int) -> Mesh:
    """A mesh of `data_parallel_size` replicas x `tensor_parallel_size` shards, over local devices.

    Raises:
        DeviceError: if there are fewer devices.
    """
    check_devices(tensor_parallel_size, data_parallel_size)
    devices = jax.local_devices()[: data_parallel_size * tensor_parallel_size]
    shape = (data_parallel_size, tensor_parallel_size)
    return jax.make_mesh(shape, (DATA_AXIS, MODEL_AXIS), devices=devices, axis_types=_AXIS_TYPES)


def replica_meshes(mesh: Mesh) -> list[Mesh]:
    """The part of the mesh that each replica runs on, [1, shards].

    Replicas share nothing but the host, and a step of one mesh would end with its slowest replica: so each gets
    programs for devices of its own instead of a place in one program.
    """
    return [Mesh(devices[None], mesh.axis_names, axis_types=_AXIS_TYPES) for devices in mesh.devices]


def split_heads(config: ModelConfig, tensor_parallel_size: int) -> ModelConfig:
    """The model as its shards see it: where KV heads are fewer than shards, each is held by several.

    Raises:
        ConfigError: if heads, MLP or vocabulary do not divide by the number of shards.
    """
    shards, kv_heads = tensor_parallel_size, config.num_kv_heads
    for name in ("num_heads", "intermediate_size", "vocab_size"):
        if getattr(config, name) % shards:
            raise ConfigError(
                f"tensor_parallel_size is {shards}, which does not divide the model's {name} "
                f"{getattr(config, name)}: choose a size that does."
            )
    if kv_heads % shards == 0:
        return config
    if shards % kv_heads:
        raise ConfigError(
            f"tensor_parallel_size is {shards} and the model has {kv_heads} KV heads; one must be a multiple of the "
            "other: choose another size."
        )
    return replace(config, num_kv_heads=shards, kv_head_copies=shards // kv_heads)


def partition_spec(spec: ParamSpec) -> PartitionSpec:
    """How a parameter is split over the mesh."""
    return PartitionSpec(*(AXIS_RULES.get(axis) for axis in spec.axes))


def param_shardings(config: ModelConfig, mesh: Mesh) -> Params:
    """The sharding of every parameter, in the shape of `abstract_params`."""
    return map_specs(lambda spec: NamedSharding(mesh, partition_spec(spec)), abstract_params(config))
