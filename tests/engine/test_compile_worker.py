"""Programs that another process compiles are those that this one would have compiled."""

import dataclasses
import re

import jax.numpy as jnp
import pytest

from nanovllm_jax.config import EngineConfig
from nanovllm_jax.engine.compile_worker import CompileOrder
from nanovllm_jax.engine.plan import smallest_shape
from nanovllm_jax.inspection.scopes import scope_of_op
from nanovllm_jax.parallel.mesh import split_heads
from nanovllm_jax.step import compile_workers
from nanovllm_jax.step.catalogue import ProgramKey
from nanovllm_jax.step.compile_workers import CompileWorkers
from nanovllm_jax.step.programs import Programs
from nanovllm_jax.weights import load_model_config, locate

WORKER = "nanovllm_jax.engine.compile_worker"
KEYS = [ProgramKey("decode", 4), ProgramKey("prefill", 64), ProgramKey("full", 4), ProgramKey("update_rows")]


def order(shards):
    config = EngineConfig(max_num_seqs=4, max_model_len=64, tensor_parallel_size=shards)
    model = split_heads(load_model_config(locate(None)), shards)
    shape = dataclasses.replace(smallest_shape(model, config), num_blocks=16)
    return CompileOrder(model, config, shape, jnp.dtype("float32"), jnp.dtype("float32"))


def scopes(compiled):
    return {scope_of_op(name) for name in re.findall(r'op_name="([^"]*)"', compiled.as_text())}


@pytest.fixture
def eight_cores(monkeypatch):
    monkeypatch.setattr(compile_workers, "usable_cores", lambda: 8)


@pytest.mark.parametrize("shards", [1, 2])
def test_programs_compiled_elsewhere_are_the_same(shards, eight_cores, tmp_path):
    ordered = order(shards)
    catalogue, workers = ordered.catalogue(), CompileWorkers(WORKER, ordered)
    programs = Programs(catalogue, command_buffers=False, kept_in=tmp_path, workers=workers)
    programs.compile(KEYS)
    assert all(not record.cache_hit and record.trace_s > 0 and record.compile_s > 0 for record in programs.compile_log)
    for key in KEYS[:3]:
        here = catalogue.trace(key).lower().compile()
        there = programs[key]
        assert scopes(there) == scopes(here) != set()
        assert (there.in_tree, there.out_tree) == (here.in_tree, here.out_tree)
        for name in ("alias_size_in_bytes", "output_size_in_bytes", "temp_size_in_bytes"):
            assert getattr(there.memory_analysis(), name) == getattr(here.memory_analysis(), name)


def test_programs_compiled_elsewhere_are_kept(eight_cores, tmp_path):
    ordered = order(1)
    catalogue, workers = ordered.catalogue(), CompileWorkers(WORKER, ordered)
    Programs(catalogue, command_buffers=False, kept_in=tmp_path, workers=workers).compile(KEYS)
    again = Programs(catalogue, command_buffers=False, kept_in=tmp_path)
    again.compile(KEYS)
    assert [record.cache_hit for record in again.compile_log] == [True] * len(KEYS)
