"""Looks into what the jit made: reports of compiled programs, and a guard against compiling again."""

from nanovllm_jax.inspection.collect import collect
from nanovllm_jax.inspection.recompile import RecompileError, no_recompile
from nanovllm_jax.inspection.report import Difference, Finding, Report

__all__ = ["Difference", "Finding", "RecompileError", "Report", "collect", "no_recompile"]
