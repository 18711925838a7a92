"""XLA implementation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def silu_mul_xla(gate_up: Float[Array, "T 2 F"]) -> Float[Array, "T F"]:
    gate, up = gate_up[:, 0].astype(jnp.float32), gate_up[:, 1].astype(jnp.float32)
    return (jax.nn.silu(gate) * up).astype(gate_up.dtype)
