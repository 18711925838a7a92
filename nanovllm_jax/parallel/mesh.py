"""The mesh ("data", "model") and which logical axis is split over which of its axes."""

from __future__ import annotations

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nanovllm_jax.config import ModelConfig
from nanovllm_jax.errors import ConfigError
from nanovllm_jax.models.params import Params, ParamSpec, abstract_params, map_specs

# Tensor parallelism splits heads, the MLP and the vocabulary; nothing else is split.
AXIS_RULES: dict[str, str] = {"kv_heads": "model", "mlp": "model", "vocab": "model"}


def make_mesh(tensor_parallel_size: int, data_parallel_size: int) -> Mesh:
    """A mesh of `data_parallel_size` x `tensor_parallel_size` local devices.

    Raises:
        ConfigError: if a size is not 1; the step runs on one device in this version.
    """
    for name, size in (
        ("tensor_parallel_size", tensor_parallel_size),
        ("data_parallel_size", data_parallel_size),
    ):
        if size != 1:
            raise ConfigError(f"{name} is {size}; this version runs on one device: pass {name}=1.")
    devices = jax.local_devices()[: tensor_parallel_size * data_parallel_size]
    return jax.make_mesh(
        (data_parallel_size, tensor_parallel_size),
        ("data", "model"),
        devices=devices,
        axis_types=(jax.sharding.AxisType.Auto, jax.sharding.AxisType.Auto),
    )


def param_shardings(config: ModelConfig, mesh: Mesh) -> Params:
    """The sharding of every parameter, in the shape of `abstract_params`."""

    def sharding(spec: ParamSpec) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec(*(AXIS_RULES.get(axis or "") for axis in spec.axes)))

    return map_specs(sharding, abstract_params(config))


def replicated(mesh: Mesh) -> NamedSharding:
    """A copy on every device."""
    return NamedSharding(mesh, PartitionSpec())
