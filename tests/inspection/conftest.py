import pytest
from inspection_reports import inspected

from nanovllm_jax.step.programs import Programs


@pytest.fixture(scope="session")
def on_cpu():
    """A small model's step, compiled for the CPU."""
    return inspected("five layers", gpu=None, programs=lambda c: Programs(c, command_buffers=True), dtype="bfloat16")


@pytest.fixture(scope="session")
def for_h200():
    """A step of 28 layers, lowered for a GPU that is not there."""
    return inspected("qwen3-0.6b")
