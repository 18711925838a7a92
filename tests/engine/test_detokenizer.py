import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from nanovllm_jax.engine.detokenizer import Detokenizer

TEXT = "Hello world, 你好吗? 👩‍🚀 naïve café — 안녕하세요 🏳️‍🌈 end.\n"


@pytest.fixture(scope="module")
def byte_level():
    """Byte-level BPE, as in Qwen: characters outside the training text take a token a byte."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<eos>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(["Hello world, the end. stop STOP"] * 4, trainer)
    return tokenizer


@pytest.fixture(scope="module")
def byte_fallback():
    """As sentencepiece gives Llama 2: words start with a mark, unknown characters fall back to bytes."""
    words = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁Hello", "▁world", "▁", "!"]
    tokenizer = Tokenizer(
        models.BPE({word: i for i, word in enumerate(words)}, merges=[], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.add_special_tokens(["<unk>", "<s>"])
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    return tokenizer


def byte_tokens(tokenizer, text):
    return [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in text.encode()]


def stream(detokenizer, ids):
    """The text after each token, and the stop string that ended it."""
    texts = []
    for token in ids:
        stop = detokenizer.append([token])
        texts.append(detokenizer.text(finished=stop is not None))
        if stop is not None:
            return texts, stop
    return [*texts, detokenizer.text(finished=True)], None


def test_streamed_text_grows_by_whole_characters(byte_level):
    texts, _ = stream(Detokenizer(byte_level), byte_level.encode(TEXT).ids)
    assert texts[-1] == TEXT
    for text in texts:
        assert TEXT.startswith(text)


def test_streamed_and_final_text_are_equal(byte_level):
    ids = byte_level.encode(TEXT * 3).ids
    once = Detokenizer(byte_level)
    once.append(ids)
    late = Detokenizer(byte_level)
    late.append(ids[:50])
    assert (TEXT * 3).startswith(late.text(finished=False))
    late.append(ids[50:])
    assert once.text(finished=True) == late.text(finished=True) == TEXT * 3


def test_unfinished_character_at_the_end_is_shown_as_replacement(byte_level):
    ids = byte_level.encode("ok 😀").ids[:-1]
    detokenizer = Detokenizer(byte_level)
    detokenizer.append(ids)
    assert detokenizer.text(finished=False) == "ok "
    assert detokenizer.text(finished=True) == "ok �"


def test_bytes_that_are_no_text_do_not_hold_the_text_back_for_ever(byte_level):
    continuation = byte_level.encode("好").ids[-1]
    texts, _ = stream(Detokenizer(byte_level), [continuation] * 100 + byte_level.encode(" end").ids)
    assert texts[60].count("�") >= 30
    assert texts[-1] == "�" * 100 + " end"


def test_leading_space_depends_on_the_prompt(byte_fallback):
    hello, world = byte_fallback.token_to_id("▁Hello"), byte_fallback.token_to_id("▁world")
    bos = byte_fallback.token_to_id("<s>")
    after_prompt = Detokenizer(byte_fallback, [bos, hello])
    after_prompt.append([world])
    assert after_prompt.text(finished=True) == " world"
    alone = Detokenizer(byte_fallback, [bos])
    alone.append([hello, world])
    assert alone.text(finished=True) == "Hello world"


def test_byte_fallback_streams_whole_characters(byte_fallback):
    hello = byte_fallback.token_to_id("▁Hello")
    ids = [hello, *byte_tokens(byte_fallback, "你好😀"), hello]
    texts, _ = stream(Detokenizer(byte_fallback, [hello]), ids)
    assert texts[-1] == " Hello你好😀 Hello"
    for text in texts:
        assert texts[-1].startswith(text)


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_character_begun_in_the_prompt_is_completed_in_the_output(kind, request):
    tokenizer = request.getfixturevalue(kind)
    if kind == "byte_level":
        ids = tokenizer.encode("你好吗世界和平").ids
    else:
        ids = byte_tokens(tokenizer, "你好吗世界和平")
    detokenizer = Detokenizer(tokenizer, ids[:-1])
    detokenizer.append(ids[-1:])
    assert detokenizer.text(finished=True) == "平"


def test_special_tokens_are_skipped_unless_asked_for(byte_level):
    ids = [*byte_level.encode("end").ids, byte_level.token_to_id("<eos>")]
    skipped, kept = Detokenizer(byte_level), Detokenizer(byte_level, skip_special_tokens=False)
    skipped.append(ids)
    kept.append(ids)
    assert skipped.text(finished=True) == "end"
    assert kept.text(finished=True) == "end<eos>"


@pytest.mark.parametrize("include", [False, True])
def test_stop_string_across_tokens_ends_the_text(byte_level, include):
    ids = byte_level.encode("Hello wor#<|x|>ld").ids
    detokenizer = Detokenizer(byte_level, stop=["zzz", "#<|x|>"], include_stop_str_in_output=include)
    texts, stop = stream(detokenizer, ids)
    assert stop == "#<|x|>"
    assert texts[-1] == ("Hello wor#<|x|>" if include else "Hello wor")
    assert detokenizer.append(byte_level.encode("more").ids) is None
    assert detokenizer.text(finished=True) == texts[-1]


def test_text_that_could_become_a_stop_string_is_held_back(byte_level):
    ids = byte_level.encode("a ##b ### c").ids
    texts, stop = stream(Detokenizer(byte_level, stop=["###"]), ids)
    assert stop == "###"
    assert texts[-1] == "a ##b "
    for text in texts:
        assert "a ##b ".startswith(text)
    held = Detokenizer(byte_level, stop=["###"])
    held.append(byte_level.encode("a ##").ids)
    assert held.text(finished=False) == "a "
    assert held.text(finished=True) == "a ##"


def test_stop_string_does_not_depend_on_how_tokens_arrive(byte_level):
    ids = byte_level.encode("one two stop three end.").ids
    for stops, expected in ((["end", "stop"], "one two "), (["three", "o stop"], "one tw")):
        one_by_one, first = stream(Detokenizer(byte_level, stop=stops), ids)
        together = Detokenizer(byte_level, stop=stops)
        assert together.append(ids) == first
        assert together.text(finished=True) == one_by_one[-1] == expected


def test_of_stop_strings_that_end_together_the_longest_wins(byte_level):
    detokenizer = Detokenizer(byte_level, stop=["b", "ab"])
    assert detokenizer.append(byte_level.encode("xab").ids) == "ab"
    assert detokenizer.text(finished=True) == "x"


def test_stop_strings_within_min_tokens_are_ignored(byte_level):
    ids = byte_level.encode("x;y;z").ids
    assert len(ids) == 5
    texts, stop = stream(Detokenizer(byte_level, stop=[";"], min_tokens=2), ids)
    assert (texts[-1], stop) == ("x;y", ";")


def test_stop_string_of_split_characters(byte_level):
    texts, stop = stream(Detokenizer(byte_level, stop=["😀好"]), byte_level.encode("a😀😀好b").ids)
    assert (texts[-1], stop) == ("a😀", "😀好")
    for text in texts:
        assert "a😀".startswith(text)
