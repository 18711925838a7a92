"""Programs that another process lowers are those that this one would have compiled."""

import dataclasses
import re

import jax.numpy as jnp
import pytest

from nanovllm_jax.config import EngineConfig
from nanovllm_jax.engine.lowering_worker import LoweringOrder
from nanovllm_jax.engine.plan import smallest_shape
from nanovllm_jax.inspection.scopes import scope_of_op
from nanovllm_jax.parallel.mesh import split_heads
from nanovllm_jax.step import lowering
from nanovllm_jax.step.catalogue import ProgramKey
from nanovllm_jax.step.lowering import LoweringWorkers
from nanovllm_jax.step.programs import Programs
from nanovllm_jax.weights import load_model_config, locate
from nanovllm_kernels import lowering_for

WORKER = "nanovllm_jax.engine.lowering_worker"


def order(shards=1, target=None, dtype="float32"):
    config = EngineConfig(max_num_seqs=4, max_model_len=64, tensor_parallel_size=shards)
    model = split_heads(load_model_config(locate(None)), shards)
    shape = dataclasses.replace(smallest_shape(model, config), num_blocks=16)
    exchanged = shards > 1 and target is not None
    return LoweringOrder(model, config, shape, jnp.dtype(dtype), jnp.dtype(dtype), target, exchanged)


def scopes(compiled):
    return {scope_of_op(name) for name in re.findall(r'op_name="([^"]*)"', compiled.as_text())}


@pytest.fixture
def eight_cores(monkeypatch):
    monkeypatch.setattr(lowering, "usable_cores", lambda: 8)


@pytest.mark.parametrize("shards", [1, 2])
def test_programs_lowered_elsewhere_are_the_same(shards, eight_cores):
    ordered = order(shards)
    catalogue = ordered.catalogue()
    programs = Programs(catalogue, command_buffers=False, workers=LoweringWorkers(WORKER, ordered))
    keys = [ProgramKey("decode", 4), ProgramKey("prefill", 64), ProgramKey("full", 4), ProgramKey("update_rows")]
    programs.compile(keys)
    for key in keys[:3]:
        here = catalogue.trace(key).lower().compile()
        there = programs[key]
        assert scopes(there) == scopes(here) != set()
        assert (there.in_tree, there.out_tree) == (here.in_tree, here.out_tree)
        for name in ("alias_size_in_bytes", "output_size_in_bytes", "temp_size_in_bytes"):
            assert getattr(there.memory_analysis(), name) == getattr(here.memory_analysis(), name)


@pytest.mark.parametrize("shards", [1, 2])
def test_a_gpus_kernels_are_lowered_elsewhere(shards, eight_cores):
    with lowering_for(90) as target:
        ordered = order(shards, target, "bfloat16")
    catalogue = ordered.catalogue()
    keys = [ProgramKey("prefill", size) for size in catalogue.prefill_sizes]
    keys += [ProgramKey("decode", size) for size in catalogue.decode_sizes]
    for key, lowered in LoweringWorkers(WORKER, ordered).lower(keys):
        assert lowered is not None
        text = catalogue.trace_exported(key, lowered.exported).lower(lowering_platforms=("cuda",)).as_text()
        assert "triton_kernel_call_ffi" in text
        assert key.kind != "prefill" or "all_reduce" not in text  # shards add in a kernel
