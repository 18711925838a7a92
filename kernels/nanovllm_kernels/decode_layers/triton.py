"""Triton implementation: launch of the kernel in `device.py`, and the words that its programs share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nanovllm_kernels._compat import current_target, triton_call, update_in_place
from nanovllm_kernels._integers import ceil_div, next_power_of_2
from nanovllm_kernels.decode_layers.device import decode_layers_kernel
from nanovllm_kernels.decode_layers.launch import Launch, Tilings, launch_parameters, tilings

WEIGHTS = ("input_norm", "qkv", "qkv_bias", "q_norm", "k_norm", "o", "post_norm", "gate_up", "down")
MOST_LAYERS = 36  # whose addresses fit in the 4 KB that a kernel's arguments may take
_FLAGS = 4  # int32 before the words: whether a wait failed; padded to what a load of four takes


def words_a_layer(tiles: Tilings, most_pieces: int, head_dim: int) -> int:
    """Words of 32 bits for all that programs send each other in a layer, in multiples of what one load takes."""
    sums = tiles.o.splits * tiles.o.outputs + tiles.down.splits * tiles.down.outputs
    pieces = next_power_of_2(most_pieces) * (tiles.o.inputs + tiles.o.inputs // head_dim)
    return ceil_div(tiles.qkv.outputs + pieces + sums + tiles.down.inputs, _FLAGS) * _FLAGS


def num_words(launch: Launch, tiles: Tilings, num_layers: int, head_dim: int) -> int:
    """int32 elements that the programs share: flags, what all layers send, the addresses of all layers' arrays."""
    addresses = num_layers * (len(WEIGHTS) + 2)
    return _FLAGS + num_layers * words_a_layer(tiles, launch.most_pieces, head_dim) + 2 * addresses


def decode_layers_triton(
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
    launch: Launch | None = None,
) -> tuple[Float[Array, "1 E"], list[tuple[Array, Array]]]:
    new_caches: list[tuple[Array, Array]] = []
    for begin in range(0, len(layers), MOST_LAYERS):
        part = slice(begin, begin + MOST_LAYERS)
        options = {"eps": eps, "scale": scale, "window": sliding_window or 0, "launch": launch}
        x, some = _run(x, layers[part], cos, sin, caches[part], block_tables, context_lens, **options)
        new_caches += some
    return x, new_caches


def _run(
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
    window: int,
    launch: Launch | None,
) -> tuple[Float[Array, "1 E"], list[tuple[Array, Array]]]:
    """Layers whose addresses fit in one kernel's arguments; NaN if a program gave up waiting."""
    first, num_layers = layers[0], len(layers)
    _, num_kv_heads, block_size, head_dim = caches[0][0].shape
    launch = launch or launch_parameters(current_target(), num_kv_heads)
    tiles, group = tilings(launch, first), first["qkv"].shape[2] - 2
    # What a layer does not have is given as another array, which is not read.
    weights = tuple(layer.get(name, layer["input_norm"]) for layer in layers for name in WEIGHTS)
    results = []

    def run(words: jax.Ref, *caches: jax.Ref) -> None:
        results.append(
            triton_call(
                x,
                weights,
                cos,
                sin,
                block_tables,
                context_lens,
                words,
                caches,
                num_kv_heads,
                kernel=decode_layers_kernel,
                out_type=jax.ShapeDtypeStruct(x.shape, x.dtype),
                grid=(launch.programs,),
                num_warps=launch.num_warps,
                num_stages=1,
                EPS=eps,
                SCALE=scale,
                WINDOW=window,
                GROUP=group,
                BLOCK_SIZE=block_size,
                HEAD_DIM=head_dim,
                TILE_HEADS=next_power_of_2(group + 2),
                TILE_TOKENS=launch.tile_tokens,
                STAGES=launch.num_stages,
                MOST_PIECES=min(launch.most_pieces, ceil_div(block_tables.shape[1] * block_size, launch.tile_tokens)),
                PIECES=next_power_of_2(launch.most_pieces),
                BIAS="qkv_bias" in first,
                NORM="q_norm" in first,
                THREADS=launch.num_warps * 32,
                FLAGS=_FLAGS,
                WORDS=words_a_layer(tiles, launch.most_pieces, head_dim),
                LAYERS=num_layers,
                **tiles.constants,
            )
        )

    words = jnp.zeros(num_words(launch, tiles, num_layers, head_dim), jnp.int32)
    words, *flat = update_in_place(run, words, *(array for pair in caches for array in pair))
    new_caches = list(zip(flat[::2], flat[1::2], strict=True))
    return jnp.where(words[0] == 0, results[0], jnp.nan), new_caches
