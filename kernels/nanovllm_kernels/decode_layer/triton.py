"""Triton implementation: one kernel whose programs, one a multiprocessor, go through the layer together."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nanovllm_kernels._compat import current_target, triton_call, update_in_place
from nanovllm_kernels._device import ceil_div, next_power_of_2
from nanovllm_kernels.decode_layer.launch import Launch, launch_parameters, tilings
from nanovllm_kernels.decode_layer.one_row import one_row_kernel
from nanovllm_kernels.decode_layer.rows import rows_kernel
from nanovllm_kernels.paged_decode.triton import plan_pieces

# Of the shared words: whether a wait failed and four barriers' counters, padded to what vector loads want.
_OWN_WORDS = 8
_MOST_MERGED = 16  # pieces that are read at a time where a row's are merged


def num_words(num_rows: int, weights: Mapping[str, Array], k_cache: Array) -> int:
    """int32 words that the programs of a layer share."""
    _, num_kv_heads, _, head_dim = k_cache.shape
    tiles = tilings(launch_parameters(current_target(), num_rows, num_kv_heads), weights)
    if num_rows > 1:  # a counter for each KV head of each row, or each tile of columns
        columns = max(ceil_div(tiling.outputs, tiling.cols) for tiling in (tiles.o, tiles.down))
        return _OWN_WORDS + max(num_rows * num_kv_heads, columns)
    sums = tiles.o.splits * tiles.o.outputs + tiles.down.splits * tiles.down.outputs
    pieces = _MOST_MERGED * (tiles.o.inputs + tiles.o.inputs // head_dim)
    return _OWN_WORDS + 2 * (tiles.qkv.outputs + pieces + sums + tiles.down.inputs)


def decode_layer_triton(
    x: Float[Array, "B E"],
    weights: Mapping[str, Array],
    cos: Float[Array, "B half"],
    sin: Float[Array, "B half"],
    k_cache: Float[Array, "N K block_size D"],
    v_cache: Float[Array, "N K block_size D"],
    block_tables: Int[Array, "B P"],
    context_lens: Int[Array, " B"],
    *,
    eps: float,
    scale: float,
    sliding_window: int | None,
    words: jax.Ref,
    call: Int[Array, ""],
    next_qkv: Array | None,
    launch: Launch | None = None,
) -> tuple[Float[Array, "B E"], Float[Array, "N K block_size D"], Float[Array, "N K block_size D"]]:
    num_rows, width = x.shape
    _, num_kv_heads, block_size, head_dim = k_cache.shape
    group, mlp = weights["qkv"].shape[2] - 2, weights["down"].shape[0]
    launch = launch or launch_parameters(current_target(), num_rows, num_kv_heads)
    tiles = tilings(launch, weights)
    window = sliding_window or 0
    useful = num_rows * ceil_div(block_tables.shape[1] * block_size, launch.tile_tokens)
    most_pieces = min(launch.most_pieces, useful)
    plan, rows = plan_pieces(context_lens, window=window, tile_tokens=launch.tile_tokens, most_pieces=most_pieces)
    num_pieces = jnp.sum(rows[:, 1], dtype=jnp.int32)
    out = jax.ShapeDtypeStruct((num_rows, width), x.dtype)
    constants = {
        "grid": (launch.programs,),
        "num_warps": launch.num_warps,
        "num_stages": 1,
        "PROGRAMS": launch.programs,
        "FIRST": 0,
        "EPS": eps,
        "SCALE": scale,
        "WINDOW": window,
        "GROUP": group,
        "BLOCK_SIZE": block_size,
        "HEAD_DIM": head_dim,
        "TILE_TOKENS": launch.tile_tokens,
        "STAGES": launch.stages,
        "PIECES": _MOST_MERGED,
        "READ_AHEAD": launch.read_ahead,
        "OWN_WORDS": _OWN_WORDS,
        **tiles.constants,
    }
    names = ("input_norm", "qkv", "qkv_bias", "q_norm", "k_norm", "o", "post_norm", "gate_up", "down")
    inputs = (x, *map(weights.get, names), next_qkv, cos, sin, block_tables, plan, rows, num_pieces)
    results = []

    def one_row(k_cache: jax.Ref, v_cache: jax.Ref) -> None:
        results.append(
            triton_call(
                *inputs,
                call,
                words,
                k_cache,
                v_cache,
                num_kv_heads,
                block_tables.shape[1],
                kernel=one_row_kernel,
                out_type=(out,),
                LAST=5,
                TILE_HEADS=next_power_of_2(group + 2),
                **constants,
            )
        )

    def several_rows(k_cache: jax.Ref, v_cache: jax.Ref) -> None:
        num_heads, scratch = num_kv_heads * group, jax.ShapeDtypeStruct
        pieces = num_rows + most_pieces
        results.append(
            triton_call(
                *inputs,
                words,
                k_cache,
                v_cache,
                num_rows,
                num_kv_heads,
                block_tables.shape[1],
                kernel=rows_kernel,
                out_type=(
                    out,
                    scratch((num_rows, num_kv_heads, group + 2, head_dim), x.dtype),
                    scratch((pieces, num_heads, head_dim), jnp.float32),
                    scratch((pieces, num_heads), jnp.float32),
                    scratch((num_rows, num_heads, head_dim), x.dtype),
                    out,
                    scratch((num_rows, mlp), x.dtype),
                    scratch((tiles.o.splits, num_rows, width), jnp.float32),
                    scratch((tiles.down.splits, num_rows, width), jnp.float32),
                ),
                LAST=4,
                TILE_ROWS=launch.tile_rows,
                SLICES=launch.slices,
                TILE_HEADS=max(16, next_power_of_2(group)),
                **constants,
            )
        )

    caches = update_in_place(one_row if num_rows == 1 else several_rows, k_cache, v_cache)
    return results[0][0], *caches
