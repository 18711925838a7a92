"""Flops and bytes of a program: matrix products from their shapes, our kernels from their formulas."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import jax

from nanovllm_jax.inspection.gpus import Gpu
from nanovllm_jax.inspection.kernel_costs import BY_LOAD, BY_OPERANDS, Call, Load, Site, Work
from nanovllm_jax.inspection.report import KernelRow
from nanovllm_jax.inspection.scopes import fold
from nanovllm_jax.inspection.walk import Visit, aval_bytes, visit_all
from nanovllm_jax.step.catalogue import Catalogue

COLLECTIVES = {
    "psum",
    "psum2",
    "psum_invariant",
    "pmax",
    "pmin",
    "all_gather",
    "all_to_all",
    "ppermute",
    "reduce_scatter",
}
# What calls a kernel of our own, and in which language it is written.
NATIVE = {"triton_kernel_call": "triton", "pallas_call": "mosaic", "mpmd_map": "mosaic", "core_map": "mosaic"}


@dataclass
class Counted:
    """What a walk over a jaxpr found."""

    products: dict[tuple[str, str], list[float]] = field(default_factory=dict)  # (scope, shapes): count, flops, bytes
    kernels: Counter[tuple[str, str]] = field(default_factory=Counter)  # (kernel, scope): runs
    native: dict[tuple[str, str], str] = field(default_factory=dict)  # (scope, device function): language
    shaped: dict[tuple[str, str, str], list[float]] = field(default_factory=dict)  # (name, scope, language): likewise
    collectives: Counter[str] = field(default_factory=Counter)
    loops: bool = False  # whether a product stands in a loop of known length


def count(jaxpr: Any) -> Counted:
    """Every matrix product, kernel and collective of a traced program."""
    found = Counted()
    # How often the code around each kernel runs, layer by layer; inside it loops may turn more often.
    runs: dict[tuple[str, str], dict[str, int]] = {}
    for visit in visit_all(jaxpr):
        kernel = kernel_of(visit.scope)
        if kernel:
            layers = runs.setdefault((kernel, fold(visit.scope).partition(kernel)[0] + kernel), {})
            layer = visit.scope.partition(kernel)[0]
            layers[layer] = min(visit.times, layers.get(layer, visit.times))
        if visit.primitive in NATIVE:
            _count_call(found, visit)
        elif visit.primitive in COLLECTIVES:
            found.collectives[visit.primitive] += visit.times
        elif visit.primitive == "dot_general" and not kernel:
            _count_product(found, visit)
            found.loops |= visit.times > 1
    for key, layers in runs.items():
        found.kernels[key] = sum(layers.values())
    return found


def _count_product(found: Counted, visit: Visit) -> None:
    left, right = (var.aval for var in visit.eqn.invars)
    out = visit.eqn.outvars[0].aval
    (contracted, _), _ = visit.eqn.params["dimension_numbers"]
    flops = 2 * out.size * math.prod(left.shape[axis] for axis in contracted)
    shapes = f"{left.str_short(True)} x {right.str_short(True)}"
    work = Work(flops, aval_bytes(left) + aval_bytes(right) + aval_bytes(out))
    _add(found.products, (fold(visit.scope), shapes), work, visit.times)


def _count_call(found: Counted, visit: Visit) -> None:
    kernel = getattr(visit.eqn.params.get("fn"), "__name__", "")
    scope, language = fold(visit.scope), NATIVE[visit.primitive]
    found.native[scope, kernel] = language
    operation = next((part for part in (*scope.split("/"), kernel) if part in BY_OPERANDS), None)
    if operation is not None:
        sides = (visit.eqn.invars, visit.eqn.outvars)
        operands, results = ([getattr(var.aval, "inner_aval", var.aval) for var in side] for side in sides)
        call = Call(kernel, operands, results)
        name = f"{operation} {' x '.join(one.str_short(True) for one in call.leading)}"
        _add(found.shaped, (name, scope, language), BY_OPERANDS[operation](call), visit.times)


def _add(rows: dict[Any, list[float]], key: tuple[str, ...], work: Work, times: int) -> None:
    row = rows.setdefault(key, [0, 0.0, 0.0])
    row[0] += times
    row[1] += work.flops * times
    row[2] += work.bytes * times


def kernel_of(scope: str) -> str | None:
    """The kernel that a scope lies in, if any, of those whose work depends on the load."""
    return next((part for part in scope.split("/") if part in BY_LOAD), None)


def has_formula(scope: str, kernel: str) -> bool:
    """Whether a device function that is called in this scope has known costs."""
    return any(part in BY_LOAD or part in BY_OPERANDS for part in (*scope.split("/"), kernel))


def kernel_rows(found: Counted, catalogue: Catalogue, load: Load | None, gpu: Gpu | None) -> list[KernelRow]:
    """The rows of the kernel table, the longest limit first.

    Args:
        found: by `count`.
        catalogue: whose program it is.
        load: what the step computes; None for programs without our kernels.
        gpu: whose peaks set the limits; None leaves them out.
    """
    config, shards = catalogue.config, catalogue.mesh.devices.size if catalogue.config.axis_name else 1
    dtype, cache = catalogue.params["embed"].dtype, jax.tree.leaves(catalogue.caches)[0].dtype
    rows: list[tuple[str, str, str, int, Work, str]] = []
    for (scope, shapes), (times, flops, moved) in found.products.items():
        rows.append((shapes, "product", scope, int(times), Work(flops, moved), "shapes"))
    for (name, scope, language), (times, flops, moved) in found.shaped.items():
        rows.append((name, language, scope, int(times), Work(flops, moved), "formula"))
    for (kernel, scope), layers in found.kernels.items():
        if load is None:
            continue
        site = Site(config.model, load, dtype.itemsize, cache.itemsize, config.shape.block_size, shards)
        work = BY_LOAD[kernel](site)
        kind = next((language for (at, _), language in found.native.items() if kernel_of(at) == kernel), "xla")
        rows.append((kernel, kind, scope, layers, Work(work.flops * layers, work.bytes * layers), "formula"))
    limits = [gpu.limit_s(row[4].flops, row[4].bytes) if gpu else None for row in rows]
    whole = sum(limit for limit in limits if limit is not None)
    table = [
        KernelRow(
            name, kind, scope, times, work.flops, work.bytes, source, limit, limit / whole if limit and whole else None
        )
        for (name, kind, scope, times, work, source), limit in zip(rows, limits, strict=True)
    ]
    return sorted(table, key=lambda row: -(row.limit_s or row.bytes or 0))
