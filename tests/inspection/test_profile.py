"""A profile: steps, kernels and gaps, from a trace taken here on the CPU and from traces as GPUs leave them."""

import pytest
from xspace import Space

from nanovllm_jax import LLM, SamplingParams
from nanovllm_jax.engine import plan
from nanovllm_jax.errors import ConfigError
from nanovllm_jax.inspection.attribution import ProgramText
from nanovllm_jax.inspection.profile import measured_sizes
from nanovllm_jax.inspection.profile_summary import accounted
from nanovllm_jax.inspection.step_times import summarise
from nanovllm_jax.inspection.xplane import read_trace, trace_of
from nanovllm_jax.step.buckets import decode_buckets
from nanovllm_jax.step.catalogue import ProgramKey

DECODE = """HloModule jit_decode_forward, is_scheduled=true

ENTRY %main (p: bf16[4,64]) -> bf16[4,64] {
  %p = bf16[4,64]{1,0} parameter(0)
  %loop_fusion.1 = bf16[4,64]{1,0} fusion(%p), kind=kLoop, metadata={op_name="jit(f)/layer0/attention/add"}
  %call.2 = bf16[4,64]{1,0} custom-call(%loop_fusion.1), custom_call_target="__cublas$gemm", \
metadata={op_name="jit(f)/layer0/attention/qkv/te,ekgd->tkgd/dot_general"}
  %call.3 = bf16[4,64]{1,0} custom-call(%call.2), custom_call_target="triton_kernel_call_ffi", \
metadata={op_name="jit(f)/layer0/attention/paged_decode/triton_kernel_call"}
  ROOT %loop_fusion.4 = bf16[4,64]{1,0} fusion(%call.3), kind=kLoop, metadata={op_name="jit(f)/layer0/mlp/mul"}
}
"""
DRAW = """HloModule jit_draw, is_scheduled=true

ENTRY %main (p: bf16[4,64]) -> s32[4] {
  %p = bf16[4,64]{1,0} parameter(0)
  ROOT %input_reduce_fusion = s32[4]{0} fusion(%p), kind=kInput, metadata={op_name="jit(d)/sample/argmax"}
}
"""
PROGRAMS = [ProgramText.parse(ProgramKey("decode", 4), DECODE), ProgramText.parse(ProgramKey("plain", 4), DRAW)]
KERNELS = ("loop_fusion_1", "nvjet_tst_64x8_NNT", "decode_kernel", "loop_fusion_4")


def graph_step(space, number, start, launched, *, thread="python", **stats):
    """A step of 50 µs: four kernels of a CUDA graph, 5 µs between the second and the third, and the sampler."""
    space.launch(number, launched, thread=thread)
    for name, at, duration in zip(KERNELS, (0, 10, 25, 35), (10, 10, 10, 5), strict=True):
        space.kernel(name, start + at, duration, number, **stats)
    space.kernel("input_reduce_fusion", start + 40, 10, number, hlo_module="jit_draw", hlo_op="input_reduce_fusion")


def pipelined():
    """Three decode steps of 60 µs each: the second starts at once after the first, the third 20 µs late."""
    space = Space()
    for number, (marked, start) in enumerate(((0, 10), (15, 60), (70, 130))):
        space.step("decode[4]", number, marked, 12)
        graph_step(space, number, start, marked + 5)
    space.kernel("MemcpyH2D", 112, 4, stream=14)
    space.kernel("MemcpyD2D", 153, 2, 2)  # in the gap between two kernels of the third step
    return space


def test_kernels_of_a_cuda_graph_get_their_step_program_and_scope_by_launch_name_and_order():
    profile = summarise(trace_of(pipelined().data()), PROGRAMS, "here")
    found = {(row.name, row.program, row.scope): row.count for row in profile.kernels}
    assert found == {
        ("loop_fusion", "decode[4]", "layer*/attention"): 3,
        ("nvjet_tst_64x8_NNT", "decode[4]", "layer*/attention/qkv/te,ekgd->tkgd"): 3,
        ("decode_kernel", "decode[4]", "layer*/attention/paged_decode"): 3,
        ("loop_fusion", "decode[4]", "layer*/mlp"): 3,
        ("input_reduce_fusion", "plain[4]", "sample"): 3,
        ("MemcpyH2D", "", ""): 1,
        ("MemcpyD2D", "decode[4]", ""): 1,
    }
    kinds = {row.name: row.kind for row in profile.kernels}
    assert (kinds["nvjet_tst_64x8_NNT"], kinds["decode_kernel"], kinds["MemcpyH2D"]) == (
        "product",
        "kernel",
        "transfer",
    )
    assert profile.notes[0].startswith("Each kernel belongs to the step whose dispatch launched it")
    assert "6 of 17 kernels came without an instruction's name" in profile.notes[1]


