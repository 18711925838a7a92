"""Parity with Hugging Face transformers on the same device: tokens and log-probabilities, position by position.

    python benchmarks/parity.py                                        # Qwen3-0.6B's shape and the built-in model
    python benchmarks/parity.py --model embedded --dtype bfloat16
    python benchmarks/parity.py --reference-python goldenv/bin/python  # where PyTorch has an environment of its own

Both sides see equal ids, so that one different choice does not spread:

- *prefill*: the reference continues each prompt greedily; both score prompt and continuation in one go;
- *decode*: the engine continues each prompt greedily; the reference scores what the engine chose;
- *loop*: likewise, several tokens a decode step, as without log-probabilities.

float32 (matrix products in full precision): the most likely token may differ only where the reference's top two
are less than 1e-4 apart. bfloat16: it agrees at 97% of positions, each side's is among the other's top five, and
log-probabilities of the reference's token differ by at most 0.1. The reference multiplies by the head in float32
from its bfloat16 hidden states, as the engine does: transformers' own bfloat16 logits lie 0.03 apart at 4 to 8.

PyTorch and JAX run one after the other in processes of their own, since each takes the whole device. The exit
status is 1 if any rule is broken.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EMBEDDED = ROOT / "nanovllm_jax" / "assets" / "tiny"
TOP = 5
BLOCK_SIZE = 16

MIN_GAP = 1e-4  # float32: below this the top two may change places
# Largest distance between log-probabilities. The rule for float32 is about tokens; 1e-3 is ten times its rounding
# over 28 layers.
MAX_DIFFERENCE = {"float32": 1e-3, "bfloat16": 0.1}
MIN_AGREEMENT = 0.97  # bfloat16

# The built-in model was trained on English: ids at random are nothing that it knows. King James, John 1.
TEXT = """In the beginning was the Word, and the Word was with God, and the Word was God. The same was in the
beginning with God. All things were made by him; and without him was not any thing made that was made. In him was
life; and the life was the light of men. And the light shineth in darkness; and the darkness comprehended it not.
There was a man sent from God, whose name was John. The same came for a witness, to bear witness of the Light,
that all men through him might believe. He was not that Light, but was sent to bear witness of that Light."""


@dataclass(frozen=True)
class Case:
    """A model in a dtype, and its prompts."""

    name: str
    path: str
    dtype: str
    prompts: list[list[int]]
    new_tokens: int

    @property
    def max_model_len(self) -> int:
        """Room for the longest prompt, its continuation and the one token that scoring generates."""
        return max(map(len, self.prompts)) + self.new_tokens + 1


@dataclass(frozen=True)
class Scores:
    """What one side predicts before each of T - 1 or fewer tokens of a sequence.

    Attributes:
        token_logprobs: log-probability of the token that is there.
        top_ids: the five most likely ids, best first.
        top_logprobs: their log-probabilities.
    """

    token_logprobs: list[float]
    top_ids: list[list[int]]
    top_logprobs: list[list[float]]


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=["qwen3-0.6b", "embedded"], default=["qwen3-0.6b", "embedded"])
    parser.add_argument("--dtype", nargs="+", choices=list(MAX_DIFFERENCE), default=list(MAX_DIFFERENCE))
    parser.add_argument("--prompt-lengths", nargs="+", type=int, default=[1, 15, 16, 17, 100, 400, 1500])
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--attention-backend", default="auto")
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.9, help="less, to run beside others")
    parser.add_argument("--reference-python", default=sys.executable, help="a Python with torch and transformers")
    parser.add_argument("--stage", choices=list(STAGES), help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    """Runs the stages in turn and compares; or one of them."""
    args = parse_args()
    if args.stage:
        cases = [Case(**case) for case in read(args.work, "cases")]
        write(args.work, args.stage, [STAGES[args.stage](case, index, args) for index, case in enumerate(cases)])
        return 0
    with tempfile.TemporaryDirectory() as folder:
        args.work = Path(folder)
        cases = [case for model in args.model for case in make_cases(model, args)]
        write(args.work, "cases", [asdict(case) for case in cases])
        for stage, python in (
            ("reference", args.reference_python),
            ("engine", sys.executable),
            ("referee", args.reference_python),
        ):
            print(f"{stage}: {len(cases)} cases", file=sys.stderr)
            options = ["--stage", stage, "--work", folder, "--attention-backend", args.attention_backend]
            options += ["--gpu-memory-utilization", str(args.gpu_memory_utilization)]
            # -P: transformers looks for a package named like a file in this folder.
            subprocess.run([python, "-P", __file__, *options], check=True)
        return report(cases, args.work)


def make_cases(model: str, args: argparse.Namespace) -> list[Case]:
    """One case a dtype; writes the checkpoint of random weights if the model is one."""
    if model == "embedded":
        from tokenizers import Tokenizer

        ids = Tokenizer.from_file(str(EMBEDDED / "tokenizer.json")).encode(TEXT, add_special_tokens=False).ids
        context = json.loads((EMBEDDED / "config.json").read_text())["max_position_embeddings"]
        longest = min(len(ids), context - args.new_tokens - 1)
        path = EMBEDDED
        prompts = [ids[:length] for length in args.prompt_lengths if length < longest] + [ids[:longest]]
    else:
        import numpy as np
        from models import QWEN3_0_6B, write_random_checkpoint

        path = write_random_checkpoint(QWEN3_0_6B, args.work / model)
        rng = np.random.default_rng(0)
        prompts = [rng.integers(QWEN3_0_6B["vocab_size"], size=size).tolist() for size in args.prompt_lengths]
    return [Case(model, str(path), dtype, prompts, args.new_tokens) for dtype in args.dtype]


def read(work: Path, name: str) -> list:
    return json.loads((work / f"{name}.json").read_text())


def write(work: Path, name: str, value: list) -> None:
    (work / f"{name}.json").write_text(json.dumps(value))


# ---- PyTorch ----


class Reference:
    """transformers' model; eager attention in float32, and its default (whose sums are float32) in bfloat16."""

    def __init__(self, case: Case) -> None:
        import torch
        import transformers

        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = (
            transformers.AutoModelForCausalLM.from_pretrained(
                case.path,
                dtype=getattr(torch, case.dtype),
                attn_implementation="eager" if case.dtype == "float32" else "sdpa",
                local_files_only=True,
            )
            .to(self.device)
            .eval()
        )
        self.head = self.model.get_output_embeddings().weight.float()

    def hidden(self, token_ids: list[int], cache=None):
        """Hidden states before the head, [T, E], and the cache extended by them."""
        import torch

        with torch.no_grad():
            ids = torch.tensor([token_ids], device=self.device)
            out = self.model.model(input_ids=ids, past_key_values=cache, use_cache=True)
        return out.last_hidden_state[0], out.past_key_values

    def generate(self, prompt: list[int], new_tokens: int) -> list[int]:
        """Prompt and greedy continuation."""
        token_ids, cache = list(prompt), None
        for _ in range(new_tokens):
            hidden, cache = self.hidden(token_ids if cache is None else token_ids[-1:], cache)
            token_ids.append(int((hidden[-1].float() @ self.head.T).argmax()))
        return token_ids

    def score(self, token_ids: list[int], start: int = 1) -> Scores:
        """Scores of the tokens from `start` on."""
        hidden, _ = self.hidden(token_ids)
        tokens, ids, logprobs = [], [], []
        for first in range(start - 1, len(token_ids) - 1, 256):  # 256 rows of logits at a time
            last = min(first + 256, len(token_ids) - 1)
            rows = (hidden[first:last].float() @ self.head.T).double().log_softmax(-1)
            top = rows.topk(TOP)
            tokens += [rows[i, token].item() for i, token in enumerate(token_ids[first + 1 : last + 1])]
            ids += top.indices.tolist()
            logprobs += top.values.tolist()
        return Scores(tokens, ids, logprobs)


