"""How many blocks fit on a device, by what its allocator says."""

from types import SimpleNamespace

import pytest

from nanovllm_jax import DeviceError
from nanovllm_jax.step.memory import RESERVE_BYTES, blocks_that_fit, bytes_held

GB, BLOCK = 10**9, 10**6


@pytest.fixture(autouse=True)
def claimed(monkeypatch):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.900")


def device(in_use, limit=70 * GB):
    return SimpleNamespace(platform="gpu", memory_stats=lambda: {"bytes_limit": limit, "bytes_in_use": in_use})


def blocks(in_use, held_by_others=0):
    sizes = {"fixed_bytes": 2 * GB, "temporary": GB, "block_bytes": BLOCK}
    return blocks_that_fit([device(in_use)], held_by_others=held_by_others, **sizes, gpu_memory_utilization=0.9)


def test_the_number_of_blocks_does_not_depend_on_how_far_the_weights_have_come():
    """It is a shape of every program: with another number all would be compiled again."""
    expected = (67 * GB - RESERVE_BYTES) // BLOCK // 256 * 256
    assert [blocks(in_use) for in_use in (0, GB, 2 * GB, 4 * GB)] == [expected] * 4


def test_what_another_engine_holds_is_not_counted_on():
    with pytest.raises(DeviceError, match=r"67\.0 GB are held by others"):
        blocks(in_use=69 * GB, held_by_others=bytes_held([device(GB), device(67 * GB)]))
