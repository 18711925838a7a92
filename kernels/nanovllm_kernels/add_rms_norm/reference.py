"""XLA implementation: an addition and a norm, which XLA fuses as it sees fit."""

from __future__ import annotations

from jaxtyping import Array, Float

from nanovllm_kernels.norm import rms_norm


def add_rms_norm_xla(
    x: Float[Array, "T E"], update: Float[Array, "T E"] | None, weight: Float[Array, " E"], *, eps: float
) -> tuple[Float[Array, "T E"], Float[Array, "T E"]]:
    total = x if update is None else x + update
    return total, rms_norm(total, weight, eps)
