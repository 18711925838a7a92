"""Draws a token a row: temperature, top-k, top-p, min-p and seeded Gumbel noise."""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32, UInt32

from nanovllm_kernels._checks import check_backend, check_shape
from nanovllm_kernels._compat import import_jax_triton
from nanovllm_kernels.sample.reference import sample_xla
from nanovllm_kernels.sample.vocab import best_of, vocab_offset


def sample(
    logits: Float32[Array, "B V"],
    temperature: Float32[Array, " B"],
    key: UInt32[Array, "B 2"],
    position: Int32[Array, " B"],
    *,
    top_k: Int32[Array, " B"] | None = None,
    top_p: Float32[Array, " B"] | None = None,
    min_p: Float32[Array, " B"] | None = None,
    axis_name: str | None = None,
    backend: Literal["xla", "triton"],
) -> Int32[Array, " B"]:
    """The argmax of logits / temperature + Gumbel noise: a draw from softmax(logits / temperature).

    B rows, V vocabulary. The noise of a token is a hash of its row's key, the position and its id (see `noise`),
    so a row's draw does not depend on the batch. A temperature below 1e-5 is greedy: the largest logit, the lowest
    id among equals.

    Filters come all three or not at all. In order: min-p drops what is less likely than `min_p` times the likeliest
    token, top-k keeps the k largest, and top-p the smallest set of the rest, likeliest first, whose share of their
    mass reaches p. Equal logits are kept or dropped together; the likeliest token is always kept (see `filters`).

    Args:
        logits: of this shard of the vocabulary, if it is split.
        temperature: finite.
        key: 64 random bits a row.
        position: index of the token to draw in its sequence.
        top_k: 0, or V and more: all.
        top_p: 1 or more: all.
        min_p: at most 1; 0: all.
        axis_name: the mesh axis over which V is split, if any. With it calls with filters run through XLA on
            any backend: an exact threshold needs sums over the shards at every step of its search.
        backend: "xla" anywhere, "triton" on NVIDIA GPUs from sm_80 up.

    Returns:
        token ids; -1 where a row's logits hold a NaN or +inf, or nothing but -inf.

    Raises:
        ValueError: if shapes or dtypes do not fit together, some filters are missing, or the backend is unknown.
        ImportError: if the Triton implementation is asked for where triton or jax-triton is missing.
        RuntimeError: if it is asked for where no GPU is, outside `lowering_for`.
    """
    check_backend(backend)
    if logits.ndim != 2 or logits.dtype != jnp.float32 or logits.shape[1] == 0:
        raise ValueError(f"logits are {logits.dtype}{list(logits.shape)}; they must be float32 [B, V], V at least 1.")
    rows = (logits.shape[0],)
    given = {"top_k": top_k, "top_p": top_p, "min_p": min_p}
    present = {name: value for name, value in given.items() if value is not None}
    if len(present) not in (0, 3):
        raise ValueError(
            f"of the filters only {', '.join(present)} is given; give top_k, top_p and min_p (0, 1 and 0 keep "
            "everything), or none of them."
        )
    for name, value in {"temperature": temperature, "position": position, **present}.items():
        check_shape(name, value, rows, "B")
        expected = jnp.int32 if name in ("position", "top_k") else jnp.float32
        if value.dtype != expected:
            raise ValueError(f"{name} has dtype {value.dtype}; it must be {jnp.dtype(expected)}.")
    check_shape("key", key, (*rows, 2), "B, 2")
    if key.dtype != jnp.uint32:
        raise ValueError(f"key has dtype {key.dtype}; it must be uint32.")
    if rows == (0,):
        return jnp.zeros(rows, jnp.int32)
    filters = None if top_k is None or top_p is None or min_p is None else (top_k, top_p, min_p)
    if backend == "xla" or (axis_name is not None and filters is not None):
        return sample_xla(logits, temperature, key, position, filters, axis_name)
    import_jax_triton()
    from nanovllm_kernels.sample.triton import race_triton, sample_triton

    if axis_name is not None:
        first_id = vocab_offset(logits.shape[1], axis_name).reshape(1)
        best, token = best_of(*race_triton(logits, temperature, key, position, first_id), axis_name)
        return jnp.where(jnp.isfinite(best), token, -1)
    return sample_triton(logits, temperature, key, position, filters)
