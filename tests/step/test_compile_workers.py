"""How keys are handed to the processes that compile programs."""

import os
import subprocess
import sys
import time

import pytest

from nanovllm_jax.step import compile_workers
from nanovllm_jax.step.catalogue import ProgramKey
from nanovllm_jax.step.compile_workers import CompileWorkers, compile_server

KEYS = [ProgramKey("decode", size) for size in range(24)]


@pytest.fixture(autouse=True)
def three_cores(monkeypatch):
    """Enough for two processes."""
    monkeypatch.setattr(compile_workers, "usable_cores", lambda: 3)


def compiled(keys, dies_at=None):
    return dict(CompileWorkers(compile_server("fake_compile_worker"), dies_at).compile(keys))


def test_every_key_is_compiled_by_one_of_several_processes():
    answers = compiled(KEYS)
    processes = {answer.compile_s for key, answer in answers.items() if answer is not None and answer.executable == key}
    assert answers.keys() == set(KEYS)
    assert 0 < len(processes) <= 2
    assert os.getpid() not in processes


def test_of_a_process_that_ends_early_the_other_takes_what_is_left(caplog):
    answers = compiled(KEYS, dies_at=KEYS[5])
    assert answers.keys() == set(KEYS)
    assert [key for key, answer in answers.items() if answer is None] == [KEYS[5]]
    assert "ended at" in caplog.text
    assert all(answer is None or answer.executable == key for key, answer in answers.items())


def test_what_nobody_can_compile_is_left_to_this_process(caplog):
    assert dict(CompileWorkers(compile_server("no_such_module"), None).compile(KEYS)) == dict.fromkeys(KEYS)
    assert caplog.text.count("ended at") == 2


def test_where_no_process_can_be_started_all_is_left_to_this_one(monkeypatch, caplog):
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    assert compiled(KEYS) == dict.fromkeys(KEYS)
    assert caplog.text.count("WARNING") == 1


def test_leaving_early_ends_the_processes_at_once(caplog):
    running = CompileWorkers(compile_server("fake_compile_worker"), "stuck").compile(KEYS)
    _, answer = next(running)
    started = time.monotonic()
    running.close()
    assert time.monotonic() - started < 10  # the fake sleeps for a minute
    with pytest.raises(ProcessLookupError):
        os.kill(answer.compile_s, 0)
    assert caplog.text == ""


def test_cores_that_this_process_may_not_use_do_not_count():
    code = "from nanovllm_jax.step.compile_workers import usable_cores; print(usable_cores())"
    only = f"import os; os.sched_setaffinity(0, {{min(os.sched_getaffinity(0))}}); {code}"
    done = subprocess.run([sys.executable, "-c", only], capture_output=True, text=True)
    assert done.stdout.strip() == "1"


def test_a_few_keys_are_not_worth_a_process():
    assert compiled(KEYS[:3]) == dict.fromkeys(KEYS[:3])
