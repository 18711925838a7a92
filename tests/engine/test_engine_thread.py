"""What the engine's thread does between two steps."""

import threading

from nanovllm_jax.engine.engine_thread import EngineThread


class StandInEngine:
    """Has nothing to do; counts how often its figures are asked for, and when."""

    has_unfinished = False

    def __init__(self):
        self.num_updates = 0

    def update_gauges(self):
        self.num_updates += 1

    def close(self):
        pass


def test_figures_are_brought_up_to_date_once_for_all_that_came_during_a_step():
    engine = StandInEngine()
    thread = EngineThread(engine, lambda events: None)
    try:
        begun, go_on = threading.Event(), threading.Event()
        thread.call(lambda: (begun.set(), go_on.wait(10)))  # a step, as far as the others are concerned
        assert begun.wait(10)
        before = engine.num_updates
        commands = [thread.call(lambda: engine.num_updates) for _ in range(1000)]
        go_on.set()
        assert [command.result(10) for command in commands] == [before] * 1000
    finally:
        thread.close()
    assert engine.num_updates <= before + 1
