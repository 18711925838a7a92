"""Sums over the shards of a model, and what becomes of a shard that waited in vain."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from nanovllm_jax.errors import DeviceError
from nanovllm_jax.parallel.collectives import can_exchange, check_exchange, exchange_params, sum_shards, table_of
from nanovllm_jax.parallel.mesh import make_mesh


def test_one_shard_adds_the_residual_alone():
    value = jnp.arange(4.0)
    assert sum_shards(value, None) is value
    np.testing.assert_array_equal(sum_shards(value, None, residual=value), 2 * value)


@pytest.mark.parametrize("dtype", ["float32", "int32"])
def test_shards_get_the_sum_and_the_residual(dtype):
    mesh = make_mesh(4, 1)
    add = partial(sum_shards, axis_name="model", residual=jnp.ones((1, 3), dtype))
    got = jax.shard_map(add, mesh=mesh, in_specs=PartitionSpec("model"), out_specs=PartitionSpec("model"))(
        jnp.arange(12, dtype=dtype).reshape(4, 3)
    )
    np.testing.assert_array_equal(got, [[19, 23, 27]] * 4)


def test_without_gpus_that_reach_each_other_a_model_has_no_buffers():
    assert not can_exchange(make_mesh(2, 1))
    assert exchange_params(make_mesh(2, 1), exchanged=False) == {}
    assert exchange_params(make_mesh(1, 1), exchanged=True) == {}
    assert exchange_params(make_mesh(3, 1), exchanged=True) == {}
    assert table_of({}) is None
    check_exchange({})


def test_a_shard_that_waited_in_vain_is_an_error():
    params = exchange_params(make_mesh(2, 1), exchanged=True)
    check_exchange(params)
    buffers = params["exchange"].buffers
    failed = {"exchange": replace(params["exchange"], buffers=buffers.at[0, 1, -1].set(-1))}
    with pytest.raises(DeviceError, match="waited in vain for parts of 1 sums"):
        check_exchange(failed)
