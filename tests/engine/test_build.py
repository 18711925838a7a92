"""Start-up, where it is not seen from outside."""

from concurrent.futures import Future

import pytest

from nanovllm_jax import LLM, SamplingParams
from nanovllm_jax.engine import build


def test_too_low_an_estimate_of_temporary_memory_is_corrected_before_the_engine_runs(monkeypatch, caplog):
    asked, plan = [], build._plan

    def recorded(*arguments, temporary=None):
        asked.append(temporary)
        return plan(*arguments, temporary=temporary)

    monkeypatch.setattr(build, "_plan", recorded)
    monkeypatch.setattr(build, "_is_estimated", lambda config, device: True)
    monkeypatch.setattr(build, "expected_temporary_bytes", lambda catalogue: 100)
    monkeypatch.setattr(build, "temporary_bytes", lambda programs: 200)
    with LLM(max_num_seqs=1, max_model_len=64, enforce_eager=True, skip_tokenizer_init=True) as llm:
        params = SamplingParams(max_tokens=2, ignore_eos=True)
        (output,) = llm.generate([{"prompt_token_ids": [1, 2, 3]}], params, use_tqdm=False)
    assert asked == [None, 200]
    assert "compiling for fewer blocks" in caplog.text
    assert len(output.outputs[0].token_ids) == 2


def test_a_compiling_process_that_started_early_ends_though_nothing_had_to_be_compiled(monkeypatch):
    server = build.compile_server("nanovllm_jax.engine.compile_worker")
    monkeypatch.setattr(build, "_must_compile", lambda: True)
    monkeypatch.setattr(build, "compile_server", lambda module: server)
    started, start = [], server.start
    monkeypatch.setattr(server, "start", lambda: started.append(start()))
    with LLM(max_num_seqs=1, max_model_len=64, skip_tokenizer_init=True):
        assert len(started) == 1
        with pytest.raises(OSError, match="does not run"):
            server.fork()


class AtOnce:
    """A pool whose work is done when it is submitted."""

    def __init__(self, size):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, function, *arguments):
        future = Future()
        future.set_result(function(*arguments))
        return future

    map = staticmethod(map)


def test_the_number_of_blocks_does_not_depend_on_how_far_the_weights_have_come(monkeypatch):
    """It is a shape of every program: with another number all would be compiled again."""
    order = []

    def recorded(name, function):
        def call(*arguments):
            order.append(name)
            return function(*arguments)

        return call

    monkeypatch.setattr(build, "ThreadPoolExecutor", AtOnce)
    for name in ("device_memory", "claim_device_memory", "load_params"):
        monkeypatch.setattr(build, name, recorded(name, getattr(build, name)))
    with LLM(max_num_seqs=1, max_model_len=64, enforce_eager=True, skip_tokenizer_init=True):
        assert order == ["device_memory", "claim_device_memory", "load_params"]
