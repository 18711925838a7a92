"""XLA implementation: logits in float32, then `sample`'s."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32, UInt32

from nanovllm_kernels.sample.reference import sample_xla


def sample_head_xla(
    hidden: Float[Array, "B E"],
    head: Float[Array, "V E"],
    temperature: Float32[Array, " B"],
    key: UInt32[Array, "B 2"],
    position: Int32[Array, " B"],
) -> Int32[Array, " B"]:
    logits = jnp.einsum(
        "be,ve->bv", hidden, head, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )
    return sample_xla(logits, temperature, key, position, None, None)
