"""Processes that are forked from one that has imported already."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from nanovllm_jax.step.fork_server import ForkServer

ECHO = "fake_compile_worker"


def asked(connection, order, key):
    connection.send(order)
    connection.send(key)
    return connection.recv().compile_s  # the fake's process


def ended(process):
    """Whether it has ended, within ten seconds."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return True
    return False


@pytest.fixture
def server():
    with ForkServer(ECHO) as running:
        running.start()
        yield running


def test_each_connection_has_a_process_of_its_own(server):
    connections = [server.fork() for _ in range(3)]
    assert len({asked(connection, None, 1) for connection in connections}) == 3


def test_a_fork_whose_connection_closes_ends_and_the_others_go_on(server):
    first, second = server.fork(), server.fork()
    asked(first, None, 1)
    process = asked(second, None, 1)
    first.close()
    second.send(2)
    assert second.recv().compile_s == process


def test_stopping_ends_forks_whatever_they_do_and_it_can_start_again(server):
    connection = server.fork()
    process = asked(connection, "stuck", 1)
    server.stop()
    assert ended(process)
    with pytest.raises((EOFError, OSError)):
        connection.recv()
    with pytest.raises(OSError, match="does not run"):
        server.fork()
    server.start()
    assert asked(server.fork(), None, 1) != process


def test_who_asks_a_server_that_could_not_import_is_told(capfd):
    with ForkServer("no_such_module") as server:
        server.start()
        with pytest.raises((EOFError, OSError)):
            asked(server.fork(), None, 1)
    assert "no_such_module" in capfd.readouterr().err


WITHOUT_A_WORD = """
import os, signal
from nanovllm_jax.step.fork_server import ForkServer
server = ForkServer("fake_compile_worker")
server.start()
connection = server.fork()
connection.send("stuck")
connection.send(1)
print(connection.recv().compile_s, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_forks_of_a_program_that_is_killed_end_without_a_word():
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", WITHOUT_A_WORD], capture_output=True, env=environment, text=True)
    assert done.returncode == -signal.SIGKILL
    assert ended(int(done.stdout))
    assert done.stderr == ""


@pytest.mark.parametrize("sent", [b"", b"\x00\x00\x00\x08half"], ids=["nothing", "half a message"])
def test_a_fork_whose_asker_is_gone_ends_without_a_word(sent, capfd):
    with ForkServer(ECHO) as server:
        server.start()
        probe, connection = server.fork(), server.fork()
        with socket.socket(fileno=os.dup(connection.fileno())) as raw:
            raw.sendall(sent)
        connection.close()
        asked(probe, None, 1)
    assert capfd.readouterr().err == ""
