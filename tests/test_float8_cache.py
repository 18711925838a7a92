"""A cache in float8: what it costs the model, and what a step costs where XLA runs attention."""

from __future__ import annotations

import math

import jax
import pytest

from nanovllm_jax import LLM, SamplingParams

# The King James Bible: Genesis 1:1-10, Psalm 23, Ecclesiastes 3:1-8.
TEXT = """\
In the beginning God created the heaven and the earth. And the earth was without form, and void; and darkness was \
upon the face of the deep. And the Spirit of God moved upon the face of the waters. And God said, Let there be light: \
and there was light. And God saw the light, that it was good: and God divided the light from the darkness. And God \
called the light Day, and the darkness he called Night. And the evening and the morning were the first day. And God \
said, Let there be a firmament in the midst of the waters, and let it divide the waters from the waters. And God made \
the firmament, and divided the waters which were under the firmament from the waters which were above the firmament: \
and it was so. And God called the firmament Heaven. And the evening and the morning were the second day. And God said, \
Let the waters under the heaven be gathered together unto one place, and let the dry land appear: and it was so. And \
God called the dry land Earth; and the gathering together of the waters called he Seas: and God saw that it was good.
The LORD is my shepherd; I shall not want. He maketh me to lie down in green pastures: he leadeth me beside the still \
waters. He restoreth my soul: he leadeth me in the paths of righteousness for his name's sake. Yea, though I walk \
through the valley of the shadow of death, I will fear no evil: for thou art with me; thy rod and thy staff they \
comfort me. Thou preparest a table before me in the presence of mine enemies: thou anointest my head with oil; my cup \
runneth over. Surely goodness and mercy shall follow me all the days of my life: and I will dwell in the house of the \
LORD for ever.
To every thing there is a season, and a time to every purpose under the heaven: A time to be born, and a time to die; \
a time to plant, and a time to pluck up that which is planted; A time to kill, and a time to heal; a time to break \
down, and a time to build up; A time to weep, and a time to laugh; a time to mourn, and a time to dance; A time to \
cast away stones, and a time to gather stones together; a time to embrace, and a time to refrain from embracing; A \
time to get, and a time to lose; a time to keep, and a time to cast away; A time to rend, and a time to sew; a time to \
keep silence, and a time to speak; A time to love, and a time to hate; a time of war, and a time of peace.
"""


def embedded(kv_cache_dtype: str, **settings) -> LLM:
    return LLM(
        kv_cache_dtype=kv_cache_dtype, max_num_seqs=2, max_num_batched_tokens=128, enforce_eager=True, **settings
    )


def bits_per_byte(kv_cache_dtype: str) -> float:
    """Of the text's tokens but the first, over all UTF-8 bytes; computed in chunks that read each other's K and V."""
    with embedded(kv_cache_dtype, max_model_len=1024) as llm:
        (output,) = llm.generate(TEXT, SamplingParams(max_tokens=1, prompt_logprobs=0), use_tqdm=False)
    scored = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
    return -sum(entries[token].logprob for token, entries in scored) / math.log(2) / len(TEXT.encode())


def test_the_embedded_model_loses_less_than_a_hundredth_of_its_bits_per_byte():
    wide, narrow = bits_per_byte("float32"), bits_per_byte("fp8")
    assert 0.8 < wide < 1.8  # it knows this kind of text, so there is something to lose
    assert narrow == pytest.approx(wide, rel=0.01)
    assert narrow != wide


def test_a_step_moves_what_it_reads_and_writes_and_not_the_whole_cache():
    with embedded("fp8", max_model_len=64, num_gpu_blocks_override=4096) as llm:
        llm.generate("In the beginning", SamplingParams(max_tokens=8, ignore_eos=True), use_tqdm=False)
        programs = llm._engine.replicas[0].runner.programs
        layer = min(cache.size for cache in jax.tree.leaves(programs.catalogue.caches))  # bytes of K in one layer
        assert len(programs.compiled()) >= 2
        for key, program in programs.compiled().items():
            assert program.memory_analysis().temp_size_in_bytes < layer, key
