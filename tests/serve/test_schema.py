"""The server's own OpenAPI schema, tried out by schemathesis: whatever it allows, no answer is a server error."""

from __future__ import annotations

import httpx
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from live_server import serving, wait_until_idle
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import response_schema_conformance

from nanovllm_jax import AsyncLLM

_PATIENCE_S = 0.5  # a body may ask for 128 samples; the client leaves then, which is a trial of its own


@pytest.fixture(scope="module")
def small():
    llm = AsyncLLM(max_model_len=32, max_num_seqs=4, max_num_batched_tokens=32, enforce_eager=True)
    with serving(llm) as served:
        yield served
    llm.close()


OPERATIONS = [
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{model}"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("GET", "/health"),
    ("GET", "/version"),
    ("GET", "/metrics"),
    ("POST", "/reset_prefix_cache"),
]


def test_every_operation_is_tried(small):
    paths = httpx.get(f"{small.url}/openapi.json").json()["paths"]
    assert {(method.upper(), path) for path, operations in paths.items() for method in operations} == set(OPERATIONS)


# The server, a thread of this process, draws from `random` meanwhile.
@pytest.mark.filterwarnings("ignore:Do not use the `random` module inside strategies")
@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_no_request_is_a_server_error(small, method, path):
    schema = schemathesis.openapi.from_url(f"{small.url}/openapi.json")
    session = requests.Session()

    @given(case=schema[path][method].as_strategy())
    @settings(
        max_examples=12,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def attempt(case):
        try:
            response = case.call(session=session, timeout=_PATIENCE_S)
        except requests.Timeout:
            return
        case.validate_response(response, checks=[not_a_server_error, response_schema_conformance])

    with session:
        attempt()
    wait_until_idle(small)
