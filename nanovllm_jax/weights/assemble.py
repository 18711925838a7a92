"""Tensors of a checkpoint into leaves of the params pytree, one leaf at a time.

Each leaf has one recipe: the tensors it is made of (by their Hugging Face names), how the host lays them side
by side, and the order its axes then take. Transposition and cast run on the device: one host core transposes
0.2 GB/s.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from nanovllm_jax.config import ModelConfig
from nanovllm_jax.errors import WeightsError
from nanovllm_jax.models.params import Params
from nanovllm_jax.weights.messages import first_few

# Buffers that some checkpoints carry and that are computed here.
_HARMLESS = re.compile(r"rotary_emb\.inv_freq$")


class TensorReader(Protocol):
    """Tensors by their Hugging Face names, in Hugging Face's layout."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Name and shape of every tensor."""
        ...

    def read(self, name: str) -> np.ndarray:
        """The tensor on the host, of any floating-point dtype."""
        ...


@dataclass(frozen=True)
class Recipe:
    """One leaf: `join` lays the tensors side by side, then axis i of the leaf is axis `axes[i]` of that."""

    tensors: dict[str, tuple[int, ...]]
    join: Callable[..., np.ndarray]
    axes: tuple[int, ...] | None = None


def recipes(config: ModelConfig) -> Params:
    """The recipe of every leaf, in the structure of `abstract_params`."""
    V, E = config.vocab_size, config.hidden_size
    params: Params = {
        "embed": _whole("model.embed_tokens.weight", V, E),
        "layers": [_layer(config, f"model.layers.{layer}") for layer in range(config.num_layers)],
        "final_norm": _whole("model.norm.weight", E),
    }
    if not config.tie_word_embeddings:
        params["lm_head"] = _whole("lm_head.weight", V, E)
    return params


def _whole(name: str, *shape: int) -> Recipe:
    return Recipe({name: shape}, lambda tensor: tensor)


