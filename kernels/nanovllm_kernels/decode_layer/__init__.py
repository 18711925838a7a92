"""A whole transformer layer of a decode step: one new token of each of a few rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nanovllm_kernels._checks import check_backend, check_cache, check_int32, check_shape
from nanovllm_kernels._compat import current_target, import_jax_triton
from nanovllm_kernels.decode_layer.reference import decode_layer_xla

MAX_ROWS = 32
_REQUIRED = ("input_norm", "qkv", "o", "post_norm", "gate_up", "down")
_OPTIONAL = ("qkv_bias", "q_norm", "k_norm")


def layer_words(num_rows: int, weights: Mapping[str, Array], k_cache: Array) -> Int[Array, " words"]:
    """What the programs of `decode_layer` meet at and pass to each other, all zero, to be made a `jax.new_ref`.

    One set serves every call inside a jit that has as many rows and weights of these shapes. The first is not zero any
    more if a program gave up waiting for the others: what the calls returned is then worthless.
    """
    import_jax_triton()
    from nanovllm_kernels.decode_layer.triton import num_words

    return jnp.zeros(num_words(num_rows, weights, k_cache), jnp.int32)


def decode_layer(
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
    sliding_window: int | None = None,
    words: jax.Ref | None = None,
    call: Int[Array, ""] | None = None,
    next_qkv: Array | None = None,
    backend: Literal["xla", "triton"],
) -> tuple[Float[Array, "B E"], Float[Array, "N K block_size D"], Float[Array, "N K block_size D"]]:
    """Hidden states of each row's newest token after one layer, and the caches with its key and value written.

    B rows, E hidden states, K KV heads, G query heads for each, D head dim, F MLP width, P blocks a row. The layer is

        x += o(attention(rotate(norm(heads of q and k)), cache)), of the heads rms_norm(x) @ qkv + qkv_bias
        x += (silu(gate) * up) @ down, of gate and up of rms_norm(x) @ gate_up

    as `skinny_matmul`, `rope_cache_write` and `paged_decode` say it in full; all of it is one kernel, whose programs
    wait for each other. Row b's newest token is at position `context_lens[b] - 1`, in block
    `block_tables[b, position // block_size]`, whose slot is written; 0 marks a padding row, which writes nothing and
    attends to nothing. In place when the caches are donated to the enclosing jit.

    Args:
        x: hidden states.
        weights: `input_norm` [E], `qkv` [E, K, G + 2, D], `o` [K, G, D, E], `post_norm` [E], `gate_up` [E, 2, F] and
            `down` [F, E]; where the model has them `qkv_bias` [K, G + 2, D], `q_norm` [D] and `k_norm` [D].
        cos: of each row's rotary angles, float32.
        sin: likewise.
        k_cache: keys.
        v_cache: values.
        block_tables: blocks of each row.
        context_lens: tokens of each row, the newest included.
        eps: of all norms.
        scale: of the scores.
        sliding_window: how many of the newest tokens are seen; None means all.
        words: a `jax.new_ref` of `layer_words(...)`, which the Triton implementation needs.
        call: the number of this call among those that share `words`, from 1 up; likewise.
        next_qkv: the weight that the next call starts with, read ahead into the L2 cache if given.
        backend: "triton" takes what `decode_layer_supports` says.

    Raises:
        ValueError: if shapes or dtypes do not fit together, the backend is unknown, or the Triton implementation is
            asked for something that it does not support.
        ImportError: if the Triton implementation is asked for where triton or jax-triton is missing.
        RuntimeError: if it is asked for where no GPU is, outside `lowering_for`.
    """
    check_backend(backend)
    _check(x, weights, cos, sin, k_cache, v_cache, block_tables, context_lens)
    options = {"eps": eps, "scale": scale, "sliding_window": sliding_window}
    args = x, weights, cos, sin, k_cache, v_cache, block_tables, context_lens
    if backend == "xla":
        return decode_layer_xla(*args, **options)
    import_jax_triton()
    if not decode_layer_supports(x.shape[0], weights, k_cache):
        raise ValueError(
            f"backend='triton' takes 1 to {MAX_ROWS} rows of bfloat16 with a power of two as head dim, not "
            f"{x.shape[0]} rows, weights {_described(weights)} and a cache {k_cache.dtype}{list(k_cache.shape)}; "
            "use backend='xla'."
        )
    if words is None or call is None:
        raise ValueError("words or call is None; backend='triton' needs a jax.new_ref of layer_words(...) and a number.")
    from nanovllm_kernels.decode_layer.triton import decode_layer_triton

    return decode_layer_triton(*args, **options, words=words, call=call, next_qkv=next_qkv)


def decode_layer_supports(num_rows: int, weights: Mapping[str, Array], k_cache: Array) -> bool:
    """Whether the Triton implementation takes this many rows of such a layer, on the GPU at hand."""
    num_kv_heads, head_dim = k_cache.shape[1], k_cache.shape[3]
    known = set(weights) <= {*_REQUIRED, *_OPTIONAL}
    narrow = all(array.dtype == jnp.bfloat16 for array in (*weights.values(), k_cache))
    width, mlp = weights["o"].shape[-1], weights["down"].shape[0]
    whole = width % 16 == mlp % 8 == 0 and head_dim >= 16 and head_dim & (head_dim - 1) == 0
    fits = 1 <= num_rows <= MAX_ROWS
    return known and narrow and whole and fits and current_target().compute_capability >= 80


def _described(weights: Mapping[str, Array]) -> str:
    return ", ".join(f"{name} {array.dtype}{list(array.shape)}" for name, array in sorted(weights.items()))


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
    if x.ndim != 2:
        raise ValueError(f"x has shape {x.shape}; it must be [B, E].")
    missing = [name for name in _REQUIRED if name not in weights]
    if missing:
        raise ValueError(f"weights lack {', '.join(missing)}; they must have {', '.join(_REQUIRED)}.")
    (rows, width), (_, num_kv_heads, _, head_dim) = x.shape, k_cache.shape
    group, mlp = weights["qkv"].shape[-2] - 2, weights["down"].shape[0]
    for name, shape, letters in (
        ("input_norm", (width,), "E"),
        ("qkv", (width, num_kv_heads, group + 2, head_dim), "E, K, G + 2, D"),
        ("qkv_bias", (num_kv_heads, group + 2, head_dim), "K, G + 2, D"),
        ("q_norm", (head_dim,), "D"),
        ("k_norm", (head_dim,), "D"),
        ("o", (num_kv_heads, group, head_dim, width), "K, G, D, E"),
        ("post_norm", (width,), "E"),
        ("gate_up", (width, 2, mlp), "E, 2, F"),
        ("down", (mlp, width), "F, E"),
    ):
        if name in weights:
            check_shape(name, weights[name], shape, letters)
    for name, array in (("cos", cos), ("sin", sin)):
        check_shape(name, array, (rows, head_dim // 2), "B, D / 2")
    if ("q_norm" in weights) != ("k_norm" in weights):
        raise ValueError("q_norm and k_norm go together: give both or neither.")
    if block_tables.ndim != 2 or block_tables.shape[0] != rows:
        raise ValueError(f"block_tables has shape {block_tables.shape}; it must be [B, P] with B = {rows}, x's rows.")
    check_shape("context_lens", context_lens, (rows,), "B")
