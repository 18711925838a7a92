"""The parameters of a model, described once: serves initialisation, loading and sharding.

Parameters are plain dicts and lists of arrays. Query, key and value heads are one leaf `qkv` [E, K, G + 2, D] (for
each KV head its G query heads, its key, its value) and the gated MLP's two inputs one leaf `gate_up` [E, 2, F]: one
product each, and every leaf splits over a tensor-parallel axis along K, F or V without reordering.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from nanovllm_jax.config import ModelConfig

Params = dict[str, Any]
_BLOCK = 1 << 22  # random numbers that repeat in random weights


@dataclass(frozen=True)
class ParamSpec:
    """One leaf: shape, and for each axis its logical name or None (mapped to mesh axes in `parallel.mesh`)."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]


def head_weight(params: Params) -> Any:
    """The leaf of the output head [V, E], which is the embedding where they are tied."""
    return params["lm_head"] if "lm_head" in params else params["embed"]


def abstract_params(config: ModelConfig) -> Params:
    """The pytree of `ParamSpec`s of a model. `lm_head` is absent when the embedding is tied to it."""
    E, F, V = config.hidden_size, config.intermediate_size, config.vocab_size
    K, G, D = config.num_kv_heads, config.group_size, config.head_dim
    layer = {
        "input_norm": ParamSpec((E,), (None,)),
        "qkv": ParamSpec((E, K, G + 2, D), (None, "kv_heads", None, None)),
        "o": ParamSpec((K, G, D, E), ("kv_heads", None, None, None)),
        "post_norm": ParamSpec((E,), (None,)),
        "gate_up": ParamSpec((E, 2, F), (None, None, "mlp")),
        "down": ParamSpec((F, E), ("mlp", None)),
    }
    if config.qkv_bias:
        layer["qkv_bias"] = ParamSpec((K, G + 2, D), ("kv_heads", None, None))
    if config.qk_norm:
        layer |= {"q_norm": ParamSpec((D,), (None,)), "k_norm": ParamSpec((D,), (None,))}
    if config.o_bias:
        layer["o_bias"] = ParamSpec((E,), (None,))
    if config.mlp_bias:
        layer |= {"gate_up_bias": ParamSpec((2, F), (None, "mlp")), "down_bias": ParamSpec((E,), (None,))}
    if config.kv_cache_scales:
        layer |= {name: ParamSpec((K,), ("kv_heads",)) for name in ("k_scale", "v_scale")}
    params: Params = {
        "embed": ParamSpec((V, E), ("vocab", None)),
        "layers": [dict(layer) for _ in range(config.num_layers)],
        "final_norm": ParamSpec((E,), (None,)),
    }
    if not config.tie_word_embeddings:
        params["lm_head"] = ParamSpec((V, E), ("vocab", None))
    return params


def map_specs(function: Callable[[ParamSpec], Any], specs: Params) -> Params:
    """Apply `function` to every `ParamSpec` of the tree."""
    return jax.tree.map(function, specs, is_leaf=lambda leaf: isinstance(leaf, ParamSpec))


def param_bytes(config: ModelConfig, dtype: DTypeLike) -> int:
    """Bytes of all parameters held in `dtype`."""
    specs = jax.tree.leaves(abstract_params(config), is_leaf=lambda leaf: isinstance(leaf, ParamSpec))
    return sum(math.prod(spec.shape) for spec in specs) * jnp.dtype(dtype).itemsize


def random_params(config: ModelConfig, dtype: DTypeLike, seed: int, shardings: Params) -> Params:
    """Random weights for benchmarks of a shape: norms and scales are 1, the rest is normal with deviation 0.02.

    Made on the devices from one block of random numbers that repeats, so that nothing large comes from the host.

    Args:
        config: the model's shape.
        dtype: of every leaf.
        seed: equal seeds give equal weights, however they are split.
        shardings: pytree of shardings in the shape of `abstract_params`.
    """
    block = (np.random.default_rng(seed).standard_normal(_BLOCK, dtype=np.float32) * 0.02).astype(dtype)
    everywhere: dict[Any, jax.Array] = {}  # the block, by mesh
    fills: dict[Any, Callable[[jax.Array, int], jax.Array]] = {}

    def leaf(path: tuple[Any, ...], spec: ParamSpec, sharding: jax.sharding.NamedSharding) -> jax.Array:
        if "norm" in str(path[-1]) or "scale" in str(path[-1]):
            return jax.device_put(np.ones(spec.shape, dtype), sharding)
        if sharding.mesh not in everywhere:
            equal = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
            everywhere[sharding.mesh] = jax.device_put(block, equal)
        key = (spec.shape, sharding)
        if key not in fills:
            fills[key] = jax.jit(partial(_repeated, spec.shape), out_shardings=sharding)
        # A different start for each leaf, so that no two leaves are equal.
        return fills[key](everywhere[sharding.mesh], hash_path(path) % _BLOCK)

    return jax.tree_util.tree_map_with_path(
        leaf, abstract_params(config), shardings, is_leaf=lambda x: isinstance(x, ParamSpec)
    )


def _repeated(shape: tuple[int, ...], block: jax.Array, start: jax.Array) -> jax.Array:
    """The block over and over, from `start` on, in row-major order."""
    place, stride = start.astype(jnp.uint32), 1
    for axis in reversed(range(len(shape))):
        # What overflows is a multiple of the block's length.
        place += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride % _BLOCK)
        stride *= shape[axis]
    return block[place % _BLOCK]


def hash_path(path: tuple[Any, ...]) -> int:
    """A stable number for a leaf's place in the tree."""
    return sum(ord(char) * 7919 ** (i % 5 + 1) for i, char in enumerate(jax.tree_util.keystr(path)))
