import pytest
from live_server import serving

from nanovllm_jax import AsyncLLM

ENGINE = {"max_model_len": 256, "max_num_seqs": 4, "max_num_batched_tokens": 64, "enforce_eager": True}


@pytest.fixture(scope="session")
def llm():
    llm = AsyncLLM(**ENGINE)
    yield llm
    llm.close()


@pytest.fixture(scope="session")
def served(llm):
    with serving(llm) as served:
        yield served
