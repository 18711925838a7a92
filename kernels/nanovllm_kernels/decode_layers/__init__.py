"""All transformer layers of one row's decode step in one kernel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nanovllm_kernels._checks import check_backend, check_cache, check_int32, check_shape
from nanovllm_kernels._compat import current_target, import_jax_triton
from nanovllm_kernels.decode_layers.reference import decode_layers_xla

Shaped = Array | jax.ShapeDtypeStruct
_REQUIRED = ("input_norm", "qkv", "o", "post_norm", "gate_up", "down")
_OPTIONAL = ("qkv_bias", "q_norm", "k_norm")


def decode_layers(
    x: Float[Array, "1 E"],
    layers: Sequence[Mapping[str, Array]],
    cos: Float[Array, "1 half"],
    sin: Float[Array, "1 half"],
    caches: Sequence[tuple[Float[Array, "N K block_size D"], Float[Array, "N K block_size D"]]],
    block_tables: Int[Array, "1 P"],
    context_lens: Int[Array, "1"],
    *,
    eps: float,
    scale: float,
    sliding_window: int | None = None,
    backend: Literal["xla", "triton"],
) -> tuple[Float[Array, "1 E"], list[tuple[Float[Array, "N K block_size D"], Float[Array, "N K block_size D"]]]]:
    """Hidden states of a row's newest token after some layers, and the caches with its keys and values written.

    E hidden states, K KV heads, G query heads for each, D head dim, F MLP width, P blocks of the row. A layer is

        x += o(attention(rotate(norm(heads of q and k)), cache)), of the heads rms_norm(x) @ qkv + qkv_bias
        x += (silu(gate) * up) @ down, of gate and up of rms_norm(x) @ gate_up

    as `skinny_matmul` and `rope_paged_decode` say it in full. The newest token is at position
    `context_lens[0] - 1`, in block `block_tables[0, position // block_size]`, whose slot is written; 0 marks a padding
    row, which writes nothing and attends to nothing. In place when the caches are donated to the enclosing jit.

    Args:
        x: hidden states.
        layers: of each `input_norm` [E], `qkv` [E, K, G + 2, D], `o` [K, G, D, E], `post_norm` [E], `gate_up`
            [E, 2, F] and `down` [F, E]; where the model has them `qkv_bias` [K, G + 2, D], `q_norm` [D] and
            `k_norm` [D]. All layers have the same shapes.
        cos: of the rotary angles, float32.
        sin: likewise.
        caches: keys and values of each layer.
        block_tables: blocks of the row.
        context_lens: tokens of the row, the newest included.
        eps: of all norms.
        scale: of the scores.
        sliding_window: how many of the newest tokens are seen; None means all.
        backend: "triton" takes what `decode_layers_supports` says. Its programs wait for each other, so all of them,
            one a multiprocessor, must come to run: no two such kernels may run on a GPU at the same time. If one gives
            up waiting, after a tenth of a second or a few, the hidden states are NaN.

    Raises:
        ValueError: if shapes or dtypes do not fit together, the backend is unknown, or the Triton implementation is
            asked for something that it does not support.
        ImportError: if the Triton implementation is asked for where triton or jax-triton is missing.
        RuntimeError: if it is asked for where no GPU is, outside `lowering_for`.
    """
    check_backend(backend)
    if len(layers) != len(caches) or not layers:
        raise ValueError(f"there are {len(layers)} layers and {len(caches)} caches; give one cache a layer.")
    for weights, cache in zip(layers, caches, strict=True):
        _check(x, weights, cos, sin, *cache, block_tables, context_lens)
    options = {"eps": eps, "scale": scale, "sliding_window": sliding_window}
    args = x, layers, cos, sin, caches, block_tables, context_lens
    if backend == "xla":
        return decode_layers_xla(*args, **options)
    if not decode_layers_supports(layers, caches):
        weights, (k_cache, _) = layers[0], caches[0]
        shapes = ", ".join(f"{name} {array.dtype}{list(array.shape)}" for name, array in sorted(weights.items()))
        raise ValueError(
            f"backend='triton' takes equal bfloat16 layers of about a thousand hidden states and a power of two as "
            f"head dim, not {shapes} with a cache {k_cache.dtype}{list(k_cache.shape)}; use backend='xla'."
        )
    from nanovllm_kernels.decode_layers.triton import decode_layers_triton

    return decode_layers_triton(*args, **options)


def decode_layers_supports(layers: Sequence[Mapping[str, Shaped]], caches: Sequence[tuple[Shaped, Shaped]]) -> bool:
    """Whether the Triton implementation takes such layers on the GPU at hand.

    Each of the GPU's multiprocessors must be able to hold its part of each weight in registers.
    """
    import_jax_triton()
    from nanovllm_kernels.decode_layers.launch import launch_parameters, tilings

    weights, k_cache = layers[0], caches[0][0]
    shapes = [{name: array.shape for name, array in layer.items()} for layer in layers]
    if any(other != shapes[0] for other in shapes) or any(cache.shape != k_cache.shape for cache, _ in caches):
        return False
    known = set(_REQUIRED) <= set(weights) <= {*_REQUIRED, *_OPTIONAL}
    narrow = all(array.dtype == jnp.bfloat16 for array in jax.tree.leaves(([dict(layer) for layer in layers], caches)))
    head_dim = k_cache.shape[3]
    if not (known and narrow) or head_dim < 16 or head_dim & (head_dim - 1):
        return False
    launch = launch_parameters(current_target(), k_cache.shape[1])
    return k_cache.shape[1] <= launch.programs and tilings(launch, weights).fit(launch.programs)


def _check(
    x: Array,
    weights: Mapping[str, Array],
    cos: Array,
    sin: Array,
    k_cache: Array,
    v_cache: Array,
    block_tables: Array,
    context_lens: Array,
) -> None:
    check_cache(k_cache, v_cache)
    check_int32(block_tables=block_tables, context_lens=context_lens)
    if x.ndim != 2 or x.shape[0] != 1:
        raise ValueError(f"x has shape {x.shape}; it must be [1, E]: one row.")
    missing = [name for name in _REQUIRED if name not in weights]
    if missing:
        raise ValueError(f"weights lack {', '.join(missing)}; they must have {', '.join(_REQUIRED)}.")
    width, (_, num_kv_heads, _, head_dim) = x.shape[1], k_cache.shape
    heads, mlp = weights["qkv"].shape[-2], weights["down"].shape[0]
    for name, shape, letters in (
        ("input_norm", (width,), "E"),
        ("qkv", (width, num_kv_heads, heads, head_dim), "E, K, G + 2, D"),
        ("qkv_bias", (num_kv_heads, heads, head_dim), "K, G + 2, D"),
        ("q_norm", (head_dim,), "D"),
        ("k_norm", (head_dim,), "D"),
        ("o", (num_kv_heads, heads - 2, head_dim, width), "K, G, D, E"),
        ("post_norm", (width,), "E"),
        ("gate_up", (width, 2, mlp), "E, 2, F"),
        ("down", (mlp, width), "F, E"),
    ):
        if name in weights:
            check_shape(name, weights[name], shape, letters)
    for name, array in (("cos", cos), ("sin", sin)):
        check_shape(name, array, (1, head_dim // 2), "1, D / 2")
    if ("q_norm" in weights) != ("k_norm" in weights):
        raise ValueError("q_norm and k_norm go together: give both or neither.")
    if block_tables.ndim != 2 or block_tables.shape[0] != 1:
        raise ValueError(f"block_tables has shape {block_tables.shape}; it must be [1, P].")
    check_shape("context_lens", context_lens, (1,), "1")
