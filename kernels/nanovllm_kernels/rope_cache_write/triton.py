"""Triton implementation: a program takes a tile of tokens of one KV head, with its query heads, key and value."""

# ruff: noqa: ANN001, ANN201 (what a device function takes are Triton's values, which have no Python type)

from __future__ import annotations

from typing import no_type_check

import jax
import triton
import triton.language as tl
from jaxtyping import Array, Float, Int

from nanovllm_kernels._compat import current_target, triton_call, update_in_place
from nanovllm_kernels._device import load_scale, to_cache
from nanovllm_kernels._integers import ceil_div, next_power_of_2

_NUM_WARPS = 4
# Elements of half a head a program: one 16-byte load for each of its 128 threads in bfloat16.
_TILE_ELEMENTS = 1024


@triton.jit
@no_type_check
def rope_cache_write_kernel(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    q_norm_ptr,
    k_norm_ptr,
    k_scale_ptr,
    v_scale_ptr,
    slots_ptr,
    k_cache_ptr,
    v_cache_ptr,
    num_tokens,
    num_slots,
    num_kv_heads,
    q_ptr,
    EPS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HALF: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    TILE_HALF: tl.constexpr,
    NORM: tl.constexpr,
    SCALED: tl.constexpr,
):
    dtype = qkv_ptr.dtype.element_ty
    # Programs that share cos and sin are neighbours: all but one find them in L2.
    kv_head = tl.program_id(0)
    tokens = tl.program_id(1) * TILE_TOKENS + tl.arange(0, TILE_TOKENS)
    dims = tl.arange(0, TILE_HALF)
    present = tokens < num_tokens
    mask = present[:, None] & (dims[None, :] < HALF)
    slots = tl.load(slots_ptr + tokens, mask=present, other=-1)
    written = mask & ((slots >= 0) & (slots < num_slots))[:, None]
    slot_row = ((slots // BLOCK_SIZE).to(tl.int64) * num_kv_heads + kv_head) * BLOCK_SIZE + slots % BLOCK_SIZE
    target = (slot_row * (2 * HALF))[:, None] + dims[None, :]
    group_row = tokens.to(tl.int64) * num_kv_heads + kv_head
    angles = (tokens * HALF)[:, None] + dims[None, :]
    cos = tl.load(cos_ptr + angles, mask=mask, other=0.0)
    sin = tl.load(sin_ptr + angles, mask=mask, other=0.0)
    k_scale = load_scale(k_scale_ptr, kv_head, SCALED)
    v_scale = load_scale(v_scale_ptr, kv_head, SCALED)

    for head in tl.static_range(GROUP + 1):
        source = qkv_ptr + ((group_row * (GROUP + 2) + head) * (2 * HALF))[:, None] + dims[None, :]
        first = tl.load(source, mask=mask, other=0.0).to(tl.float32)
        second = tl.load(source + HALF, mask=mask, other=0.0).to(tl.float32)
        if NORM:
            norm_ptr = q_norm_ptr if head < GROUP else k_norm_ptr
            square = tl.sum(first * first, 1) + tl.sum(second * second, 1)
            scale = tl.rsqrt(square / (2 * HALF) + EPS)[:, None]
            first_weight = tl.load(norm_ptr + dims, mask=dims < HALF, other=0.0).to(tl.float32)[None, :]
            second_weight = tl.load(norm_ptr + HALF + dims, mask=dims < HALF, other=0.0).to(tl.float32)[None, :]
            # Rounded to the model's dtype before and after the weight, as the reference does.
            first = ((first * scale).to(dtype).to(tl.float32) * first_weight).to(dtype).to(tl.float32)
            second = ((second * scale).to(dtype).to(tl.float32) * second_weight).to(dtype).to(tl.float32)
        low = (first * cos - second * sin).to(dtype)
        high = (second * cos + first * sin).to(dtype)
        if head < GROUP:
            out = q_ptr + ((group_row * GROUP + head) * (2 * HALF))[:, None] + dims[None, :]
            tl.store(out, low, mask=mask)
            tl.store(out + HALF, high, mask=mask)
        else:
            tl.store(k_cache_ptr + target, to_cache(low, k_cache_ptr, k_scale), mask=written)
            tl.store(k_cache_ptr + target + HALF, to_cache(high, k_cache_ptr, k_scale), mask=written)

    source = qkv_ptr + ((group_row * (GROUP + 2) + GROUP + 1) * (2 * HALF))[:, None] + dims[None, :]
    low = tl.load(source, mask=written, other=0.0)
    high = tl.load(source + HALF, mask=written, other=0.0)
    tl.store(v_cache_ptr + target, to_cache(low, v_cache_ptr, v_scale), mask=written)
    tl.store(v_cache_ptr + target + HALF, to_cache(high, v_cache_ptr, v_scale), mask=written)


def rope_cache_write_triton(
    qkv: Float[Array, "T K heads D"],
    cos: Float[Array, "T half"],
    sin: Float[Array, "T half"],
    k_cache: Float[Array, "N K block_size D"],
    v_cache: Float[Array, "N K block_size D"],
    slots: Int[Array, " T"],
    *,
    q_norm: Float[Array, " D"] | None,
    k_norm: Float[Array, " D"] | None,
    eps: float,
    k_scale: Float[Array, " K"] | None,
    v_scale: Float[Array, " K"] | None,
) -> tuple[Float[Array, "T H D"], Float[Array, "N K block_size D"], Float[Array, "N K block_size D"]]:
    num_tokens, num_kv_heads, heads, head_dim = qkv.shape
    num_blocks, _, block_size, _ = k_cache.shape
    group, half = heads - 2, head_dim // 2
    tile_half = next_power_of_2(half)
    # A decode step has few tokens: smaller tiles then, so that every multiprocessor takes some.
    spread = next_power_of_2(num_tokens * num_kv_heads // current_target().multiprocessors)
    tile_tokens = max(1, min(_TILE_ELEMENTS // tile_half, spread))
    queries = []

    def launch(k_cache: jax.Ref, v_cache: jax.Ref) -> None:
        # Where there are no norms or scales, `slots` stands in for pointers that are not read.
        queries.append(
            triton_call(
                qkv,
                cos,
                sin,
                slots if q_norm is None else q_norm,
                slots if k_norm is None else k_norm,
                slots if k_scale is None else k_scale,
                slots if v_scale is None else v_scale,
                slots,
                k_cache,
                v_cache,
                num_tokens,
                num_blocks * block_size,
                num_kv_heads,
                kernel=rope_cache_write_kernel,
                out_type=jax.ShapeDtypeStruct((num_tokens, num_kv_heads * group, head_dim), qkv.dtype),
                grid=(num_kv_heads, ceil_div(num_tokens, tile_tokens)),
                num_warps=_NUM_WARPS,
                num_stages=1,
                EPS=eps,
                GROUP=group,
                BLOCK_SIZE=block_size,
                HALF=half,
                TILE_TOKENS=tile_tokens,
                TILE_HALF=tile_half,
                NORM=q_norm is not None,
                SCALED=k_scale is not None,
            )
        )

    new_k_cache, new_v_cache = update_in_place(launch, k_cache, v_cache)
    return queries[0], new_k_cache, new_v_cache
