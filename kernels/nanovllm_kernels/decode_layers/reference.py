"""XLA implementation: the layers' operations one after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jaxtyping import Array, Float, Int

from nanovllm_kernels.rope_paged_decode import rope_paged_decode
from nanovllm_kernels.skinny_matmul import skinny_matmul


def decode_layers_xla(
    x: Float[Array, "1 E"],
    layers: Sequence[Mapping[str, Array]],
    cos: Float[Array, "1 half"],
    sin: Float[Array, "1 half"],
    caches: Sequence[tuple[Array, Array]],
    block_tables: Int[Array, "1 P"],
    context_lens: Int[Array, "1"],
    *,
    eps: float,
    scale: float,
    sliding_window: int | None,
) -> tuple[Float[Array, "1 E"], list[tuple[Array, Array]]]:
    options = {"eps": eps, "scale": scale, "sliding_window": sliding_window}
    new_caches = []
    for weights, cache in zip(layers, caches, strict=True):
        x, cache = _layer(x, weights, cos, sin, *cache, block_tables, context_lens, **options)
        new_caches.append(cache)
    return x, new_caches


def _layer(
    x: Float[Array, "1 E"],
    weights: Mapping[str, Array],
    cos: Float[Array, "1 half"],
    sin: Float[Array, "1 half"],
    k_cache: Float[Array, "N K block_size D"],
    v_cache: Float[Array, "N K block_size D"],
    block_tables: Int[Array, "1 P"],
    context_lens: Int[Array, "1"],
    *,
    eps: float,
    scale: float,
    sliding_window: int | None,
) -> tuple[Float[Array, "1 E"], tuple[Array, Array]]:
    width, qkv = x.shape[1], weights["qkv"]
    bias = weights["qkv_bias"].reshape(-1) if "qkv_bias" in weights else None
    flat_qkv = qkv.reshape(width, -1)
    heads = skinny_matmul(x, flat_qkv, norm=weights["input_norm"], eps=eps, bias=bias, backend="xla")
    norms = {"q_norm": weights.get("q_norm"), "k_norm": weights.get("k_norm"), "eps": eps}
    rows = heads.reshape(1, *qkv.shape[1:]), cos, sin, k_cache, v_cache, block_tables, context_lens
    seen = {"scale": scale, "sliding_window": sliding_window}
    attended, k_cache, v_cache = rope_paged_decode(*rows, **seen, **norms, backend="xla")
    x = skinny_matmul(attended.reshape(1, -1), weights["o"].reshape(-1, width), residual=x, backend="xla")
    gated = skinny_matmul(x, weights["gate_up"], norm=weights["post_norm"], eps=eps, backend="xla")
    return skinny_matmul(gated, weights["down"], residual=x, backend="xla"), (k_cache, v_cache)
