"""Runs an engine in a thread of its own; others hand requests in and get outputs through a callback."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import Empty, SimpleQueue

from nanovllm_jax.engine.engine import Engine, PreparedRequest, close_at_exit
from nanovllm_jax.errors import DeviceError, RequestError
from nanovllm_jax.outputs import RequestOutput

logger = logging.getLogger(__name__)

Event = tuple[str, RequestOutput | Exception]


class EngineThread:
    """The only thread that touches the engine's state. All methods may be called from any thread.

    What is handed in is taken before the next step, so an abort frees rows and blocks within one step.

    Args:
        engine: what to run; it is closed when the thread ends.
        on_events: called in this thread after each step with (request id, output or error) pairs; must not raise.
    """

    def __init__(self, engine: Engine, on_events: Callable[[list[Event]], None]) -> None:
        self._engine, self._on_events = engine, on_events
        self._inbox: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._lock = threading.Lock()  # held to put into the inbox, and to declare the end
        self._error: Exception | None = None
        self._open: set[str] = set()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()
        self._stay_at_exit = close_at_exit(self)  # before the engine's own handler, which came first

    @property
    def error(self) -> Exception | None:
        """Why it runs no more; None while it does."""
        return self._error

    def add(self, prepared: PreparedRequest) -> None:
        """Queue a request before the next step; an error that ends it comes as its event.

        Nobody is told when it is queued: the answer would wait for the step that runs, and cost the interpreter
        two switches of threads a request.
        """

        def add() -> None:
            known = prepared.request_id in self._open
            try:
                if self._error is not None:
                    raise self._error
                self._open.add(prepared.request_id)  # first: whatever else goes wrong ends all that are open
                self._engine.enqueue(prepared)
            except (RequestError, DeviceError) as error:
                if not known:
                    self._open.discard(prepared.request_id)
                self._on_events([(prepared.request_id, error)])

        self._put(add)

    def abort(self, request_id: str) -> None:
        """End a request; its last output has the finish reason "abort". Unknown ids are ignored."""

        def abort() -> None:
            if self._error is not None:
                return  # it ended with all others
            output = self._engine.abort(request_id)
            self._engine.update_gauges()
            if output is not None:
                self._publish([output])

        self._put(abort)

    def call[T](self, function: Callable[[], T]) -> Future[T]:
        """Run a function between two steps.

        Raises:
            DeviceError: in the future, if the engine has ended.
        """
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return  # whoever asked has left
            try:
                if self._error is not None:
                    raise self._error
                result = function()
            except (RequestError, DeviceError) as error:
                future.set_exception(error)
            else:
                future.set_result(result)

        self._put(run)
        return future

    def close(self) -> None:
        """End all requests and the thread after the step that runs, and close the engine."""
        with self._lock:
            if self._error is None:
                self._inbox.put(None)
        self._thread.join()
        self._stay_at_exit()

    def _put(self, command: Callable[[], None]) -> None:
        with self._lock:
            if self._error is None:
                self._inbox.put(command)
                return
        command()  # there is nobody to run it: it reports the error

    def _run(self) -> None:
        error: Exception = DeviceError("The engine was closed; make a new one.")
        try:
            while self._take_commands():
                outputs = self._engine.step()
                self._engine.update_gauges()  # first: who reads the last output finds the figures up to date
                self._publish(outputs)
                if not self._engine.has_unfinished:
                    self._engine.drain()
        except Exception as failure:
            logger.exception("the engine failed")
            error = failure if isinstance(failure, DeviceError) else DeviceError(f"The engine failed: {failure!r}.")
        with self._lock:
            self._error = error
        while not self._inbox.empty():
            command = self._inbox.get()
            if command is not None:
                command()
        self._on_events([(request_id, error) for request_id in list(self._open)])
        self._open.clear()
        try:
            self._engine.close()
        except Exception:
            logger.exception("the engine did not close")

    def _take_commands(self) -> bool:
        """Run what was handed in, waiting for something if there is no work; False at the end."""
        while True:
            try:
                command = self._inbox.get_nowait()
            except Empty:
                self._engine.update_gauges()  # once for all that came
                if self._engine.has_unfinished:
                    return True
                command = self._inbox.get()
            if command is None:
                return False
            command()

    def _publish(self, outputs: list[RequestOutput]) -> None:
        if outputs:
            self._open.difference_update(output.request_id for output in outputs if output.finished)
            self._on_events([(output.request_id, output) for output in outputs])
