import subprocess
import sys

import pytest

_SHARDED = """
import sys
import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding
from nanovllm_jax.models.params import abstract_params, map_specs
from nanovllm_jax.weights import load_model_config, load_params, locate

mesh = jax.make_mesh((8,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))

def sharding(spec):
    return NamedSharding(mesh, PartitionSpec(*("model" if axis else None for axis in spec.axes)))

source = locate(sys.argv[1])
config = load_model_config(source)
shardings = map_specs(sharding, abstract_params(config))
split = load_params(source, config, "float32", shardings)
first = SingleDeviceSharding(jax.devices()[0])
whole = load_params(source, config, "float32", map_specs(lambda _: first, abstract_params(config)))

def check(leaf, want, alone):
    assert leaf.sharding == want, (leaf.sharding, want)
    np.testing.assert_array_equal(np.asarray(leaf), np.asarray(alone))

jax.tree.map(check, split, shardings, whole)
print("same")
"""


@pytest.fixture(scope="session")
def load_on_eight_devices():
    """Checks, on eight forced host devices, that a model loads split as asked and holds the same numbers."""

    def load(directory):
        environment = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, "-c", _SHARDED, str(directory)]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert run.stdout.strip() == "same", run.stderr

    return load
