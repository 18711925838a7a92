"""Start-up, where it is not seen from outside."""

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
