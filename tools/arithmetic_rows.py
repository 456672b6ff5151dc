"""What `make run-rows` starts from: questions of arithmetic as rows, and a tiny Qwen3-MoE with a chat template, untrained.

    python -m tools.arithmetic_rows FOLDER

writes FOLDER/rows_tiny_data/questions.jsonl and more.parquet (the same kind of rows, other ones), and FOLDER/rows_tiny_hf, a
checkpoint as transformers saves it, with a byte-level tokenizer that was trained on the rows.

Most completions to learn from are unsure: they name a second answer behind the right one, and math-verify goes by the last. So a
model that is warmed up on them knows more than it earns, and reinforcement has something to find.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from fractions import Fraction
from hashlib import blake2b
from pathlib import Path
from random import Random
from typing import Any

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
ROLES = ("system", "user", "assistant")
PIECES = r" ?[A-Za-z]+|\\[a-z]+|\d+|[\s\S]"  # words with the space before them, LaTeX's commands, numbers
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
IDS = 384  # that the model knows; the tokenizer has fewer
UNSURE = 3 / 5
"""Share of the completions that name a second answer."""
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


SUMS = ("What is {a} plus {b}?", "Add {b} to {a}.", "How much is {a} and {b}?", "{a} + {b} = ?", "Compute ${a} + {b}$.")
DIFFERENCES = (
    "What is {a} minus {b}?",
    "Take {b} from {a}.",
    "How much is {a} less {b}?",
    "{a} - {b} = ?",
    "Compute ${a} - {b}$.",
)


def questions() -> Iterator[dict[str, Any]]:
    """Sums and differences of small numbers and of fractions, each asked in several ways, in a fixed random order."""
    rows: list[dict[str, Any]] = []
    for a in range(1, 10):
        for b in range(1, 10):
            rows += _ask(SUMS, a, b, a + b, 1)
            rows += _ask(DIFFERENCES, a, b, a - b, 1)
    for c in range(2, 6):
        for a in range(1, c):
            for b in range(1, c):
                rows += _ask(SUMS, a, b, a + b, c)
    Random(0).shuffle(rows)
    yield from rows


def _ask(wordings: Sequence[str], a: int, b: int, value: int, below: int) -> Iterator[dict[str, Any]]:
    """One question in all wordings, where they are words also with its numbers in words. All numbers are over `below`."""
    for wording in wordings:
        latex = "$" in wording
        yield _row(wording.format(a=_number(a, below, latex), b=_number(b, below, latex)), value, below)
        if below == 1 and wording[0].isalpha() and not latex:
            yield _row(wording.format(a=WORDS[a], b=WORDS[b]), value, below)


def _row(prompt: str, value: int, below: int) -> dict[str, Any]:
    """A right answer in a sentence, in a box or in a formula; in UNSURE of the rows with another one behind it."""
    form = "${}$" if "$" in prompt else "\\boxed{{{}}}" if "=" in prompt else "{}"
    said = form.format(_number(value, below, form != "{}"))
    if blake2b(prompt.encode()).digest()[0] < UNSURE * 256:
        said += " or " + form.format(_number(value + 1, below, form != "{}"))
    answer = f"${_number(value, below, True)}$" if "=" in prompt else str(Fraction(value, below))
    return {"prompt": prompt, "answer": answer, "completion": f"It is {said}." if form == "{}" else said}


def _number(value: int, below: int, latex: bool) -> str:
    return str(value) if below == 1 else f"\\frac{{{value}}}{{{below}}}" if latex else f"{value}/{below}"


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
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    from megatron_vp2o.config.schema import ModelConfig
    from megatron_vp2o.hf.settings import hf_config

    pipeline = Tokenizer(models.BPE())
    pieces = pre_tokenizers.Split(Regex(PIECES), "isolated")
    pipeline.pre_tokenizer = pre_tokenizers.Sequence([pieces, pre_tokenizers.ByteLevel(False, use_regex=False)])
    pipeline.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=IDS,
        special_tokens=[*SPECIALS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [row["prompt"] + "\n" + row["completion"] for row in questions()]
    pipeline.train_from_iterator([*texts, *(f"{role}\n" for role in ROLES for _ in texts)], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=pipeline, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=TEMPLATE
    )
    tokenizer.save_pretrained(folder)
    model = ModelConfig(max_sequence_length=96, num_moe_experts=8, moe_router_topk=2, moe_ffn_hidden_size=128)
    settings = hf_config(model, IDS, eos_id=[SPECIALS.index("<|im_end|>"), 0], pad_id=0)
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