def reference_stage(case: Case, index: int, args: argparse.Namespace) -> list[dict]:
    """The reference's continuations, and its scores of them and their prompts."""
    reference, results = Reference(case), []
    for prompt in case.prompts:
        token_ids = reference.generate(prompt, case.new_tokens)
        results.append({"token_ids": token_ids, "scores": asdict(reference.score(token_ids))})
    return results


def referee_stage(case: Case, index: int, args: argparse.Namespace) -> dict[str, list[dict]]:
    """The reference's scores of the engine's continuations."""
    reference, engine = Reference(case), read(args.work, "engine")[index]
    return {
        mode: [
            asdict(reference.score(prompt + answer["token_ids"], start=len(prompt)))
            for prompt, answer in zip(case.prompts, engine[mode], strict=True)
        ]
        for mode in ("generated", "looped")
    }


# ---- the engine ----


def engine_stage(case: Case, index: int, args: argparse.Namespace) -> dict[str, list[dict]]:
    """The engine's scores of the reference's sequences, and its own continuations with their scores."""
    import jax

    from nanovllm_jax import LLM, SamplingParams

    jax.config.update("jax_default_matmul_precision", "highest" if case.dtype == "float32" else None)
    sequences = [result["token_ids"] for result in read(args.work, "reference")[index]]
    scoring = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=TOP, ignore_eos=True, detokenize=False)
    greedy = SamplingParams(temperature=0, max_tokens=case.new_tokens, logprobs=TOP, ignore_eos=True, detokenize=False)
    with LLM(
        case.path,
        skip_tokenizer_init=True,
        dtype=case.dtype,
        max_model_len=case.max_model_len,
        max_num_seqs=len(sequences),
        block_size=BLOCK_SIZE,
        attention_backend=args.attention_backend,
        gpu_memory_utilization=args.gpu_memory_utilization,
        decode_steps=4,
        enforce_eager=True,
    ) as llm:

        def run(sequences: list[list[int]], params: SamplingParams) -> list:
            return llm.generate([{"prompt_token_ids": ids} for ids in sequences], params, use_tqdm=False)

        scored, answers = run(sequences, scoring), run(case.prompts, greedy)
        # Without log-probabilities a decode step samples several tokens in a row; what they were is scored afterwards.
        chosen = [output.outputs[0].token_ids for output in run(case.prompts, replace(greedy, logprobs=None))]
        rescored = run([prompt + ids for prompt, ids in zip(case.prompts, chosen, strict=True)], scoring)
    return {
        "looped": [
            {"token_ids": ids, "scores": asdict(chosen_first(output.prompt_logprobs[len(prompt) :], ids))}
            for output, prompt, ids in zip(rescored, case.prompts, chosen, strict=True)
        ],
        "scores": [
            asdict(engine_scores(output.prompt_logprobs[1:], ids[1:]))
            for output, ids in zip(scored, sequences, strict=True)
        ],
        "generated": [
            {
                "token_ids": output.outputs[0].token_ids,
                "scores": asdict(engine_scores(output.outputs[0].logprobs, output.outputs[0].token_ids)),
            }
            for output in answers
        ],
    }


