"""A report from a running engine, and from the command line."""

import json
from pathlib import Path

from typer.testing import CliRunner

from nanovllm_jax import LLM
from nanovllm_jax.cli import app


def test_a_running_engine_reports_its_step_and_why_it_compiled():
    options = {"max_model_len": 64, "max_num_seqs": 4, "max_num_batched_tokens": 64, "enforce_eager": True}
    with LLM(**options) as llm:
        report = llm.inspect()
        assert [program.name for program in report.programs] == ["decode[4]", "prefill[64]", "plain[4]"]
        assert all(program.memory for program in report.programs)
        first = llm.compile_log[0]
        assert first.reason == "first program of kind decode"
        assert min(first.trace_s, first.lower_s, first.compile_s) > 0
        assert first.compile_start_s >= first.start_s + first.trace_s + first.lower_s
        assert "decode[4]" in repr(report)
        assert "decode[4]" in report._repr_html_()


def test_command_writes_a_report_and_compares_it(tmp_path):
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    file = tmp_path / "report.json"
    common = ["inspect", str(tmp_path), "--no-weights", "--phase", "decode", "--rows", "4"]
    done = CliRunner().invoke(app, [*common, "--gpu", "a100", "--json", str(file)])
    assert done.exit_code == 0, done.output
    assert "a100 (sm_80)" in done.stdout
    assert "needs a GPU" in done.stdout
    table = [line.split("│") for line in done.stdout[done.stdout.index("on one device") :].splitlines()]
    sizes = {row[1].strip(): row[2].strip().replace(",", "") for row in table if len(row) == 4}
    parts = ("weights", "cache", "rows", "extras")
    assert sizes["temporaries"] == "–"
    assert abs(float(sizes["together"]) - sum(float(sizes[part]) for part in parts)) < 0.3  # rounded
    assert float(sizes["the device has"]) > float(sizes["together"])
    page = tmp_path / "report.html"
    done = CliRunner().invoke(
        app, [*common, "--gpu", "a100", "--context", "256", "--diff", str(file), "--html", str(page)]
    )
    assert "card.context" in done.stdout
    assert '"path":"card.context"' in page.read_text(encoding="utf-8")
    done = CliRunner().invoke(app, [*common, "--gpu", "a100", "--ir", "ptx"])
    assert ".target sm_80" in done.stdout
    done = CliRunner().invoke(app, [*common, "--gpu", "a100", "--ir", "hlo"])
    assert done.exit_code == 2
    assert "needs compiling for a GPU that is here" in done.stderr
    done = CliRunner().invoke(app, [*common, "--gpu", "voodoo2"])
    assert "GPU 'voodoo2' is not known" in done.stderr
    assert Path(file).exists()
