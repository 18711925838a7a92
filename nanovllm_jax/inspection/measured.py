"""Measured seconds of a profile for a program, and for one of its named scopes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from nanovllm_jax.inspection.profile_data import MeasuredKernel, Profile
from nanovllm_jax.inspection.report import KernelRow


def program_seconds(profile: Profile | None, program: str) -> float | None:
    """Seconds of kernels in one run of a program; None if the profile has none of it."""
    rows = _of_program(profile, program)
    runs = _runs(rows)
    return sum(row.total_s for row in rows) / runs if runs else None


def with_measured(rows: Sequence[KernelRow], profile: Profile | None, program: str) -> list[KernelRow]:
    """The kernel table with the measured seconds of each row whose scope no other row has."""
    found = _of_program(profile, program)
    runs = _runs(found)
    scopes = [row.scope for row in rows]
    return [
        replace(row, measured_s=_scope_seconds(found, row.scope, runs)) if scopes.count(row.scope) == 1 else row
        for row in rows
    ]


def _scope_seconds(rows: Sequence[MeasuredKernel], scope: str, runs: int) -> float | None:
    inside = [row.total_s for row in rows if scope and (row.scope == scope or row.scope.startswith(f"{scope}/"))]
    return sum(inside) / runs if inside else None


def _of_program(profile: Profile | None, program: str) -> list[MeasuredKernel]:
    rows = profile.kernels if profile else []
    return [row for row in rows if row.program == program and row.kind != "transfer"]


def _runs(rows: Sequence[MeasuredKernel]) -> int:
    """Steps in which the program ran: its commonest kernel ran in each of them."""
    return sum(max(row.steps for row in rows if row.step == step) for step in {row.step for row in rows})