def chosen_first(entries: list, token_ids: list[int]) -> Scores:
    """Scores in which the token that the engine chose stands first, as its most likely one."""
    scores = engine_scores(entries, token_ids)
    ids, logprobs = [], []
    for token, logprob, top, values in zip(
        token_ids, scores.token_logprobs, scores.top_ids, scores.top_logprobs, strict=True
    ):
        others = [(i, value) for i, value in zip(top, values, strict=True) if i != token]
        ids.append([token, *(i for i, _ in others)][:TOP])
        logprobs.append([logprob, *(value for _, value in others)][:TOP])
    return Scores(scores.token_logprobs, ids, logprobs)


def engine_scores(entries: list, token_ids: list[int]) -> Scores:
    """From one `{token id: Logprob}` a position."""
    tops = [
        sorted((entry.rank, token, entry.logprob) for token, entry in row.items() if entry.rank <= TOP)
        for row in entries
    ]
    return Scores(
        [row[token].logprob for row, token in zip(entries, token_ids, strict=True)],
        [[token for _, token, _ in top] for top in tops],
        [[logprob for _, _, logprob in top] for top in tops],
    )


# ---- comparison ----


@dataclass
class Comparison:
    """How two sides' predictions relate over many positions.

    Attributes:
        positions: how many were compared.
        agreed: at how many both find the same token most likely.
        clear: disagreements where the reference's top two are at least `MIN_GAP` apart.
        outside: positions where one side's most likely token is not in the other's top five.
        difference: largest distance between log-probabilities of the reference's most likely token.
        given: the same of the token that is there, however unlikely; in bfloat16 no rule is about it.
    """

    positions: int = 0
    agreed: int = 0
    clear: int = 0
    outside: int = 0
    difference: float = 0.0
    given: float = 0.0

    def add(self, reference: Scores, engine: Scores) -> None:
        """Counts every position of one sequence."""
        for i, (theirs, ours) in enumerate(zip(reference.top_ids, engine.top_ids, strict=True)):
            self.given = max(self.given, abs(reference.token_logprobs[i] - engine.token_logprobs[i]))
            if theirs[0] in ours:
                logprob = engine.top_logprobs[i][ours.index(theirs[0])]
                self.difference = max(self.difference, abs(reference.top_logprobs[i][0] - logprob))
            gap = reference.top_logprobs[i][0] - reference.top_logprobs[i][1]
            self.positions += 1
            self.agreed += theirs[0] == ours[0]
            self.clear += theirs[0] != ours[0] and gap >= MIN_GAP
            self.outside += theirs[0] not in ours or ours[0] not in theirs

    def passes(self, dtype: str) -> bool:
        """Whether the dtype's rules hold."""
        close = self.positions > 0 and self.difference <= MAX_DIFFERENCE[dtype]
        if dtype == "float32":
            return close and self.given <= MAX_DIFFERENCE[dtype] and self.clear == 0
        return close and self.outside == 0 and self.agreed >= MIN_AGREEMENT * self.positions


