"""A whole transformer layer of one row's decode step in one kernel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nanovllm_kernels._checks import check_backend, check_cache, check_int32, check_shape
from nanovllm_kernels._compat import current_target, import_jax_triton
from nanovllm_kernels.decode_layer.reference import decode_layer_xla

Shaped = Array | jax.ShapeDtypeStruct
_REQUIRED = ("input_norm", "qkv", "o", "post_norm", "gate_up", "down")
_OPTIONAL = ("qkv_bias", "q_norm", "k_norm")


def decode_layer(
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
    sliding_window: int | None = None,
    words: jax.Ref | None = None,
    call: Int[Array, ""] | None = None,
    backend: Literal["xla", "triton"],
) -> tuple[Float[Array, "1 E"], Float[Array, "N K block_size D"], Float[Array, "N K block_size D"]]:
    """Hidden states of a row's newest token after one layer, and the caches with its key and value written.

    E hidden states, K KV heads, G query heads for each, D head dim, F MLP width, P blocks of the row. The layer is

        x += o(attention(rotate(norm(heads of q and k)), cache)), of the heads rms_norm(x) @ qkv + qkv_bias
        x += (silu(gate) * up) @ down, of gate and up of rms_norm(x) @ gate_up

    as `skinny_matmul`, `rope_cache_write` and `paged_decode` say it in full. The newest token is at position
    `context_lens[0] - 1`, in block `block_tables[0, position // block_size]`, whose slot is written; 0 marks a padding
    row, which writes nothing and attends to nothing. In place when the caches are donated to the enclosing jit.

    Args:
        x: hidden states.
        weights: `input_norm` [E], `qkv` [E, K, G + 2, D], `o` [K, G, D, E], `post_norm` [E], `gate_up` [E, 2, F] and
            `down` [F, E]; where the model has them `qkv_bias` [K, G + 2, D], `q_norm` [D] and `k_norm` [D].
        cos: of the rotary angles, float32.
        sin: likewise.
        k_cache: keys.
        v_cache: values.
        block_tables: blocks of the row.
        context_lens: tokens of the row, the newest included.
        eps: of all norms.
        scale: of the scores.
        sliding_window: how many of the newest tokens are seen; None means all.
        words: a `jax.new_ref` of `layer_words(...)`, which the Triton implementation needs.
        call: the number of this call among those that share `words`, from 1 up; likewise.
        backend: "triton" takes what `decode_layer_supports` says. Its programs wait for each other, so all of them, one
            a multiprocessor, must come to run: no two such kernels may run on a GPU at the same time.

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
    if not decode_layer_supports(weights, k_cache):
        shapes = ", ".join(f"{name} {array.dtype}{list(array.shape)}" for name, array in sorted(weights.items()))
        raise ValueError(
            f"backend='triton' takes bfloat16 layers of about a thousand hidden states and a power of two as head "
            f"dim, not {shapes} with a cache {k_cache.dtype}{list(k_cache.shape)}; use backend='xla'."
        )
    if words is None or call is None:
        raise ValueError("words or call is None; backend='triton' needs a jax.new_ref of layer_words() and a number.")
    from nanovllm_kernels.decode_layer.triton import decode_layer_triton

    return decode_layer_triton(*args, **options, words=words, call=call)


def decode_layer_supports(weights: Mapping[str, Shaped], k_cache: Shaped) -> bool:
    """Whether the Triton implementation takes such a layer on the GPU at hand.

    Each of the GPU's multiprocessors must be able to hold its part of each weight in registers.
    """
    import_jax_triton()
    from nanovllm_kernels.decode_layer.launch import launch_parameters, tilings

    known = set(_REQUIRED) <= set(weights) <= {*_REQUIRED, *_OPTIONAL}
    narrow = all(array.dtype == jnp.bfloat16 for array in (*weights.values(), k_cache))
    head_dim = k_cache.shape[3]
    if not (known and narrow) or head_dim < 16 or head_dim & (head_dim - 1):
        return False
    launch = launch_parameters(current_target(), k_cache.shape[1])
    return k_cache.shape[1] <= launch.programs and tilings(launch, weights).fit(launch.programs)


def layer_words(weights: Mapping[str, Shaped], k_cache: Shaped) -> Int[Array, " words"]:
    """What the programs of `decode_layer` pass to each other, all zero, to be made a `jax.new_ref`.

    One set serves the calls inside a jit with weights of these shapes, each with a number of its own. The first element
    is not zero any more if a program gave up waiting for another: what the calls returned is then worthless.
    """
    import_jax_triton()
    from nanovllm_kernels.decode_layer.launch import launch_parameters, tilings
    from nanovllm_kernels.decode_layer.triton import num_words

    launch = launch_parameters(current_target(), k_cache.shape[1])
    return jnp.zeros(num_words(tilings(launch, weights), launch.most_pieces, k_cache.shape[3]), jnp.int32)


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
