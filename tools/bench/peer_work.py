"""The work that both sides of `peers` do: plain numbers, importable by either environment (standard library only)."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import random
import statistics
from pathlib import Path

ALPHABET = "0123456789+-*/()=: "  # every prompt is written in these; the model's vocabulary is larger


@dataclasses.dataclass(frozen=True)
class Work:
    """One GRPO step: `prompts` x `group_size` responses of exactly `new_tokens` tokens, then one optimizer step."""

    hidden_size: int = 128
    num_layers: int = 4
    num_experts: int = 16
    top_k: int = 4
    expert_width: int = 64
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    vocab_size: int = 64
    prompts: int = 32
    group_size: int = 8
    new_tokens: int = 16
    prompt_tokens: int | None = None  # pad prompts to so many characters; None: as they are
    lr: float = 1e-4
    seed: int = 1

    @property
    def longest(self) -> int:
        """Tokens of prompt and response together, at most."""
        return max(14, self.prompt_tokens or 0) + self.new_tokens

    def prompt_texts(self, count: int) -> list[str]:
        """`count` countdown-like prompts of 9 to 14 characters (mean about 12), the same on both sides; longer where
        `prompt_tokens` says so, by what nobody could guess."""
        rng = random.Random(self.seed)
        texts = []
        for _ in range(count):
            numbers = " ".join(str(rng.randint(1, 99)) for _ in range(3))
            text = f"{numbers}={rng.randint(10, 99)}:"
            missing = (self.prompt_tokens or 0) - len(text)
            texts.append("".join(rng.choice(ALPHABET) for _ in range(missing)) + text)
        return texts


def work_of(arguments: argparse.Namespace) -> Work:
    """What either side does, as its command line says."""
    return Work(prompts=arguments.prompts, new_tokens=arguments.new_tokens, prompt_tokens=arguments.prompt_tokens)


def reward(response_ids: list[int]) -> float:
    """1 if more than half of the tokens are even, else 0: cheap, and it differs within nearly every group."""
    return float(2 * sum(1 for token in response_ids if token % 2 == 0) > len(response_ids))


def parser(doc: str) -> argparse.ArgumentParser:
    """The command line of either side."""
    out = argparse.ArgumentParser(description=doc)
    out.add_argument("--steps", type=int, default=12, help="timed steps")
    out.add_argument("--warmup", type=int, default=3, help="steps before them, not counted")
    out.add_argument("--threads", type=int, default=2, help="CPU threads")
    out.add_argument("--prompt-tokens", type=int, help="length of every prompt; as they are (about 12) if not given")
    out.add_argument("--new-tokens", type=int, default=Work.new_tokens, help="length of every response")
    out.add_argument("--prompts", type=int, default=Work.prompts, help="of a step")
    out.add_argument("--out", type=Path, required=True, help="JSON file to write")
    return out


def write_result(out: Path, *, name: str, version: str, marks: list[float], warmup: int, parameters: int) -> None:
    """Write one process's times. `marks`: when each step ended, in seconds, after the start of the first."""
    step_s = [end - start for start, end in itertools.pairwise(marks)]
    record = {
        "name": name,
        "version": version,
        "parameters": parameters,
        "step_s": step_s[warmup:],
        "warmup_s": step_s[:warmup],
        "median_s": statistics.median(step_s[warmup:]),
    }
    out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
