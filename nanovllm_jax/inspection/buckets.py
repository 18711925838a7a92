"""The bucket table: one row a program, compiled or not, with its costs, its memory and what it took to compile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax

from nanovllm_jax.inspection.costs import count, kernel_rows
from nanovllm_jax.inspection.gpus import Gpu
from nanovllm_jax.inspection.kernel_costs import load_of
from nanovllm_jax.inspection.measured import program_seconds
from nanovllm_jax.inspection.profile_data import Profile
from nanovllm_jax.inspection.report import Bucket, Compilation, Memory, Program
from nanovllm_jax.step.catalogue import Catalogue, ProgramKey
from nanovllm_jax.step.state import device_bytes


def bucket_rows(
    catalogue: Catalogue,
    keys: Sequence[ProgramKey],
    compiled: Mapping[ProgramKey, jax.stages.Compiled],
    *,
    peaks: Gpu | None,
    context: int,
    compilations: Sequence[Compilation],
    profile: Profile | None,
    inspected: Sequence[Program],
) -> list[Bucket]:
    """A row for each key, with the costs of `inspected` programs or traced for them; nothing is compiled here."""
    costs = {one.name: (one.flops, one.bytes) for one in inspected}
    log = {one.program: one for one in compilations}
    rows = []
    for key in keys:
        flops, moved = costs.get(program_name(key)) or _traced_costs(catalogue, key, context)
        memory, logged = memory_of(compiled.get(key)), log.get(program_name(key))
        rows.append(
            Bucket(
                name=program_name(key),
                kind=key.kind,
                size=key.size,
                input=_input(catalogue, key),
                flops=flops,
                bytes=moved,
                limit_s=peaks.limit_s(flops, moved) if peaks else None,
                measured_s=program_seconds(profile, program_name(key)),
                trace_s=logged.trace_s if logged else None,
                lower_s=logged.lower_s if logged else None,
                compile_s=logged.compile_s if logged else None,
                cache_hit=logged.cache_hit if logged else None,
                memory=memory,
                state=_state(catalogue, key, memory),
            )
        )
    return rows


def _traced_costs(catalogue: Catalogue, key: ProgramKey, context: int) -> tuple[float, float]:
    counted = count(catalogue.trace(key).jaxpr.jaxpr)
    rows = kernel_rows(counted, catalogue, load_of(key.kind, key.size, context), None)
    return sum(row.flops or 0 for row in rows), sum(row.bytes or 0 for row in rows)


def program_name(key: ProgramKey) -> str:
    """decode[256]."""
    return f"{key.kind}[{key.size}]" if key.size else key.kind


def memory_of(compiled: jax.stages.Compiled | None) -> Memory | None:
    """XLA's account of a compiled program; None if there is none."""
    analysis: Any = compiled.memory_analysis() if compiled else None
    if analysis is None:
        return None
    arguments, outputs = analysis.argument_size_in_bytes, analysis.output_size_in_bytes
    reused, temporaries = analysis.alias_size_in_bytes, analysis.temp_size_in_bytes
    return Memory(arguments, outputs, reused, temporaries, arguments + outputs - reused + temporaries)


def _input(catalogue: Catalogue, key: ProgramKey) -> str:
    """The last argument, whose shape makes the bucket."""
    last = jax.tree.leaves(catalogue.describe(key).arguments[-1])[-1]
    return f"{last.dtype}[{','.join(map(str, last.shape))}]"


def _state(catalogue: Catalogue, key: ProgramKey, memory: Memory | None) -> str:
    """What becomes of the device state that the program takes."""
    program = catalogue.describe(key)
    held = [(number, tree) for number, tree in enumerate(program.arguments) if _is_state(catalogue, tree)]
    if not held:
        return "none"
    if any(number not in program.donated for number, _ in held):
        return "copied"
    if memory is None:
        return "donated"
    return "in place" if memory.reused >= sum(device_bytes(tree) for _, tree in held) else "copied"


def _is_state(catalogue: Catalogue, tree: Any) -> bool:
    return any(tree is one for one in (catalogue.caches, catalogue.rows, catalogue.extras))
