"""Compiled programs that are kept on disk for the next start."""

import dataclasses
import logging

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from test_programs import catalogue

from nanovllm_jax.step.admission import pack_updates
from nanovllm_jax.step.catalogue import Catalogue, ProgramKey
from nanovllm_jax.step.programs import Programs
from nanovllm_jax.step.state import RowFloat, RowInt

UPDATE = ProgramKey("update_rows")


class Small(Catalogue):
    """The programs that compile in no time."""

    def all_keys(self):
        return [UPDATE, ProgramKey("update_extras")]


@pytest.fixture
def small():
    """Without XLA's own cache, which other tests turn on: what comes from there is not kept."""
    enabled = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    one = catalogue("xla")
    one.__class__ = Small
    yield one
    jax.config.update("jax_enable_compilation_cache", enabled)
    compilation_cache.reset_cache()


def loaded(programs):
    """For each program whether it was taken from the folder whole; XLA's own cache saves no tracing."""
    return [record.trace_s == 0 for record in programs.compile_log]


def test_a_second_start_loads_every_program_and_they_do_the_same(small, tmp_path):
    results = []
    for start in range(2):
        programs = Programs(small, command_buffers=True, kept_in=tmp_path)
        programs.compile_all()
        assert loaded(programs) == [False, False] if start == 0 else [True, True]
        rows = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), small.rows)
        (packed,) = pack_updates([(3, range(len(RowInt)), [0.5] * len(RowFloat))], [(3, 1, [7])])
        results.append(jax.tree.map(np.asarray, programs[UPDATE](rows, packed)))
    jax.tree.map(np.testing.assert_array_equal, *results)
    assert results[0]["block_tables"][3, 1] == 7


def test_a_damaged_file_is_compiled_again_with_a_warning(small, tmp_path, caplog):
    Programs(small, command_buffers=True, kept_in=tmp_path).compile_all()
    (damaged,) = tmp_path.rglob("update_rows-0.bin")
    damaged.write_bytes(damaged.read_bytes()[:1000])
    programs = Programs(small, command_buffers=True, kept_in=tmp_path)
    with caplog.at_level(logging.WARNING):
        programs.compile_all()
    assert sorted(loaded(programs)) == [False, True]
    assert "update_rows-0.bin does not load" in caplog.text
    again = Programs(small, command_buffers=True, kept_in=tmp_path)
    again.compile_all()
    assert loaded(again) == [True, True]


def test_other_arguments_find_nothing(small, tmp_path):
    Programs(small, command_buffers=True, kept_in=tmp_path).compile_all()
    shape = dataclasses.replace(small.config.shape, num_blocks=513)
    small.config = dataclasses.replace(small.config, shape=shape)
    programs = Programs(small, command_buffers=True, kept_in=tmp_path)
    programs.compile_all()
    assert loaded(programs) == [False, False]


def test_folders_that_are_no_longer_used_go(small, tmp_path, monkeypatch):
    monkeypatch.setattr("nanovllm_jax.step.executables.KEPT_FOLDERS", 1)
    Programs(small, command_buffers=True, kept_in=tmp_path).compile_all()
    small.num_logprobs += 1
    new = Programs(small, command_buffers=True, kept_in=tmp_path)
    new.compile_all()
    assert len(list(tmp_path.iterdir())) == 2
    assert new.store is not None
    new.store.mark_used()
    assert [folder.name for folder in tmp_path.iterdir()] == [new.store.folder.name]
