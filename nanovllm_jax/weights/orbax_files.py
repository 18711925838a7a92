"""Checkpoints of `nanovllm-jax convert`: the params pytree as Orbax arrays, config and tokenizer beside it.

Each device reads its own part of each array: a sharded model loads without one host buffer for all.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from nanovllm_jax.config import ModelConfig, RopeConfig
from nanovllm_jax.errors import ConfigError, WeightsError
from nanovllm_jax.models.params import Params, ParamSpec, abstract_params
from nanovllm_jax.weights.generation import GenerationDefaults, generation_config, read_json
from nanovllm_jax.weights.messages import first_few, reason
from nanovllm_jax.weights.source import ORBAX_CONFIG

_PARAMS, _KV_HEADS = "params", "kv_heads"


def save_orbax(
    params: Params, config: ModelConfig, tokenizer: Any, defaults: GenerationDefaults, directory: Path
) -> None:
    """Write a model directory that `locate` knows as an Orbax model.

    Args:
        params: pytree in the structure of `abstract_params(config)`.
        config: the model's shape.
        tokenizer: a transformers tokenizer; saved with its chat template.
        defaults: end ids and sampling defaults.
        directory: made if it is not there; must be empty.

    Raises:
        ConfigError: if `directory` holds something already.
    """
    import orbax.checkpoint as ocp  # takes a second, which other formats need not pay

    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ConfigError(f"{directory} exists and is not empty; name a new directory for the converted model.")
    directory.mkdir(parents=True, exist_ok=True)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(directory.absolute() / _PARAMS, params)
    tokenizer.save_pretrained(directory)
    _write_json(directory / "generation_config.json", generation_config(defaults))
    # Last, since it is what makes the directory a model.
    _write_json(directory / ORBAX_CONFIG, asdict(config))


def load_orbax_config(directory: Path) -> ModelConfig:
    """The config that `save_orbax` wrote.

    Raises:
        WeightsError: if it is corrupt or of another version.
    """
    path = directory / ORBAX_CONFIG
    stated = read_json(path)
    try:
        return ModelConfig(rope=RopeConfig(**stated.pop("rope")), **stated)
    except (TypeError, KeyError) as error:
        raise WeightsError(f"{path} is of another version ({error}); convert the model again.") from error


def load_orbax_params(directory: Path, config: ModelConfig, dtype: jnp.dtype, shardings: Params) -> Params:
    """Restore every leaf to its devices in `dtype`.

    Where a KV head has copies, the devices that hold one of them read all of its query group, and each keeps its part.

    Raises:
        WeightsError: if the arrays are missing, corrupt or do not fit the config.
    """
    import orbax.checkpoint as ocp

    path, copies = directory.absolute() / _PARAMS, config.kv_head_copies
    stored = replace(config, num_kv_heads=config.num_kv_heads // copies, kv_head_copies=1)
    wanted = jax.tree.map(
        lambda spec, sharding: jax.ShapeDtypeStruct(spec.shape, dtype, sharding=_stored(spec, sharding, copies)),
        abstract_params(stored),
        shardings,
        is_leaf=lambda leaf: isinstance(leaf, ParamSpec),
    )
    # How much is read at once: the largest leaf, as it may be stored in float32.
    largest = max(math.prod(leaf.shape) for leaf in jax.tree.leaves(wanted))
    handler = ocp.StandardCheckpointHandler(restore_concurrent_gb=math.ceil(largest * 4 / 1e9))
    try:
        with ocp.Checkpointer(handler) as checkpointer:
            _check_shapes(path, checkpointer.metadata(path).item_metadata.tree, wanted)
            restored = checkpointer.restore(path, args=ocp.args.StandardRestore(wanted))
    except WeightsError:
        raise
    except Exception as error:  # Orbax raises many classes, also the bare one
        raise WeightsError(f"{path} cannot be restored ({reason(error)}); convert the model again.") from error
    return jax.tree.map(
        lambda spec, sharding, leaf: _with_copies(leaf, spec, sharding, stored.group_size, copies),
        abstract_params(stored),
        shardings,
        restored,
        is_leaf=lambda leaf: isinstance(leaf, ParamSpec),
    )


def _stored(spec: ParamSpec, sharding: Sharding, copies: int) -> Sharding:
    """The sharding of a leaf as it is stored: by KV head, with `copies` devices in a row holding the same one."""
    if copies == 1 or _KV_HEADS not in spec.axes:
        return sharding
    shards = cast(Mesh, cast(NamedSharding, sharding).mesh)  # KV heads are copied on a mesh only
    mesh = Mesh(shards.devices.reshape(-1, copies), (_KV_HEADS, "copies"))
    return NamedSharding(mesh, PartitionSpec(*(axis if axis == _KV_HEADS else None for axis in spec.axes)))


def _with_copies(leaf: jax.Array, spec: ParamSpec, sharding: Sharding, group_size: int, copies: int) -> jax.Array:
    """[.., K, G (+ 2), ..] -> [.., K * copies, G / copies (+ 2), ..]: queries are dealt out, key and value copied."""
    if copies == 1 or _KV_HEADS not in spec.axes:
        return leaf
    axis = spec.axes.index(_KV_HEADS)

    def copy(stored: jax.Array) -> jax.Array:
        queries, others = jnp.split(stored, [group_size], axis + 1)
        before, (heads, _, *after) = stored.shape[:axis], stored.shape[axis:]
        dealt = queries.reshape(*before, heads * copies, group_size // copies, *after)
        return jnp.concatenate([dealt, jnp.repeat(others, copies, axis)], axis + 1)

    return jax.jit(copy, out_shardings=sharding)(leaf)


def _check_shapes(path: Path, stored: Any, wanted: Params) -> None:
    """Compare names and shapes before anything is read."""

    def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
        return {jax.tree_util.keystr(p): tuple(x.shape) for p, x in jax.tree_util.tree_leaves_with_path(tree)}

    found, expected = shapes(stored), shapes(wanted)
    wrong = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
    if wrong:
        raise WeightsError(
            f"{path} does not fit {ORBAX_CONFIG}: {len(wrong)} arrays are missing, left over or of a wrong "
            f"shape: {first_few(wrong)}. Convert the model again."
        )


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
