"""Why each program was compiled: which argument is new against the compilation before it of the same kind."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jax

from nanovllm_jax.inspection.report import Compilation
from nanovllm_jax.step.catalogue import Catalogue, ProgramKey
from nanovllm_jax.step.programs import Programs

ARGUMENT_NAMES = {
    "decode": ("params", "caches", "rows", "delta"),
    "decode_filtered": ("params", "caches", "rows", "delta"),
    "decode_forward": ("params", "caches", "rows", "delta"),
    "prefill": ("params", "caches", "rows", "delta"),
    "plain": ("head", "rows", "hidden", "sampled_rows"),
    "filtered": ("head", "rows", "hidden", "sampled_rows"),
    "full": ("head", "rows", "extras", "hidden", "sampled_rows"),
    "prompt_logprobs": ("tail", "unfinished", "targets"),
    "update_rows": ("rows", "packed"),
    "update_extras": ("extras", "packed"),
}


def explain_compilations(replicas: Sequence[Programs]) -> list[Compilation]:
    """The compile logs of replicas with reasons, each in its order, by one clock."""
    first = min((record.started for programs in replicas for record in programs.compile_log), default=0.0)
    return [entry for number, programs in enumerate(replicas) for entry in _explain_log(programs, number, first)]


def _explain_log(programs: Programs, replica: int, first: float) -> Iterator[Compilation]:
    catalogue, last = programs.catalogue, dict[str, ProgramKey]()
    for record in programs.compile_log:
        key = record.key
        reason = compilation_reason(catalogue, key, last.get(key.kind))
        name = f"{key.kind}[{key.size}]" if key.size else key.kind
        yield Compilation(
            program=name,
            start_s=record.started - first,
            trace_s=record.trace_s,
            lower_s=record.lower_s,
            compile_start_s=record.compile_started - first,
            compile_s=record.compile_s,
            cache_hit=record.cache_hit,
            reason=reason,
            replica=replica,
        )
        last[key.kind] = key


def compilation_reason(catalogue: Catalogue, key: ProgramKey, before: ProgramKey | None) -> str:
    """What of `key`'s arguments differs from `before`'s in shape, dtype or sharding."""
    if before is None:
        return f"first program of kind {key.kind}"
    changes = []
    old, new = (
        dict(jax.tree_util.tree_leaves_with_path(dict(enumerate(catalogue.describe(one).arguments))))
        for one in (before, key)
    )
    for path, leaf in new.items():
        was = old.get(path)
        name = _name(key, path)
        if was is None:
            changes.append(f"argument {name} is new")
        elif (was.shape, was.dtype) != (leaf.shape, leaf.dtype):
            changes.append(f"argument {name} is {leaf.dtype}{list(leaf.shape)}, was {was.dtype}{list(was.shape)}")
        elif was.sharding != leaf.sharding:
            changes.append(f"argument {name} is split as {leaf.sharding}, was {was.sharding}")
    if not changes and key.size != before.size:
        changes.append(f"the static bucket is {key.size}, was {before.size}")
    return "; ".join(changes) or "nothing changed: compiled again on request"


def _name(key: ProgramKey, path: tuple[Any, ...]) -> str:
    number, *rest = path
    return ARGUMENT_NAMES[key.kind][number.key] + jax.tree_util.keystr(tuple(rest))
