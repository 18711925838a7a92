"""Start-up, where it is not seen from outside."""

from dataclasses import replace

from nanovllm_jax import LLM, SamplingParams
from nanovllm_jax.engine import build
from nanovllm_jax.engine.capacity import plan_programs


def test_too_low_an_estimate_of_temporary_memory_is_corrected_before_the_engine_runs(monkeypatch, caplog):
    asked = []

    def plan(model, config, mesh, temporary=None):
        asked.append(temporary)
        return replace(plan_programs(model, config, mesh), temporary=temporary or 100)

    monkeypatch.setattr(build, "plan_programs", plan)
    monkeypatch.setattr(build, "temporary_bytes", lambda programs: 200)
    with LLM(max_num_seqs=1, max_model_len=64, enforce_eager=True, skip_tokenizer_init=True) as llm:
        params = SamplingParams(max_tokens=2, ignore_eos=True)
        (output,) = llm.generate([{"prompt_token_ids": [1, 2, 3]}], params, use_tqdm=False)
    assert asked == [None, 200]
    assert "more than" in caplog.text
    assert len(output.outputs[0].token_ids) == 2