def _layer(config: ModelConfig, layer: str) -> dict[str, Recipe]:
    E, F, H = config.hidden_size, config.intermediate_size, config.num_heads
    K, G, D = config.num_kv_heads, config.group_size, config.head_dim
    attention, mlp = f"{layer}.self_attn", f"{layer}.mlp"

    def qkv(kind: str, *rest: int, axes: tuple[int, ...] | None = None) -> Recipe:
        """[H * D, *rest] and twice [K / copies * D, *rest] -> [K, G + 2, D, *rest]."""
        copies = config.kv_head_copies

        def join(q: np.ndarray, *kv: np.ndarray) -> np.ndarray:
            parts = [np.repeat(part.reshape(-1, 1, D, *rest), copies, axis=0) for part in kv]
            return np.concatenate([q.reshape(K, G, D, *rest), *parts], axis=1)

        sizes = {"q": H * D, "k": K // copies * D, "v": K // copies * D}
        return Recipe({f"{attention}.{x}_proj.{kind}": (n, *rest) for x, n in sizes.items()}, join, axes)

    def gate_up(kind: str, *shape: int, axes: tuple[int, ...] | None = None) -> Recipe:
        """Twice [F, ...] -> [2, F, ...]."""
        tensors = {f"{mlp}.{name}_proj.{kind}": shape for name in ("gate", "up")}
        return Recipe(tensors, lambda *parts: np.stack(parts), axes)

    o, down = f"{attention}.o_proj", f"{mlp}.down_proj"
    leaves = {
        "input_norm": _whole(f"{layer}.input_layernorm.weight", E),
        "qkv": qkv("weight", E, axes=(3, 0, 1, 2)),
        "o": Recipe({f"{o}.weight": (E, H * D)}, lambda x: x.reshape(E, K, G, D), (1, 2, 3, 0)),
        "post_norm": _whole(f"{layer}.post_attention_layernorm.weight", E),
        "gate_up": gate_up("weight", F, E, axes=(2, 0, 1)),
        "down": Recipe({f"{down}.weight": (E, F)}, lambda x: x, (1, 0)),
    }
    if config.qkv_bias:
        leaves["qkv_bias"] = qkv("bias")
    if config.qk_norm:
        leaves["q_norm"] = _whole(f"{attention}.q_norm.weight", D)
        leaves["k_norm"] = _whole(f"{attention}.k_norm.weight", D)
    if config.kv_cache_scales:  # one for all heads of a layer
        for name in ("k_scale", "v_scale"):
            leaves[name] = Recipe({f"{attention}.{name}": (1,)}, lambda scale: np.repeat(scale, K))
    if config.o_bias:
        leaves["o_bias"] = _whole(f"{o}.bias", E)
    if config.mlp_bias:
        leaves["gate_up_bias"] = gate_up("bias", F)
        leaves["down_bias"] = _whole(f"{down}.bias", E)
    return leaves


def assemble(reader: TensorReader, config: ModelConfig, dtype: jnp.dtype, shardings: Params) -> Params:
    """Read, join and put on the devices one leaf after the other; the host holds one leaf at a time.

    Args:
        reader: the checkpoint's tensors.
        config: the model's shape.
        dtype: of every leaf.
        shardings: pytree of shardings in the structure of `abstract_params(config)`.

    Raises:
        WeightsError: naming tensors that are missing, left over or of another shape than the config's.
    """
    tree = recipes(config)
    _check(reader, config, tree)

    def leaf(recipe: Recipe, sharding: Sharding) -> jax.Array:
        joined = recipe.join(*map(reader.read, recipe.tensors))
        placed = jax.device_put(joined, _before_transpose(sharding, recipe.axes))
        del joined
        if recipe.axes is not None or placed.dtype != dtype:
            placed = _finisher(recipe.axes, dtype, sharding)(placed)
        # Waiting keeps the host at one leaf, and the device at one that is not yet transposed.
        return placed.block_until_ready()

    return jax.tree.map(leaf, tree, shardings, is_leaf=lambda x: isinstance(x, Recipe))


@lru_cache(maxsize=64)
def _finisher(axes: tuple[int, ...] | None, dtype: jnp.dtype, sharding: Sharding) -> Callable[[jax.Array], jax.Array]:
    """Transpose and cast on the device: leaves of all layers share one compiled function."""

    def finish(joined: jax.Array) -> jax.Array:
        return (joined if axes is None else joined.transpose(axes)).astype(dtype)

    return jax.jit(finish, out_shardings=sharding)


def _before_transpose(sharding: Sharding, axes: tuple[int, ...] | None) -> Sharding:
    """The sharding that the transposition by `axes` turns into `sharding`: no data moves between devices."""
    if axes is None or not isinstance(sharding, NamedSharding):
        return sharding
    names = [*sharding.spec, *[None] * (len(axes) - len(sharding.spec))]
    return NamedSharding(sharding.mesh, PartitionSpec(*(names[axes.index(i)] for i in range(len(axes)))))


def _check(reader: TensorReader, config: ModelConfig, tree: Params) -> None:
    """Compare names and shapes with the recipes before anything is read."""
    expected: dict[str, tuple[int, ...]] = {}
    for recipe in _leaves(tree):
        expected |= recipe.tensors
    found = dict(reader.shapes)
    if config.tie_word_embeddings and "lm_head.weight" in found and _head_equals_embedding(reader):
        del found["lm_head.weight"]
    missing = [name for name in expected if name not in found]
    left_over = [name for name in found if name not in expected and not _HARMLESS.search(name)]
    wrong = [
        f"{name} is {list(found[name])}, not {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    problems = [
        f"{len(names)} tensors {what}: {first_few(names)}"
        for names, what in ((missing, "missing"), (left_over, "left over"), (wrong, "of a wrong shape"))
        if names
    ]
    if problems:
        raise WeightsError(
            f"The weights do not fit the model's config ({config.family}, {config.num_layers} layers): "
            f"{'; '.join(problems)}. Use a checkpoint and a config that belong together."
        )


def _leaves(tree: Params) -> Iterator[Any]:
    yield from jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, Recipe))


def _head_equals_embedding(reader: TensorReader) -> bool:
    """Whether a checkpoint with a tied head stores the embedding twice."""
    head, embedding = reader.read("lm_head.weight"), reader.read("model.embed_tokens.weight")
    return np.array_equal(head, embedding)