def report(cases: list[Case], work: Path) -> int:
    """Prints the table; the exit status."""
    print(
        f"{'model':12} {'dtype':9} {'mode':8} {'positions':>9} {'agreed':>8} {'clearly not':>11} "
        f"{'not in top 5':>12} {'max |dlogprob|':>14} {'of any token':>12}"
    )
    failed = False
    stages = (read(work, stage) for stage in STAGES)
    for case, theirs, ours, referee in zip(cases, *stages, strict=True):
        generated, looped = ([answer["scores"] for answer in ours[mode]] for mode in ("generated", "looped"))
        for mode, pairs in {
            "prefill": zip([result["scores"] for result in theirs], ours["scores"], strict=True),
            "decode": zip(referee["generated"], generated, strict=True),
            "loop": zip(referee["looped"], looped, strict=True),
        }.items():
            result = Comparison()
            for reference, engine in pairs:
                result.add(Scores(**reference), Scores(**engine))
            passes = result.passes(case.dtype)
            failed |= not passes
            print(
                f"{case.name:12} {case.dtype:9} {mode:8} {result.positions:9} "
                f"{result.agreed / max(result.positions, 1):8.2%} {result.clear:11} {result.outside:12} "
                f"{result.difference:14.1e} {result.given:12.1e} {'' if passes else ' FAILED'}"
            )
    return int(failed)


STAGES = {"reference": reference_stage, "engine": engine_stage, "referee": referee_stage}

if __name__ == "__main__":
    sys.exit(main())
