"""A report of the step: what it holds, how it is written, and what differs between two."""

import dataclasses
import json
from pathlib import Path

import jsonschema_rs
import pytest
from inspection_reports import inspected, replaced

import nanovllm_jax.inspection
from nanovllm_jax.errors import ConfigError
from nanovllm_jax.inspection import Report, profile_data
from nanovllm_jax.inspection import report as report_data
from nanovllm_jax.inspection.plan import ProgramKey

STATE = ("caches", "rows")


def arguments(report, program):
    (found,) = [one for one in report.programs if one.kind == program]
    return {argument.name: argument for argument in found.arguments}


@pytest.mark.parametrize("kind", ["decode", "prefill"])
def test_state_is_updated_in_place_as_lowered_and_as_compiled(on_cpu, for_h200, kind):
    for report in (on_cpu, for_h200):
        held = arguments(report, kind)
        assert all(held[name].donated and held[name].reused == held[name].arrays for name in STATE)
        assert not held["params"].donated
        assert not [one for one in report.findings if one.kind == "not donated"]


def test_a_cache_that_is_not_donated_is_warned_of():
    report = inspected("tiny", gpu=None, wrap=lambda catalogue: replaced(catalogue, donated=()))
    caches = arguments(report, "decode")["caches"]
    assert (caches.donated, caches.reused) == (False, 0)
    warned = {one.program: one.message for one in report.findings if one.kind == "not donated"}
    assert "caches is not donated: each call copies" in warned["decode[16]"] or "rows" in warned["decode[16]"]


def test_what_needs_a_gpu_is_said_and_not_invented(for_h200):
    for program in for_h200.programs:
        assert program.needs == "a GPU"
        assert (program.memory, program.compile_s, program.instructions) == (None, None, [])
        assert "hlo" not in program.texts
    assert for_h200.memory.temporaries is None
    assert "needs a GPU" in repr(for_h200)


def test_compiled_program_has_xlas_account_of_memory(on_cpu):
    decode = on_cpu.programs[0]
    caches = arguments(on_cpu, "decode")["caches"].bytes
    assert decode.needs is None
    assert decode.memory.reused >= caches
    assert decode.memory.peak >= decode.memory.arguments
    assert {row.source for row in decode.instructions} == {"XLA"}


@pytest.mark.parametrize("text", ["jaxpr", "stablehlo"])
def test_layers_are_shown_once_with_their_scopes(for_h200, text):
    for program in for_h200.programs[:2]:
        shown = program.texts[text]
        # A prefill's last layer is apart: only the last tokens pass all of it.
        layers = 28 if program.kind == "decode" else 27
        assert sum(f"×{layers}" in line for line in shown.lines) == 1
        scopes = {program.scopes[index] for index in shown.scopes}
        kernels = ["rope_paged_decode"] if program.kind == "decode" else ["rope_cache_write", "ragged_prefill"]
        assert {f"layer*/attention/{kernel}" for kernel in kernels} <= scopes


@pytest.mark.parametrize("text", ["jaxpr", "stablehlo"])
def test_layers_in_one_kernel_have_one_scope(text):
    (program,) = inspected("qwen3-0.6b", keys=[ProgramKey("decode", 1)]).programs
    assert "decode_layers" in {program.scopes[index] for index in program.texts[text].scopes}
    assert any(line.startswith("// decode_layers_kernel: 8 warps") for line in program.texts["triton"].lines)


def test_optimised_hlo_folds_equal_layers_and_keeps_scopes(on_cpu):
    decode = on_cpu.programs[0]
    shown = decode.texts["hlo"]
    assert shown.lines[0].startswith("// equal layers are shown once: layer0 ×")
    assert len(shown.lines) < shown.full_lines
    assert "layer*/attention/qkv/te,ekgd->tkgd" in {decode.scopes[index] for index in shown.scopes}


def test_triton_kernels_come_with_their_ir_and_ptx(for_h200):
    decode = for_h200.programs[0]
    assert any(line.startswith("// rope_decode_kernel: 4 warps") for line in decode.texts["triton"].lines)
    assert any("tt.func public @rope_decode_kernel" in line for line in decode.texts["triton"].lines)
    assert ".target sm_90a" in decode.texts["ptx"].lines
    # Every call carries it, and every launch of a program reads what calls carry.
    assert not [line for line in decode.texts["ptx"].lines if line.startswith((" ", "\t", ".loc")) or not line]
    assert {row.kind for row in decode.kernels if row.name == "rope_paged_decode"} == {"triton"}


def test_json_follows_its_schema_and_comes_back(on_cpu, for_h200, tmp_path):
    schema = json.loads((Path(nanovllm_jax.inspection.__file__).parent / "report.schema.json").read_text())
    for report in (on_cpu, for_h200):
        jsonschema_rs.validator_for(schema).validate(json.loads(report.json()))
        file = tmp_path / "report.json"
        file.write_text(report.json())
        assert Report.load(file) == report
        assert Report.load(file).diff(report) == []


def test_schema_describes_every_field():
    schema = json.loads((Path(nanovllm_jax.inspection.__file__).parent / "report.schema.json").read_text())
    described = {"Report": schema, **schema["$defs"]}
    for name, definition in described.items():
        kind = getattr(report_data, name, None) or getattr(profile_data, name)
        fields = [field.name for field in dataclasses.fields(kind)]
        assert fields == list(definition["properties"]) == definition["required"]


def test_report_of_another_version_is_refused(tmp_path):
    file = tmp_path / "report.json"
    file.write_text('{"schema_version": 0}')
    with pytest.raises(ConfigError, match="schema version 0; this release reads 2"):
        Report.load(file)


def test_diff_names_exactly_what_the_changed_setting_changed():
    before = inspected("tiny", gpu=None)
    after = inspected("tiny", gpu=None, context=512)
    found = {one.path: (one.before, one.after) for one in after.diff(before)}
    assert found["card.context"] == (1024, 512)
    outside = {path for path in found if not path.startswith("programs.") and path != "card.context"}
    assert outside == set()
    changed = {path.split(".")[-1] for path in found if path.startswith("programs.")}
    assert changed == {"flops", "bytes"}
    assert not any("product" in path for path in found)


def test_tensor_parallel_step_costs_less_on_each_device_and_stays_within_its_collectives():
    one, two = inspected("tiny", gpu=None), inspected("tiny", gpu=None, tensor_parallel_size=2)
    # Two sums a layer and the embedding's; where the step samples, each shard's best score and its id.
    assert two.programs[0].collectives == {"psum": 2 * 3 + 1, "all_gather": 2}
    assert two.memory.cache <= one.memory.cache / 2
    assert two.programs[0].flops < 0.6 * one.programs[0].flops
    assert [finding for finding in two.findings if finding.kind == "collectives"] == []


def test_buffers_of_sums_over_gpus_which_no_program_reads_hide_no_donated_state():
    report = inspected("tiny", tensor_parallel_size=2)
    state = [argument for argument in report.programs[0].arguments if argument.name in ("caches", "rows")]
    assert [argument.reused for argument in state] == [argument.arrays for argument in state]
    assert [finding for finding in report.findings if finding.kind == "not donated"] == []
