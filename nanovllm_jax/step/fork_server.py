"""Processes that begin with everything imported: one process imports, and forks whenever another one is wanted."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, NoReturn

logger = logging.getLogger(__name__)

Work = Callable[[Iterator[Any], Callable[[Any], None]], None]  # takes what comes in, and a function that answers


class ForkServer:
    """A process that runs a module, whose imports its forks share.

    The standard library's fork server would import the user's main module as well, which may have no guard for that.

    Args:
        module: what to run; it imports what its forks need, starts no thread, and calls `serve`.
        environment: variables of the process, over this one's.
    """

    def __init__(self, module: str, environment: Mapping[str, str] | None = None) -> None:
        self._module, self._environment = module, dict(environment or {})
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None

    def __enter__(self) -> ForkServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> bool:
        """Have the process import, unless it does already; whether there is one. A warning says why there is none."""
        if self._process is not None:
            return True
        self._control, theirs = socket.socketpair()
        with theirs:
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", self._module],
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,  # what a library prints there is not this program's output
                    process_group=0,  # Ctrl-C in a terminal is for this process, which ends the other
                    env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))} | self._environment,
                )
            except Exception as error:  # no interpreter, no memory, closed files
                logger.warning("no process can be started for %s: %s", self._module, error)
                self.stop()
        return self._process is not None

    def fork(self) -> Connection:
        """A new process, which does the module's work over this connection.

        Raises:
            OSError: if the server has ended. If it ends later, the connection's methods raise EOFError or OSError.
        """
        control = self._control
        if control is None:
            raise BrokenPipeError(f"{self._module} does not run")
        ours, theirs = socket.socketpair()
        with ours, theirs:
            socket.send_fds(control, [b"+"], [theirs.fileno()])
            return Connection(ours.detach())

    def stop(self) -> None:
        """End the server and its forks, whatever they do."""
        process, control = self._process, self._control
        self._process = self._control = None
        if control is not None:
            with suppress(OSError):
                control.shutdown(socket.SHUT_RDWR)  # ends a server that serves, also where a fork of ours has a copy
            control.close()
        if process is not None:
            process.terminate()  # ends one that still imports
            process.wait()
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)  # forks that are left, if it was killed


def serve(work: Work) -> NoReturn:
    """In a server's process: fork for each connection, until no more can come; then end all forks."""
    forks: list[int] = []
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # which would leave forks behind
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # a program that ignores it would have us lose count of them
    try:
        with socket.socket(fileno=os.dup(0)) as control:
            while True:
                message, connections, *_ = socket.recv_fds(control, 1, 1)
                if not message:
                    sys.exit(0)
                try:
                    fork = os.fork()
                except OSError:
                    traceback.print_exc()  # and who asked for it finds the connection closed
                else:
                    if fork == 0:
                        _work_and_end(work, control, connections[0])
                    forks.append(fork)
                os.close(connections[0])
    finally:
        for fork in forks:
            os.kill(fork, signal.SIGKILL)
        for fork in forks:
            os.waitpid(fork, 0)


def _work_and_end(work: Work, control: socket.socket, connected: int) -> NoReturn:
    status = 1
    try:
        control.close()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # so that nobody but the server listens where it does
        connection = Connection(connected)
        work(_received(connection), connection.send)
        status = 0
    except (BrokenPipeError, ConnectionResetError):  # nobody waits for the answer
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)  # whatever happens, a fork must not go on as the server


def _received(connection: Connection) -> Iterator[Any]:
    with suppress(EOFError, OSError):  # at the end of a message or, if the sender has died, inside of one
        while True:
            yield connection.recv()
