"""What a step must not do is found, each with its place."""

import jax
import jax.numpy as jnp
import pytest
from inspection_reports import inspected

from nanovllm_jax.inspection import costs
from nanovllm_jax.inspection.findings import compiled_findings, traced_findings
from nanovllm_jax.inspection.hlo_text import instructions
from nanovllm_jax.inspection.kernel_costs import Work


def found(function, *arguments, dtype=jnp.bfloat16):
    return [(one.kind, one.message) for one in traced_findings("p", jax.make_jaxpr(function)(*arguments).jaxpr, dtype)]


def test_a_sound_step_has_no_findings(on_cpu, for_h200):
    assert for_h200.findings == []
    assert {one.kind for one in on_cpu.findings} <= {"large copy"}


def test_a_float32_product_of_narrow_weights_is_found():
    def step(x, w):
        with jax.named_scope("layer1"), jax.named_scope("mlp"):
            return x.astype(jnp.float32) @ w.astype(jnp.float32)

    x = jnp.zeros((4, 4), jnp.bfloat16)
    ((kind, message),) = found(step, x, x)
    assert kind == "unexpected float32"
    assert "layer*/mlp" in message
    assert found(lambda x, w: jnp.dot(x, w, preferred_element_type=jnp.float32), x, x) == []
    assert found(step, x, x, dtype=jnp.float32) == []


def test_transposes_of_large_arrays_and_calls_of_the_host_are_found():
    large = jax.ShapeDtypeStruct((1024, 1024), jnp.float32)
    ((kind, message),) = found(lambda x: x.T, large)
    assert kind == "large copy"
    assert "4.2 MB" in message
    ((kind, _),) = found(lambda x: jax.debug.callback(print, x), large)
    assert kind == "host transfer"
    assert found(lambda x: x.T, jax.ShapeDtypeStruct((8, 8), jnp.float32)) == []


def test_copies_that_xla_leaves_are_found_with_their_size():
    hlo = """HloModule m

ENTRY %main (p: f32[1024,1024]) -> f32[1024,1024] {
  %p = f32[1024,1024]{1,0} parameter(0)
  ROOT %copy.1 = f32[1024,1024]{0,1} copy(%p), metadata={op_name="jit(f)/layer7/mlp/transpose"}
}
"""
    (finding,) = compiled_findings("p", instructions(hlo))
    assert finding.message == "1 × copy of 4.2 MB in layer*/mlp."


def test_kernels_that_fall_back_on_a_gpu_are_found():
    report = inspected("tiny", attention_backend="xla")
    assert {one.kind for one in report.findings} == {"fallback"}
    assert any(
        "rope_paged_decode" in one.message and "attention_backend is 'xla'" in one.message for one in report.findings
    )


def test_a_kernel_without_a_formula_is_found(monkeypatch):
    monkeypatch.delitem(costs.BY_LOAD, "ragged_prefill")
    (finding,) = inspected("tiny").findings
    assert (finding.kind, finding.program) == ("no formula", "prefill[1024]")
    assert "the triton kernel prefill_kernel in layer*/attention/ragged_prefill" in finding.message


@pytest.mark.parametrize("key", ["ragged_prefill", "prefill_kernel"])
def test_costs_by_operands_count_each_call_by_its_scope_or_its_function(monkeypatch, key):
    monkeypatch.delitem(costs.BY_LOAD, "ragged_prefill")
    monkeypatch.setitem(costs.BY_OPERANDS, key, lambda call: Work(len(call.operands), call.bytes))
    report = inspected("tiny")
    assert report.findings == []
    row = next(row for row in report.programs[1].kernels if row.name.startswith(key))
    assert (row.kind, row.count, row.source) == ("triton", 3, "formula")
    assert row.flops >= 3 * 6  # q, both caches, the block tables and two lists of lengths
    assert row.bytes > 0
