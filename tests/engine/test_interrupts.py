import signal
import threading
from contextlib import nullcontext

import pytest

from nanovllm_jax.engine.interrupts import deferred_interrupt, held_interrupts, watched_interrupt


def interrupt():
    signal.raise_signal(signal.SIGINT)


@pytest.fixture(autouse=True)
def handler_stays():
    before = signal.getsignal(signal.SIGINT)
    yield
    assert signal.getsignal(signal.SIGINT) == before


@pytest.mark.parametrize("around", [nullcontext, watched_interrupt])
def test_ctrl_c_comes_at_the_end_of_the_outermost_block(around):
    done = []

    def work():
        with deferred_interrupt():
            with deferred_interrupt():
                interrupt()
                done.append("inner")
            done.append("outer")
        done.append("after")

    with pytest.raises(KeyboardInterrupt), around():
        work()
    assert done == ["inner", "outer"]


def test_ctrl_c_comes_at_once_between_blocks():
    done = []

    def work():
        with deferred_interrupt():
            done.append("block")
        interrupt()
        done.append("after")

    with pytest.raises(KeyboardInterrupt), watched_interrupt():
        work()
    assert done == ["block"]


def test_ctrl_c_in_a_block_that_fails_does_not_wait_for_the_next_one():
    def fail():
        interrupt()
        raise ZeroDivisionError

    with pytest.raises(KeyboardInterrupt) as raised, deferred_interrupt():
        fail()
    assert isinstance(raised.value.__context__, ZeroDivisionError)
    with deferred_interrupt():
        pass


def test_ctrl_c_that_is_ignored_stays_ignored():
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with watched_interrupt(), deferred_interrupt():
            interrupt()
    finally:
        signal.signal(signal.SIGINT, previous)


def test_other_threads_hold_nothing_back():
    entered, leave = threading.Event(), threading.Event()

    def hold():
        with watched_interrupt(), deferred_interrupt():
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    entered.wait(10)
    try:
        with pytest.raises(KeyboardInterrupt):
            interrupt()
    finally:
        leave.set()
        thread.join()


def test_a_handler_that_is_set_meanwhile_gets_the_interrupts_at_the_end_of_a_block_and_stays():
    previous, got = signal.getsignal(signal.SIGINT), []

    def handler(number, frame):
        got.append(len(done))

    done = []
    try:
        with watched_interrupt():
            signal.signal(signal.SIGINT, handler)
            with deferred_interrupt():
                interrupt()
                done.append("block")
        assert got == [1]
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, previous)


def test_a_handler_that_calls_the_one_it_found_passes_the_interrupt_on():
    original = signal.getsignal(signal.SIGINT)
    try:
        with watched_interrupt():
            found = signal.getsignal(signal.SIGINT)
            signal.signal(signal.SIGINT, lambda number, frame: found(number, frame))
            with pytest.raises(KeyboardInterrupt), deferred_interrupt():
                interrupt()
        with pytest.raises(KeyboardInterrupt), watched_interrupt(), deferred_interrupt():
            interrupt()
    finally:
        signal.signal(signal.SIGINT, original)


def test_ctrl_c_passes_where_the_watching_handler_was_put_back_after_its_end():
    previous = signal.getsignal(signal.SIGINT)
    with watched_interrupt():
        ours = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, ours)
    try:
        with pytest.raises(KeyboardInterrupt):
            interrupt()
        with pytest.raises(KeyboardInterrupt), watched_interrupt(), deferred_interrupt():
            interrupt()
    finally:
        signal.signal(signal.SIGINT, previous)


@pytest.mark.parametrize("around", [nullcontext, watched_interrupt])
@pytest.mark.parametrize("most", [0, 1])
def test_where_few_are_held_back_the_next_one_passes_at_once_and_alone(around, most):
    done = []

    def work():
        with deferred_interrupt():
            with held_interrupts(most):
                for count in range(3):
                    done.append(count)
                    interrupt()
            done.append("after")

    with pytest.raises(KeyboardInterrupt) as raised, around():
        work()
    assert done == list(range(most + 1))
    assert raised.value.__context__ is None

    def hold():
        with deferred_interrupt():
            interrupt()
            interrupt()
            done.append("held")

    with pytest.raises(KeyboardInterrupt), around():  # as ever afterwards
        hold()
    assert done[-1] == "held"


def test_one_that_was_held_back_passes_where_none_is():
    done = []

    def work():
        with deferred_interrupt():
            interrupt()
            done.append("held")
            with held_interrupts(0):
                done.append("never")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == ["held"]


def test_a_handler_between_ours_gets_the_one_that_passes():
    original, got, done = signal.getsignal(signal.SIGINT), [], []

    def work():
        with deferred_interrupt(), held_interrupts(1):
            interrupt()
            done.append("held")
            interrupt()
            done.append("never")

    try:
        with watched_interrupt():
            found = signal.getsignal(signal.SIGINT)

            def handler(number, frame):
                got.append(len(done))
                found(number, frame)

            signal.signal(signal.SIGINT, handler)
            with pytest.raises(KeyboardInterrupt):
                work()
            assert got == [1]
            assert done == ["held"]
            assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, original)
