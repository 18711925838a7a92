"""Programs that another process compiles are those that this one would have compiled."""

import dataclasses
import os
import re
import socket

import jax.numpy as jnp
import pytest

from nanovllm_jax.config import EngineConfig
from nanovllm_jax.engine.compile_worker import CompileOrder
from nanovllm_jax.engine.plan import smallest_shape
from nanovllm_jax.inspection.scopes import scope_of_op
from nanovllm_jax.parallel.mesh import split_heads
from nanovllm_jax.step import compile_workers
from nanovllm_jax.step.catalogue import ProgramKey
from nanovllm_jax.step.compile_workers import CompileWorkers, compile_server
from nanovllm_jax.step.programs import Programs
from nanovllm_jax.weights import load_model_config, locate
from nanovllm_kernels import lowering_for

WORKER = "nanovllm_jax.engine.compile_worker"
KEYS = [ProgramKey("decode", 4), ProgramKey("prefill", 64), ProgramKey("full", 4), ProgramKey("update_rows")]


def order(shards, target=None, dtype="float32"):
    config = EngineConfig(max_num_seqs=4, max_model_len=64, tensor_parallel_size=shards)
    model = split_heads(load_model_config(locate(None)), shards)
    shape = dataclasses.replace(smallest_shape(model, config), num_blocks=16)
    exchanged = shards > 1 and target is not None
    return CompileOrder(model, config, shape, jnp.dtype(dtype), jnp.dtype(dtype), exchanged, target)


def scopes(compiled):
    return {scope_of_op(name) for name in re.findall(r'op_name="([^"]*)"', compiled.as_text())}


@pytest.fixture
def eight_cores(monkeypatch):
    monkeypatch.setattr(compile_workers, "usable_cores", lambda: 8)


@pytest.mark.parametrize("shards", [1, 2])
def test_programs_compiled_elsewhere_are_the_same(shards, eight_cores, tmp_path, caplog):
    ordered = order(shards)
    catalogue, workers = ordered.catalogue(), CompileWorkers(compile_server(WORKER), ordered)
    programs = Programs(catalogue, command_buffers=False, kept_in=tmp_path, workers=workers)
    programs.compile(KEYS)
    assert caplog.text == ""  # no worker failed, whose programs would be compiled here
    assert all(not record.cache_hit and record.trace_s > 0 and record.compile_s > 0 for record in programs.compile_log)
    for key in KEYS[:3]:
        here = catalogue.trace(key).lower().compile()
        there = programs[key]
        assert scopes(there) == scopes(here) != set()
        assert (there.in_tree, there.out_tree) == (here.in_tree, here.out_tree)
        for name in ("alias_size_in_bytes", "output_size_in_bytes", "temp_size_in_bytes"):
            assert getattr(there.memory_analysis(), name) == getattr(here.memory_analysis(), name)


@pytest.mark.parametrize("shards", [1, 2])
def test_a_gpus_programs_are_its_kernels(shards):
    """What a worker compiles for a GPU, as far as that goes without XLA's compiler for it."""
    with lowering_for(90) as target:
        catalogue = order(shards, target, "bfloat16").catalogue()
        for key in (ProgramKey("prefill", catalogue.prefill_sizes[-1]), ProgramKey("decode", 4)):
            text = catalogue.trace(key).lower(lowering_platforms=("cuda",)).as_text()
            assert "triton_kernel_call_ffi" in text
            assert key.kind != "prefill" or "all_reduce" not in text  # shards add in a kernel


def test_programs_compiled_elsewhere_are_kept(eight_cores, tmp_path, caplog):
    ordered = order(1)
    catalogue, workers = ordered.catalogue(), CompileWorkers(compile_server(WORKER), ordered)
    Programs(catalogue, command_buffers=False, kept_in=tmp_path, workers=workers).compile(KEYS)
    assert caplog.text == ""
    again = Programs(catalogue, command_buffers=False, kept_in=tmp_path)
    again.compile(KEYS)
    assert [record.cache_hit for record in again.compile_log] == [True] * len(KEYS)


@pytest.mark.parametrize("sent", [b"", b"\x00\x00\x00\x08half"], ids=["nothing", "half an order"])
def test_a_worker_that_nobody_asks_ends_without_a_word(sent, capfd):
    with compile_server(WORKER) as server:
        server.start()
        connection = server.fork()
        with socket.socket(fileno=os.dup(connection.fileno())) as ours:
            ours.sendall(sent)
            ours.shutdown(socket.SHUT_WR)
        with pytest.raises(EOFError):  # the worker's end closes with the worker
            connection.recv()
    assert capfd.readouterr().err == ""
