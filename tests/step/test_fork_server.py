"""Processes that are forked from one that has imported already."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nanovllm_jax.step.fork_server import ForkServer

ECHO = "fake_compile_worker"


def asked(connection, order, key):
    connection.send(order)
    connection.send(key)
    return connection.recv().compile_s  # the fake's process


def ended(process):
    """Whether it has ended, within ten seconds; its parent may not have noticed yet."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.01)
    return False


@pytest.fixture
def server():
    with ForkServer(ECHO) as running:
        running.start()
        yield running


def test_each_connection_has_a_process_of_its_own(server):
    connections = [server.fork() for _ in range(3)]
    assert len({asked(connection, None, 1) for connection in connections}) == 3


@pytest.mark.parametrize("sent", [b"", b"\x00\x00\x00\x08half"], ids=["nothing", "half a message"])
def test_a_fork_whose_connection_closes_ends_without_a_word_and_the_others_go_on(sent, server, capfd):
    first, second = server.fork(), server.fork()
    process, other = asked(first, None, 1), asked(second, None, 1)
    os.write(first.fileno(), sent)
    first.close()
    assert ended(process)
    second.send(2)
    assert second.recv().compile_s == other
    assert capfd.readouterr().err == ""


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


def test_stopping_does_not_wait_for_who_has_a_copy_of_the_servers_connection(server):
    connection = server.fork()
    process = asked(connection, "stuck", 1)
    with subprocess.Popen(["sleep", "60"], pass_fds=[server._control.fileno()]) as holder:
        server.stop()
        assert holder.poll() is None
        holder.kill()
    assert ended(process)


def test_stopping_ends_forks_of_a_server_that_was_killed(server):
    connection = server.fork()
    process = asked(connection, "stuck", 1)
    os.kill(server._process.pid, signal.SIGKILL)
    assert ended(server._process.pid)
    os.kill(process, 0)  # it goes on
    server.stop()
    assert ended(process)


def test_who_asks_a_server_that_could_not_import_is_told(capfd):
    with ForkServer("no_such_module") as server:
        server.start()
        with pytest.raises((EOFError, OSError)):
            asked(server.fork(), None, 1)
    assert "no_such_module" in capfd.readouterr().err


def test_a_server_that_cannot_be_started_is_a_warning(monkeypatch, caplog):
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    with ForkServer(ECHO) as server:
        assert not server.start()
        assert "/no/such/python" in caplog.text
        with pytest.raises(OSError, match="does not run"):
            server.fork()


KILLED = """
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


def test_forks_of_a_program_that_is_killed_end_without_a_word(tmp_path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with (tmp_path / "errors").open("w+") as errors:  # a pipe would be waited for until all forks have ended
        command = [sys.executable, "-c", KILLED]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=errors, env=environment, text=True)
        assert done.returncode == -signal.SIGKILL
        assert ended(int(done.stdout))
        assert (tmp_path / "errors").read_text() == ""
