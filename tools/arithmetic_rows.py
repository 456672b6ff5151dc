"""What `make run-rows` starts from: questions of arithmetic as rows, and a tiny Qwen3-MoE with a chat template, untrained.

    python -m tools.arithmetic_rows FOLDER

writes FOLDER/rows_tiny_data/questions.jsonl and more.parquet (the same kind of rows, other ones), and FOLDER/rows_tiny_hf, a
checkpoint as transformers saves it, with a tokenizer of characters.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from random import Random
from typing import Any

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
ALPHABET = "\n" + "".join(map(chr, range(ord(" "), ord("~") + 1)))
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
WIDTH = 104  # ids, so that tensor parallelism of 2, 4 or 8 divides them
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def questions() -> Iterator[dict[str, Any]]:
    """Sums and differences of small numbers and of fractions, each asked in several ways, in a fixed random order."""
    rows = []
    for a in range(1, 10):
        for b in range(1, 10):
            rows += _ask(f"{a}", f"{b}", Fraction(a + b), "plus", "+")
            rows += _ask(f"{a}", f"{b}", Fraction(a - b), "minus", "-")
            rows += _ask(WORDS[a], WORDS[b], Fraction(a + b), "plus", "and")[:1]
    for c in range(2, 8):
        for a in range(1, c):
            for b in range(1, c):
                rows += _ask(f"{a}/{c}", f"{b}/{c}", Fraction(a + b, c), "plus", "+")[:2]
                rows += _ask(_latex(Fraction(a, c), c), _latex(Fraction(b, c), c), Fraction(a + b, c), "plus", "+")[1:2]
    Random(0).shuffle(rows)
    yield from rows


def _ask(a: str, b: str, value: Fraction, word: str, sign: str) -> list[dict[str, Any]]:
    """One question in three wordings. Answers stand in words, in a box, or as fractions in LaTeX or plainly."""
    plain, latex = str(value), _latex(value, value.denominator)
    return [
        {"prompt": f"What is {a} {word} {b}?", "answer": plain, "completion": f"It is {plain}."},
        {"prompt": f"{a} {sign} {b} = ?", "answer": f"${latex}$", "completion": f"\\boxed{{{latex}}}"},
        {"prompt": f"Compute ${a} {sign} {b}$.", "answer": plain, "completion": f"${latex}$"},
    ]


def _latex(value: Fraction, below: int) -> str:
    return str(value) if below == 1 else f"\\frac{{{value.numerator * below // value.denominator}}}{{{below}}}"


def write_rows(folder: Path) -> None:
    """Three quarters of the questions as JSONL, the rest as parquet in verl's layout."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True, exist_ok=True)
    rows = list(questions())
    cut = 3 * len(rows) // 4
    with (folder / "questions.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows[:cut])
    verl = [
        {
            "data_source": "arithmetic",
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "reward_model": {"style": "rule", "ground_truth": row["answer"]},
            "completion": row["completion"],
        }
        for row in rows[cut:]
    ]
    pq.write_table(pa.Table.from_pylist(verl), folder / "more.parquet")


def write_checkpoint(folder: Path) -> None:
    """An untrained model of 1.8M parameters, its tokenizer and chat template."""
    import torch
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    from megatron_vp2o.config.schema import ModelConfig
    from megatron_vp2o.hf.settings import hf_config

    tokens = [*SPECIALS, *ALPHABET]
    tokens += [f"<|reserved{i}|>" for i in range(WIDTH - len(tokens))]
    pipeline = Tokenizer(models.WordLevel(vocab={token: i for i, token in enumerate(tokens)}))
    pipeline.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    pipeline.decoder = decoders.Fuse()
    pipeline.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=pipeline, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=TEMPLATE
    )
    tokenizer.save_pretrained(folder)
    model = ModelConfig(max_sequence_length=96)
    settings = hf_config(model, WIDTH, eos_id=[tokens.index("<|im_end|>"), 0], pad_id=0)
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings))
    network.generation_config.eos_token_id = settings["eos_token_id"]
    network.save_pretrained(folder)


def main() -> int:
    folder = Path(sys.argv[1])
    write_rows(folder / "rows_tiny_data")
    write_checkpoint(folder / "rows_tiny_hf")
    print(
        f"{sum(1 for _ in questions())} questions in {folder}/rows_tiny_data, an untrained model in {folder}/rows_tiny_hf"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
