"""Gumbel noise that depends on a row's key, a position and a vocabulary id, and on nothing else.

`argmax(logits + noise)` draws from softmax(logits). Because each value is a hash of what it is for, a row
draws the same token in any batch, and a vocabulary shard computes its own part.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array as JaxArray
from jax import lax
from jaxtyping import Array, Float32, Int32, UInt32

_THREEFRY_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_THREEFRY_PARITY = 0x1BD11BDA


def gumbel_noise(
    key: UInt32[Array, "B 2"], position: Int32[Array, " B"], ids: Int32[Array, " V"]
) -> Float32[Array, "B V"]:
    """Standard Gumbel noise for the token at `position` of the sequences with these keys.

    A row and position get 64 bits from Threefry-2x32, the strong and costly part; an id is then mixed with
    those by two rounds of a 32-bit finaliser, about 20 integer operations, so that a pass over B x V logits
    stays close to the memory's speed.
    """
    word0, word1 = _threefry(key[:, 0], key[:, 1], position.astype(jnp.uint32), jnp.zeros_like(key[:, 0]))
    bits = _finalise(ids.astype(jnp.uint32)[None, :] + word0[:, None])
    bits = _finalise(bits + word1[:, None])
    # P(noise > g) is about u = exp(-g) for the large g that win, so the small uniforms need the fine steps:
    # all 32 bits as a float keep them (2**-32 apart). With 24-bit uniforms one draw in a hundred of a flat
    # 150k vocabulary would be a tie.
    uniform = (bits.astype(jnp.float32) + 0.5) * jnp.float32(2.0**-32)
    uniform = jnp.minimum(uniform, jnp.float32(1.0 - 2.0**-24))
    return -jnp.log(-jnp.log1p(-uniform))


def _finalise(bits: JaxArray) -> JaxArray:
    """A 32-bit permutation of low bias (Wellons' hash-prospector, "21f0aaad", bias 0.107)."""
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x21F0AAAD)
    bits = (bits ^ (bits >> 15)) * jnp.uint32(0xD35A2D97)
    return bits ^ (bits >> 15)


def _threefry(key0: JaxArray, key1: JaxArray, count0: JaxArray, count1: JaxArray) -> tuple[JaxArray, JaxArray]:
    """Threefry-2x32, 20 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).

    Written out so that it fuses into the sampler's kernel; XLA calls a kernel of its own for `jax.random`'s.
    """
    keys = (key0, key1, key0 ^ key1 ^ jnp.uint32(_THREEFRY_PARITY))
    word0, word1 = count0 + keys[0], count1 + keys[1]
    for group in range(5):
        for rotation in _THREEFRY_ROTATIONS[group % 2]:
            word0 = word0 + word1
            word1 = lax.shift_left(word1, jnp.uint32(rotation)) | lax.shift_right_logical(
                word1, jnp.uint32(32 - rotation)
            )
            word1 = word1 ^ word0
        word0 = word0 + keys[(group + 1) % 3]
        word1 = word1 + keys[(group + 2) % 3] + jnp.uint32(group + 1)
    return word0, word1
