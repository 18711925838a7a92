"""Which tokens top-k, top-p and min-p keep, found without sorting the vocabulary.

Each filter keeps the tokens above a threshold, and a threshold is the largest float32 above which there still
is enough: k tokens for top-k, a mass of p for top-p. float32 values in order are 32-bit integers in order, so
eight passes over the logits, each settling four bits by 15 comparisons a token, find it exactly. Four bits a
pass is about where a GPU's comparisons take as long as its reads. The number of passes does not depend on the
data, so nothing waits for the host.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax.numpy as jnp
from jax import Array as JaxArray
from jax import lax
from jaxtyping import Array, Bool, Float32, Int32

from nanovllm_kernels.sample.vocab import before_reduction, max_shards, sum_shards

_BITS_A_PASS = 4
_KEY_OF_MINUS_INF = 0x007FFFFF
_KEY_OF_PLUS_INF = 0xFF800000
_EXPONENT_BITS = 0x7F800000


def filter_tokens(
    logits: Float32[Array, "B V"],
    inverse_temperature: Float32[Array, " B"],
    top_k: Int32[Array, " B"],
    top_p: Float32[Array, " B"],
    min_p: Float32[Array, " B"],
    axis_name: str | None = None,
) -> Bool[Array, "B V"]:
    """The tokens that the filters drop.

    Order and meaning are vLLM's: min-p drops what is less likely than `min_p` times the likeliest token,
    top-k keeps the k largest of the rest, and top-p keeps the smallest set of those, likeliest first, whose
    share of their mass reaches p. Tokens with equal logits are kept or dropped together, so top-k may keep
    more than k and top-p more than it needs. The likeliest token is always kept, a logit of -inf never
    matters, and a NaN is never dropped.

    Args:
        logits: before temperature; temperature keeps their order, so only masses need it.
        inverse_temperature: finite and positive.
        top_k: 0 keeps all; so does k >= V.
        top_p: 1 or more keeps all.
        min_p: 0 keeps all.
        axis_name: the mesh axis over which V is split, if any.
    """
    largest = max_shards(jnp.max(logits, axis=1), axis_name)
    lowest = largest + jnp.log(min_p) / inverse_temperature

    def count(thresholds: JaxArray) -> JaxArray:
        ones = jnp.ones_like(logits, dtype=jnp.int32)
        return sum_shards(_sum_above(logits, ones, thresholds), axis_name)

    wanted = jnp.where(top_k > 0, top_k, jnp.iinfo(jnp.int32).max)
    kth = _largest_threshold(count, wanted)

    dropped = (logits < lowest[:, None]) | (logits <= kth[:, None])
    mass = jnp.where(dropped, 0.0, jnp.exp((logits - largest[:, None]) * inverse_temperature[:, None]))
    total = sum_shards(jnp.sum(mass, axis=1), axis_name)
    shares = before_reduction(_fixed_point(mass, total))

    def share_above(thresholds: JaxArray) -> JaxArray:
        return sum_shards(_sum_above(logits, shares, thresholds), axis_name)

    whole = sum_shards(jnp.sum(shares, axis=1, dtype=jnp.uint32), axis_name)
    # At least 1: with p * whole rounded to 0, nothing above the maximum would be "enough".
    wanted_share = jnp.maximum(jnp.minimum(top_p, 1.0) * whole.astype(jnp.float32), 1.0).astype(jnp.uint32)
    nucleus = _largest_threshold(share_above, jnp.where(top_p < 1.0, wanted_share, jnp.uint32(0xFFFFFFFF)))
    return dropped | (logits <= nucleus[:, None])


def _fixed_point(mass: JaxArray, total: JaxArray) -> JaxArray:
    """Masses [B, V] as uint32 that add up to between 2**30 and 2**31 a row, whose total [B] was about `total`.

    Integer sums do not depend on the order of adding, hence not on batch, shards or device, and lose no small
    masses; rounding each token to 2**-31 of the total shifts a sum over 150k tokens by 1e-7, at worst by 4e-5.
    """
    power = lax.bitcast_convert_type(
        lax.bitcast_convert_type(total, jnp.uint32) & jnp.uint32(_EXPONENT_BITS), jnp.float32
    )
    return jnp.round(mass * (2.0**30 / power)[:, None]).astype(jnp.uint32)


def _largest_threshold(measure: Callable[[JaxArray], JaxArray], wanted: JaxArray) -> JaxArray:
    """The largest float32 [B] above which there is as much as `wanted` [B]; -inf where there never is.

    Args:
        measure: of thresholds [B, n], how much is above each [B, n]; must not grow with the threshold.
        wanted: positive.
    """
    digits = jnp.arange(1, 1 << _BITS_A_PASS, dtype=jnp.uint32)

    def settle(index: int | JaxArray, prefix: JaxArray) -> JaxArray:
        shift = jnp.uint32(32 - _BITS_A_PASS) - jnp.uint32(_BITS_A_PASS) * jnp.asarray(index, jnp.uint32)
        candidates = prefix[:, None] + (digits << shift)[None, :]
        enough = measure(_float_of_key(candidates)) >= wanted[:, None]
        return prefix + (jnp.sum(enough, axis=1, dtype=jnp.uint32) << shift)

    def search(prefix: JaxArray, unroll: bool) -> JaxArray:
        return lax.fori_loop(0, 32 // _BITS_A_PASS, settle, prefix, unroll=unroll)

    # A loop compiles several times faster, which counts on a CPU; on a GPU each turn of it costs 7 us.
    start = jnp.zeros(wanted.shape, jnp.uint32)
    prefix = lax.platform_dependent(start, cpu=partial(search, unroll=False), default=partial(search, unroll=True))
    return _float_of_key(prefix)


def _float_of_key(key: JaxArray) -> JaxArray:
    """Maps uint32 to float32 in order, with the nearest infinity in place of NaNs."""
    key = jnp.clip(key, jnp.uint32(_KEY_OF_MINUS_INF), jnp.uint32(_KEY_OF_PLUS_INF))
    bits = jnp.where(key >> 31 == 1, key ^ jnp.uint32(0x80000000), ~key)
    return lax.bitcast_convert_type(bits, jnp.float32)


def _sum_above(logits: JaxArray, weights: JaxArray, thresholds: JaxArray) -> JaxArray:
    """The sum [B, n] of the weights [B, V] whose logits [B, V] are above each threshold [B, n].

    One reduction with n operands reads the logits once and keeps n running sums; n reductions, or one over
    [B, n, V], were 10 to 25 times slower on a CPU.
    """
    count = thresholds.shape[1]
    zero = jnp.zeros((), weights.dtype)
    above = tuple(jnp.where(logits > thresholds[:, i : i + 1], weights, zero) for i in range(count))
    sums = lax.reduce(
        above,
        (zero,) * count,
        lambda left, right: tuple(a + b for a, b in zip(left, right, strict=True)),
        (1,),
    )
    return jnp.stack(sums, axis=1)
