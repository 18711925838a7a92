"""How keys are handed to the processes that lower programs."""

import os
import subprocess
import sys
import time

import pytest

from nanovllm_jax.step import lowering
from nanovllm_jax.step.catalogue import ProgramKey
from nanovllm_jax.step.lowering import LoweringWorkers

KEYS = [ProgramKey("decode", size) for size in range(24)]


@pytest.fixture(autouse=True)
def three_cores(monkeypatch):
    """Enough for two processes."""
    monkeypatch.setattr(lowering, "usable_cores", lambda: 3)


def lower(keys, dies_at=None):
    return dict(LoweringWorkers("fake_lowering_worker", dies_at).lower(keys))


def test_every_key_is_lowered_by_one_of_several_processes():
    answers = lower(KEYS)
    processes = {answer.seconds for key, answer in answers.items() if answer is not None and answer.exported == key}
    assert answers.keys() == set(KEYS)
    assert 0 < len(processes) <= 2
    assert os.getpid() not in processes


def test_of_a_process_that_ends_early_the_other_takes_what_is_left(caplog):
    answers = lower(KEYS, dies_at=KEYS[5])
    assert answers.keys() == set(KEYS)
    assert [key for key, answer in answers.items() if answer is None] == [KEYS[5]]
    assert "ended at" in caplog.text
    assert all(answer is None or answer.exported == key for key, answer in answers.items())


def test_what_nobody_can_lower_is_left_to_this_process(caplog):
    assert dict(LoweringWorkers("no_such_module", None).lower(KEYS)) == dict.fromkeys(KEYS)
    assert caplog.text.count("ended at") == 2


def test_leaving_early_ends_the_processes_at_once(caplog):
    running = LoweringWorkers("fake_lowering_worker", "stuck").lower(KEYS)
    _, answer = next(running)
    started = time.monotonic()
    running.close()
    assert time.monotonic() - started < 10  # the fake sleeps for a minute
    with pytest.raises(ProcessLookupError):
        os.kill(answer.seconds, 0)
    assert caplog.text == ""


@pytest.mark.parametrize("sent", [b"", b"\x80"], ids=["nothing", "half an order"])
def test_a_process_whose_engine_is_gone_ends_without_a_word(sent):
    command = [sys.executable, "-m", "nanovllm_jax.engine.lowering_worker"]
    done = subprocess.run(command, input=sent, capture_output=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    assert (done.returncode, done.stderr) == (0, b"")


def test_cores_that_this_process_may_not_use_do_not_count():
    code = "from nanovllm_jax.step.lowering import usable_cores; print(usable_cores())"
    only = f"import os; os.sched_setaffinity(0, {{min(os.sched_getaffinity(0))}}); {code}"
    done = subprocess.run([sys.executable, "-c", only], capture_output=True, text=True)
    assert done.stdout.strip() == "1"


def test_a_few_keys_are_not_worth_a_process():
    assert lower(KEYS[:3]) == dict.fromkeys(KEYS[:3])
