"""How keys are handed to the processes that lower programs."""

import os

import pytest

from nanovllm_jax.step.catalogue import ProgramKey
from nanovllm_jax.step.lowering import LoweringWorkers

KEYS = [ProgramKey("decode", size) for size in range(24)]


@pytest.fixture(autouse=True)
def three_cores(monkeypatch):
    """Enough for two processes."""
    monkeypatch.setattr(os, "cpu_count", lambda: 3)


def lower(keys, dies_at=None):
    return dict(LoweringWorkers("fake_lowering_worker", dies_at).lower(keys))


def test_every_key_is_lowered_by_one_of_several_processes():
    answers = lower(KEYS)
    processes = {answer.seconds for key, answer in answers.items() if answer is not None and answer.exported == key}
    assert answers.keys() == set(KEYS)
    assert 0 < len(processes) <= 2
    assert os.getpid() not in processes


def test_a_process_that_ends_early_leaves_keys_to_the_others_and_to_this_process(caplog):
    answers = lower(KEYS, dies_at=KEYS[5])
    assert answers.keys() == set(KEYS)
    assert answers[KEYS[5]] is None
    assert "ended at" in caplog.text
    assert all(answer is None or answer.exported == key for key, answer in answers.items())


def test_a_few_keys_are_not_worth_a_process():
    assert lower(KEYS[:3]) == dict.fromkeys(KEYS[:3])
