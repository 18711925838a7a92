"""Compiled programs that are kept on disk for the next start."""

import dataclasses
import logging
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
from test_programs import catalogue

from nanovllm_jax.step import draw
from nanovllm_jax.step.admission import pack_updates
from nanovllm_jax.step.catalogue import Catalogue, ProgramKey
from nanovllm_jax.step.programs import Programs
from nanovllm_jax.step.state import RowFloat, RowInt

UPDATE, EXTRAS = ProgramKey("update_rows"), ProgramKey("update_extras")


class Small(Catalogue):
    """The programs that compile in no time."""

    def all_keys(self):
        return [UPDATE, EXTRAS]


def small_catalogue(shards=1, replica=0):
    one = catalogue("xla", shards, replica)
    one.__class__ = Small
    return one


@pytest.fixture
def small(no_xla_cache):
    return small_catalogue()


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


def update_both(programs):
    """What the programs make of zeros, and the devices that hold it."""
    both, found = programs.catalogue, []
    (rows_update,) = pack_updates([(3, range(len(RowInt)), [0.5] * len(RowFloat))], [(3, 1, [7])])
    length = draw.extras_update_length(both.config.shape.max_adjustments)
    extras_update = np.arange(length, dtype=np.int32) % 16
    for key, state, packed in ((UPDATE, both.rows, rows_update), (EXTRAS, both.extras, extras_update)):
        zeros = jax.tree.map(lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding), state)
        found.append(programs[key](zeros, packed))
    return jax.tree.map(np.asarray, found), {leaf.sharding.mesh for leaf in jax.tree.leaves(found)}


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_replicas_on_other_devices_take_what_the_first_one_compiled(no_xla_cache, tmp_path, shards):
    results = []
    for replica in range(8 // shards):
        mine = small_catalogue(shards, replica)
        programs = Programs(mine, command_buffers=True, kept_in=tmp_path)
        programs.compile_all()
        assert loaded(programs) == [replica > 0] * 2
        result, meshes = update_both(programs)
        assert meshes == {mine.mesh}
        results.append(result)
    for result in results[1:]:
        jax.tree.map(np.testing.assert_array_equal, result, results[0])
    assert results[0][0]["block_tables"][3, 1] == 7
    assert results[0][1]["counts"].any()


def test_replicas_that_need_a_program_at_once_compile_it_once(no_xla_cache, tmp_path):
    replicas = [Programs(small_catalogue(1, i), command_buffers=True, kept_in=tmp_path) for i in range(4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda programs: programs[UPDATE], replicas))
    assert sorted(loaded(programs) for programs in replicas) == [[False], [True], [True], [True]]


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
