"""Answers each key with its process instead of a program; the order says at which key it dies, or to be `stuck`."""

import os
import time

from nanovllm_jax.step.compile_workers import Made
from nanovllm_jax.step.fork_server import serve


def answer(asked, reply):
    dies_at = next(asked, None)
    for key in asked:
        if key == dies_at:
            os._exit(0)
        reply(Made(key, 0.0, 0.0, os.getpid()))
        if dies_at == "stuck":
            time.sleep(60)


serve(answer)
