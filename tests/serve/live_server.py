"""A server over the embedded model on a real socket, in a thread."""

from __future__ import annotations

import threading
from contextlib import contextmanager

import openai
import uvicorn

from nanovllm_jax.serve.app import build_app
from nanovllm_jax.serve.config import ServeConfig
from nanovllm_jax.serve.server import open_socket


class Served:
    def __init__(self, llm, port):
        self.llm, self.url = llm, f"http://127.0.0.1:{port}"

    def client(self, key="none", kind=openai.OpenAI):
        return kind(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)

    def is_idle(self):
        blocks = self.llm._engine.replicas[0].scheduler.block_manager
        return (self.llm.stats.num_running, self.llm.stats.num_waiting, self.llm.num_unfinished) == (
            0,
            0,
            0,
        ) and blocks.num_free_blocks == blocks.num_blocks


@contextmanager
def serving(llm, **settings):
    opened = open_socket("127.0.0.1", 0)
    config = uvicorn.Config(build_app(llm, ServeConfig("tiny", **settings)), log_config=None, access_log=False)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([opened],))
    thread.start()
    opened.listen()
    try:
        yield Served(llm, opened.getsockname()[1])
    finally:
        server.should_exit = True
        thread.join()
        opened.close()


@contextmanager
def held(llm):
    """An engine that begins no step meanwhile, so that what was asked for stays unfinished."""
    released = threading.Event()
    llm._thread.call(released.wait)
    try:
        yield
    finally:
        released.set()


def wait_until(is_so):
    """Steps end by themselves; the thread that waits gives way to them."""
    waiter = threading.Event()
    for _ in range(600):
        if is_so():
            return
        waiter.wait(0.05)
    raise AssertionError("it never came")


def wait_until_idle(served):
    wait_until(served.is_idle)
