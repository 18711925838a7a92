"""How many blocks fit on a device, by what its allocator says."""

from types import SimpleNamespace

import pytest

from nanovllm_jax import DeviceError
from nanovllm_jax.step.memory import RESERVE_BYTES, blocks_that_fit, device_memory

GB, BLOCK = 10**9, 10**6


@pytest.fixture(autouse=True)
def claimed(monkeypatch):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.900")


def device(in_use, limit=70 * GB):
    return SimpleNamespace(platform="gpu", memory_stats=lambda: {"bytes_limit": limit, "bytes_in_use": in_use})


def blocks(*devices):
    sizes = {"fixed_bytes": 2 * GB, "temporary": GB, "block_bytes": BLOCK}
    return blocks_that_fit(device_memory(devices), **sizes, gpu_memory_utilization=0.9)


def test_blocks_take_what_nobody_else_needs_of_the_smallest_device():
    expected = (67 * GB - RESERVE_BYTES) // BLOCK // 256 * 256
    assert blocks(device(0)) == blocks(device(0), device(0, limit=80 * GB)) == expected


def test_what_another_engine_holds_is_not_counted_on():
    assert blocks(device(GB), device(0)) == (66 * GB - RESERVE_BYTES) // BLOCK // 256 * 256
    with pytest.raises(DeviceError, match=r"67\.0 GB are held by others"):
        blocks(device(GB), device(67 * GB))
