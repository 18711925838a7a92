"""The sum of what each shard of a mesh axis holds, and the residual that it is added to."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nanovllm_kernels._checks import check_backend, check_float, check_shape
from nanovllm_kernels._compat import import_jax_triton
from nanovllm_kernels.add_shards.exchange import Exchange, SumPlan, make_exchange, plan_of, shards_of
from nanovllm_kernels.add_shards.reference import add_shards_xla
from nanovllm_kernels.skinny_matmul import Scaled

__all__ = ["Exchange", "add_shards", "add_shards_scaled", "exchanges", "make_exchange", "parts_of_row"]


def add_shards(
    part: Float[Array, "*shape"],
    residual: Float[Array, "..."] | None = None,
    *,
    axis_name: str,
    table: Int[Array, "*mesh entries"] | None = None,
    backend: Literal["xla", "triton"],
) -> Float[Array, "*shape"]:
    """`residual` plus the sum over `axis_name` of each shard's `part`; inside `shard_map`, the same on every shard.

    Args:
        part: what this shard adds.
        residual: added once; the same on every shard.
        axis_name: mesh axis that is summed over.
        table: this device's part of `Exchange.table`; all shards must use it in the same order, one sum after the
            other, as a program over the mesh does whose sums depend on each other.
        backend: "triton" without a table, or for sums that `exchanges` refuses, is XLA's all-reduce.

    The Triton kernel adds in float32 in order of the shards and rounds once, so all shards get the same bits. Where a
    shard's part does not come within some seconds, the result is NaN, there and in all later sums.

    Raises:
        ValueError: if the shapes or dtypes do not fit together, or the backend is unknown.
    """
    check_backend(backend)
    _check(part, residual)
    if backend == "xla" or table is None or not exchanges(part, shards_of(table)):
        return add_shards_xla(part, residual, axis_name)
    import_jax_triton()
    from nanovllm_kernels.add_shards.triton import add_shards_triton

    (total,) = add_shards_triton(part, residual, table.reshape(-1))
    return total


def add_shards_scaled(
    part: Float[Array, "M N"],
    residual: Float[Array, "M N"],
    *,
    next_norm: Float[Array, " N"],
    table: Int[Array, "*mesh entries"],
) -> tuple[Float[Array, "M N"], Scaled]:
    """`add_shards` by its Triton kernel, and the sum for the norm that follows, with weight `next_norm`.

    As many parts of the sums of squares are passed on as `parts_of_row` says.

    Raises:
        ValueError: if the shapes or dtypes do not fit together, or part has no `parts_of_row`.
    """
    _check(part, residual)
    check_float(next_norm=next_norm)
    check_shape("next_norm", next_norm, part.shape[1:], "N")
    if parts_of_row(part, shards_of(table)) is None:
        raise ValueError(
            f"part is {part.dtype}{list(part.shape)}, which the kernel passes nothing on of; use `add_shards`."
        )
    import_jax_triton()
    from nanovllm_kernels.add_shards.triton import add_shards_triton

    total, *passed_on = add_shards_triton(part, residual, table.reshape(-1), next_norm.astype(part.dtype))
    return total, Scaled(*passed_on)


def parts_of_row(part: jax.ShapeDtypeStruct | Array, shards: int) -> int | None:
    """How many programs of the Triton kernel add a row of part [M, N]; None where not each has all of its row alone."""
    plan = _plan(part, shards)
    return None if plan is None or part.shape[1] % plan.elements else part.shape[1] // plan.elements


def exchanges(part: jax.ShapeDtypeStruct | Array, shards: int) -> bool:
    """Whether the Triton kernel adds such arrays: 16-bit elements, of a shape that `plan_of` cuts into programs."""
    return _plan(part, shards) is not None


def _plan(part: jax.ShapeDtypeStruct | Array, shards: int) -> SumPlan | None:
    return plan_of(part.shape, shards) if jnp.dtype(part.dtype).itemsize == 2 else None


def _check(part: Array, residual: Array | None) -> None:
    check_float(part=part)
    if residual is not None:
        check_float(residual=residual)
        check_shape("residual", residual, part.shape, "as part")
        if residual.dtype != part.dtype:
            raise ValueError(f"residual has dtype {residual.dtype}; it must be part's, {part.dtype}.")
