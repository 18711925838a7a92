"""Triton implementation: one program copies a tile of tokens of one KV head to their slots, in place."""

# ruff: noqa: ANN001, ANN201 (what a device function takes are Triton's values, which have no Python type)

from __future__ import annotations

from typing import no_type_check

import jax
import triton
import triton.language as tl
from jaxtyping import Array, Float, Int

from nanovllm_kernels._compat import current_target, triton_call, update_in_place
from nanovllm_kernels._device import ceil_div, next_power_of_2

_NUM_WARPS = 4
# Elements of K (and of V) a program: two 16-byte loads for each of its 128 threads in bfloat16.
_TILE_ELEMENTS = 2048


@triton.jit
@no_type_check
def cache_write_kernel(
    k_ptr,
    v_ptr,
    slots_ptr,
    k_cache_ptr,
    v_cache_ptr,
    num_tokens,
    num_slots,
    num_kv_heads,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    TILE_DIM: tl.constexpr,
):
    tokens = tl.program_id(0) * TILE_TOKENS + tl.arange(0, TILE_TOKENS)
    kv_head = tl.program_id(1)
    dims = tl.arange(0, TILE_DIM)
    slots = tl.load(slots_ptr + tokens, mask=tokens < num_tokens, other=-1)
    written = (slots >= 0) & (slots < num_slots)
    mask = written[:, None] & (dims[None, :] < HEAD_DIM)
    source = ((tokens.to(tl.int64) * num_kv_heads + kv_head) * HEAD_DIM)[:, None] + dims[None, :]
    block = (slots // BLOCK_SIZE).to(tl.int64)
    row = (block * num_kv_heads + kv_head) * BLOCK_SIZE + slots % BLOCK_SIZE
    target = (row * HEAD_DIM)[:, None] + dims[None, :]
    k = tl.load(k_ptr + source, mask=mask)
    v = tl.load(v_ptr + source, mask=mask)
    tl.store(k_cache_ptr + target, k.to(k_cache_ptr.dtype.element_ty), mask=mask)
    tl.store(v_cache_ptr + target, v.to(v_cache_ptr.dtype.element_ty), mask=mask)


def cache_write_triton(
    k: Float[Array, "T K D"],
    v: Float[Array, "T K D"],
    k_cache: Float[Array, "N K block_size D"],
    v_cache: Float[Array, "N K block_size D"],
    slots: Int[Array, " T"],
) -> tuple[Float[Array, "N K block_size D"], Float[Array, "N K block_size D"]]:
    num_tokens, num_kv_heads, head_dim = k.shape
    num_blocks, _, block_size, _ = k_cache.shape
    tile_dim = next_power_of_2(head_dim)
    # A decode step has few tokens: smaller tiles then, so that every multiprocessor copies some.
    spread = next_power_of_2(num_tokens * num_kv_heads // current_target().multiprocessors)
    tile_tokens = max(1, min(_TILE_ELEMENTS // tile_dim, spread))

    def launch(k_cache: jax.Ref, v_cache: jax.Ref) -> None:
        triton_call(
            k,
            v,
            slots,
            k_cache,
            v_cache,
            num_tokens,
            num_blocks * block_size,
            num_kv_heads,
            kernel=cache_write_kernel,
            out_type=(),
            grid=(ceil_div(num_tokens, tile_tokens), num_kv_heads),
            num_warps=_NUM_WARPS,
            num_stages=1,
            BLOCK_SIZE=block_size,
            HEAD_DIM=head_dim,
            TILE_TOKENS=tile_tokens,
            TILE_DIM=tile_dim,
        )

    new_k_cache, new_v_cache = update_in_place(launch, k_cache, v_cache)
    return new_k_cache, new_v_cache