def test_turns_of_a_loop_in_one_program_get_their_scopes_each_time():
    text = """HloModule jit_decode, is_scheduled=true

%body (p: bf16[4,64]) -> bf16[4,64] {
  %p = bf16[4,64]{1,0} parameter(0)
  %loop_fusion.1 = bf16[4,64]{1,0} fusion(%p), kind=kLoop, metadata={op_name="jit(f)/while/body/layer0/attention/add"}
  %call.2 = bf16[4,64]{1,0} custom-call(%loop_fusion.1), custom_call_target="triton_kernel_call_ffi", \
metadata={op_name="jit(f)/while/body/layer0/attention/paged_decode/triton_kernel_call"}
  ROOT %call.3 = bf16[4,64]{1,0} custom-call(%call.2), custom_call_target="__cublas$gemm", \
metadata={op_name="jit(f)/while/body/lm_head/dot_general"}
}

ENTRY %main (q: bf16[4,64]) -> bf16[4,64] {
  %q = bf16[4,64]{1,0} parameter(0)
  ROOT %while.4 = bf16[4,64]{1,0} while(%q), condition=%cond, body=%body
}
"""
    space = Space()
    space.step("decode[4]", 0, 0, 12)
    space.launch(0, 5, thread="python")
    for turn in range(3):
        for name, at in (("loop_fusion_1", 0), ("decode_kernel", 10), ("nvjet_tst_64x8_NNT", 20)):
            space.kernel(name, 20 + 30 * turn + at, 10, 0)
    profile = summarise(trace_of(space.data()), [ProgramText.parse(ProgramKey("decode", 4), text)], "here")
    assert {(row.name, row.scope): row.count for row in profile.kernels} == {
        ("loop_fusion", "layer*/attention"): 3,
        ("decode_kernel", "layer*/attention/paged_decode"): 3,
        ("nvjet_tst_64x8_NNT", "lm_head"): 3,
    }


def test_gaps_are_between_kernels_of_a_step_and_between_steps():
    profile = summarise(trace_of(pipelined().data()), PROGRAMS, "here")
    assert profile.gaps_s == pytest.approx(5e-6 + 5e-6 + 3e-6)
    assert [step.host_gap_s for step in profile.steps] == pytest.approx([0, 0, 20e-6])
    assert profile.span_s == pytest.approx(170e-6)
    assert profile.host_gap_frac == pytest.approx(20 / 170)
    assert profile.busy_s == pytest.approx(3 * 45e-6 + 2e-6)
    (kind,) = profile.kinds
    assert (kind.steps, kind.tokens) == (3, 12)
    assert kind.step_s == pytest.approx(55e-6)
    assert accounted(kind) == pytest.approx((50 + 20 / 3) / 55)


def test_steps_launched_by_another_thread_are_told_apart_by_their_modules():
    space = Space()
    for number, start in enumerate((10, 60)):
        space.step("decode[4]", number, number, 1)  # both dispatched before the first kernel is launched
        graph_step(space, number, start, start - 3, thread="worker", hlo_module="jit_decode_forward")
    profile = summarise(trace_of(space.data()), PROGRAMS, "here")
    assert profile.notes[0] == "Steps were told apart by the order of modules on the device."
    assert [step.start_s for step in profile.steps] == pytest.approx([10e-6, 60e-6])
    assert [step.busy_s for step in profile.steps] == pytest.approx([45e-6, 45e-6])


def test_a_trace_without_launches_or_modules_says_that_only_time_tells_steps_apart():
    space = Space()
    space.step("decode[4]", 0, 0, 5)
    space.kernel("unheard_of", 1, 3)
    profile = summarise(trace_of(space.data()), [], "here")
    assert "by time alone" in profile.notes[0]
    assert "No CUDA graph was launched" in profile.notes[1]
    assert "1 of 1 kernels are of no known program" in profile.notes[-1]
    assert profile.kernels[0].scope == ""


