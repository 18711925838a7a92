"""Runs the application on a socket until a signal ends it."""

from __future__ import annotations

import logging
import signal
import socket
import sys

import uvicorn

from nanovllm_jax.async_llm import AsyncLLM
from nanovllm_jax.errors import ConfigError
from nanovllm_jax.serve.app import build_app
from nanovllm_jax.serve.config import ServeConfig

logger = logging.getLogger(__name__)

_SWITCH_INTERVAL_S = 0.0005


def open_socket(host: str, port: int) -> socket.socket:
    """A socket that is bound but does not listen yet; opened before the model loads, which takes longer.

    Raises:
        ConfigError: if the address cannot be had.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        opened = socket.socket(family, socket.SOCK_STREAM)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind(address)
    except OSError as error:
        raise ConfigError(f"{host}:{port} cannot be opened ({error}); choose another --host or --port.") from error
    return opened


def run_server(
    llm: AsyncLLM, config: ServeConfig, opened: socket.socket, *, drain_timeout: int | None, log_requests: bool
) -> None:
    """Serve until SIGTERM or Ctrl-C.

    It then takes no new requests and finishes those that run, for at most `drain_timeout` s; a second Ctrl-C stops
    at once.
    """
    server = uvicorn.Server(
        uvicorn.Config(
            build_app(llm, config),
            log_config=None,
            access_log=log_requests,
            timeout_graceful_shutdown=drain_timeout,
            server_header=False,
        )
    )
    # The engine's thread asks for the interpreter several times a step, and waits this long for it while a request is
    # handled; Python's 5 ms would be longer than most steps.
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    # uvicorn raises the signal again when it has drained; that would end the process before the engine is closed.
    previous = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        server.run(sockets=[opened])
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
