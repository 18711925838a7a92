"""What deserves attention in one program: each finding says what is wrong and what it costs."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from nanovllm_jax.inspection.costs import Counted, has_formula, kernel_of
from nanovllm_jax.inspection.hlo_text import Instruction
from nanovllm_jax.inspection.report import Argument, Finding
from nanovllm_jax.inspection.scopes import fold
from nanovllm_jax.inspection.walk import aval_bytes, visit_all

LARGE_BYTES = 1 << 20
_STATE = ("caches", "rows", "extras")
_HOST_CALLS = {"pure_callback", "io_callback", "debug_callback", "debug_print", "infeed", "outfeed"}
_HOST_OPCODES = ("infeed", "outfeed", "send", "recv", "xla_python", "xla_ffi_python", "annotate_device_placement")


def donation_findings(program: str, arguments: list[Argument]) -> list[Finding]:
    """State that is not updated in place: the step would copy it each time."""
    found = []
    for argument in arguments:
        if argument.name not in _STATE:
            continue
        size = f"{argument.bytes / 1e6:,.1f} MB"
        if not argument.donated:
            message = f"{argument.name} is not donated: each call copies {size} and holds them twice."
        elif argument.reused is not None and argument.reused < argument.arrays:
            message = f"{argument.name} is donated, but {argument.arrays - argument.reused} of {argument.arrays} "
            message += f"arrays find no result to hold them ({size} in all): their layout or dtype differs."
        else:
            continue
        found.append(Finding("not donated", program, message))
    return found


def traced_findings(program: str, jaxpr: Any, dtype: Any) -> list[Finding]:
    """Float32 products of narrower weights, transposes of large arrays before a product, and calls of the host."""
    found: dict[tuple[str, str], Finding] = {}
    for visit in visit_all(jaxpr):
        scope = fold(visit.scope)
        avals = [var.aval for var in visit.eqn.invars]
        if visit.primitive in _HOST_CALLS:
            message = f"{visit.primitive} in {scope or 'the program'} waits for the host in every step."
            found[visit.primitive, scope] = Finding("host transfer", program, message)
        elif kernel_of(visit.scope):
            continue
        elif visit.primitive == "dot_general" and jnp.dtype(dtype).itemsize < 4:
            wide = [aval for aval in avals if aval.dtype == jnp.float32]
            if wide:
                message = f"a product in {scope or 'the program'} takes float32 operands ({wide[0].str_short(True)}), "
                message += f"while the weights are {jnp.dtype(dtype).name}."
                found["float32", scope] = Finding("unexpected float32", program, message)
        elif visit.primitive in ("transpose", "copy", "copy_p") and aval_bytes(avals[0]) >= LARGE_BYTES:
            message = f"{visit.primitive} of {avals[0].str_short(True)} in {scope or 'the program'} "
            message += f"({aval_bytes(avals[0]) / 1e6:,.1f} MB, {visit.times} a step), unless XLA fuses it away."
            found[visit.primitive, scope] = Finding("large copy", program, message)
    return list(found.values())


def compiled_findings(program: str, found: list[Instruction]) -> list[Finding]:
    """Copies and transposes of large arrays that are left after optimisation, and transfers from or to the host."""
    copies: dict[tuple[str, str, int], int] = {}
    results = []
    for one in found:
        if one.opcode in ("copy", "transpose", "copy-start") and one.result_bytes >= LARGE_BYTES:
            key = (one.opcode, fold(one.scope), one.result_bytes)
            copies[key] = copies.get(key, 0) + 1
        if one.opcode.startswith(_HOST_OPCODES):
            results.append(Finding("host transfer", program, f"{one.opcode} in {one.scope or 'the program'}."))
    for (opcode, scope, size), times in copies.items():
        message = f"{times} × {opcode} of {size / 1e6:,.1f} MB in {scope or 'the program'}."
        results.append(Finding("large copy", program, message))
    return results


def kernel_findings(
    program: str, counted: Counted, backend: str, *, on_gpu: bool, shards: int, layers: int
) -> list[Finding]:
    """Kernels that run as their XLA version on a GPU, that have no costs, and more collectives than the layers need."""
    results = []
    for (scope, kernel), language in counted.native.items():
        if not has_formula(scope, kernel):
            message = f"the {language} kernel {kernel} in {scope or 'the program'} has no formula in "
            message += "inspection/kernel_costs.py: its flops and bytes are missing from the totals."
            results.append(Finding("no formula", program, message))
    native = {kernel_of(scope) for scope, _ in counted.native}
    for kernel, scope in counted.kernels:
        if on_gpu and kernel not in native:
            why = "attention_backend is 'xla'" if backend == "xla" else "no kernel of our own was called"
            results.append(Finding("fallback", program, f"{kernel} in {scope} runs as XLA loops: {why}."))
    # Two sums a layer, one for the embedding; a sampler merges a handful of numbers a row.
    planned = 2 * layers + 16 if shards > 1 else 0
    if (total := counted.collectives.total()) > planned:
        results.append(Finding("collectives", program, f"{total} collectives a step; the plan has {planned} at most."))
    return results