def test_kernels_that_run_at_once_are_busy_once_and_other_devices_are_named():
    space = Space()
    space.step("decode[4]", 0, 0, 5)
    space.kernel("loop_fusion_1", 10, 10)
    space.kernel("loop_fusion_4", 15, 10, stream=20)
    space.kernel("loop_fusion_1", 0, 99, gpu=1)
    space.event("/device:GPU:0", "XLA Ops", "derived", 0, 99)
    profile = summarise(trace_of(space.data()), PROGRAMS, "here")
    assert (profile.busy_s, profile.gaps_s) == pytest.approx((15e-6, 0))
    assert "first of 2 devices" in " ".join(profile.notes)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A profiled generation on the CPU, and the report with it."""
    folder = tmp_path_factory.mktemp("trace")
    with LLM(max_model_len=64, max_num_seqs=4, max_num_batched_tokens=64) as llm:
        params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
        with llm.profile(folder) as profile:
            with pytest.raises(ConfigError, match="not finished"):
                _ = profile.summary
            llm.generate(["To be", "or not"], params, use_tqdm=False)
        llm.generate(["again"], params, use_tqdm=False)  # outside: leaves no mark
        return profile, llm.inspect(profile=profile), folder


def test_a_run_on_the_cpu_has_its_steps_tokens_and_scopes(run):
    profile, _, folder = run
    summary = profile.summary
    assert [step.name for step in summary.steps] == ["prefill[64]"] + ["decode[4]"] * 5
    assert summary.tokens == summary.steps[0].tokens + 5 * 2
    assert all(step.start_s is not None and step.busy_s > 0 for step in summary.steps)
    assert 0 <= summary.host_gap_frac < 1
    scopes = {(row.program, row.scope) for row in summary.kernels}
    assert {("decode[4]", "layer*/attention/rope_paged_decode"), ("plain[4]", "sample")} <= scopes
    assert any("need a GPU" in note for note in summary.notes)
    assert len(read_trace(folder).marks) == 6
    assert "host gap" in repr(profile)


def test_measured_times_stand_beside_the_computed_work(run):
    profile, report, _ = run
    assert measured_sizes(profile.summary) == (4, 64)
    decode = next(one for one in report.programs if one.name == "decode[4]")
    products = [row for row in decode.kernels if row.kind == "product"]
    assert products
    assert all(row.measured_s > 0 for row in products)
    bucket = {row.name: row for row in report.buckets}
    in_products = sum(row.measured_s for row in products)
    assert in_products < bucket["decode[4]"].measured_s
    assert bucket["decode[1]"].measured_s is None
    assert report.profile == profile.summary


def test_steps_have_the_size_of_their_program_where_programs_have_different_sizes(tmp_path, monkeypatch):
    """With a GPU's sizes a step of three rows is of 4 rows if its tokens are drawn apart, and else of 8."""
    monkeypatch.setattr(plan, "decode_buckets", lambda most, *, fine: decode_buckets(most, fine=True))
    with_logprobs = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True, logprobs=1)
    without = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    llm = LLM(max_model_len=64, max_num_seqs=8, max_num_batched_tokens=64, enforce_eager=True)
    with llm, llm.profile(tmp_path) as profile:
        llm.generate(["To be", "or not", "to be"], [with_logprobs, without, without], use_tqdm=False)
    assert [step.name for step in profile.summary.steps] == ["prefill[64]"] + ["decode[4]"] * 2 + ["decode[8]"] * 2
    programs = {row.program for row in profile.summary.kernels}
    assert {"prefill[64]", "decode_forward[4]", "full[4]", "decode[8]"} <= programs


def test_a_block_without_a_step_is_an_error_and_so_is_a_folder_without_a_trace(tmp_path):
    llm = LLM(max_model_len=64, max_num_seqs=1, max_num_batched_tokens=64, enforce_eager=True)
    with llm, pytest.raises(ConfigError, match="has no step"), llm.profile(tmp_path):
        pass
    with pytest.raises(ConfigError, match=r"no \*\.xplane\.pb"):
        read_trace(tmp_path / "nowhere")
