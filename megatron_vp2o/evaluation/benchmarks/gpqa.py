"""GPQA Diamond: 198 questions of biology, chemistry and physics with four choices each.

Choices are shuffled by the evaluation's seed and the question's name: the same order for every model and sample.
"""

from __future__ import annotations

from random import Random

from megatron_vp2o.evaluation.benchmark import Benchmark, Metric, Question, Remote, Row, column, identity
from megatron_vp2o.rewards.grade import RowError
from megatron_vp2o.rewards.graders.choice import ALPHABET

PROMPT = """Answer the following multiple choice question. Think step by step. The last line of your response has the form \
'Answer: LETTER' (without quotes), where LETTER is one of {letters}.

{question}

{choices}"""


def lettered(choices: list[str]) -> str:
    """One line a choice."""
    return "\n".join(f"{letter}) {choice}" for letter, choice in zip(ALPHABET, choices, strict=False))


def ask(row: Row, number: int, seed: int) -> Question:
    """Columns: `question`, `correct`, `incorrect` (three), `subject`, `id`; or those of the published CSV file."""
    incorrect = row.get("incorrect") or [row.get(f"Incorrect Answer {i}") for i in (1, 2, 3)]
    if not isinstance(incorrect, list) or len(incorrect) != 3 or None in incorrect:
        raise RowError("it has not three incorrect answers (`incorrect`, or Incorrect Answer 1 to 3)")
    correct = str(column(row, "correct", "Correct Answer")).strip()
    choices = [correct, *(str(text).strip() for text in incorrect)]
    if len(set(choices)) < len(choices):
        raise RowError(f"two of its choices are the same text: {choices}")
    name = identity(row, number, "id", "Record ID")
    Random(f"{seed}:{name}").shuffle(choices)
    letters = ALPHABET[: len(choices)]
    question = str(column(row, "question", "Question")).strip()
    prompt = PROMPT.format(letters=letters, question=question, choices=lettered(choices))
    subject = str(row.get("subject") or row.get("High-level domain") or "")
    answer = letters[choices.index(correct)]
    return Question(name, prompt, {"answer": answer, "letters": letters, "last_letter": False, "subject": subject})


GPQA_DIAMOND = Benchmark(
    "gpqa",
    "GPQA Diamond",
    "Science",
    "choice",
    ask,
    (Metric("accuracy", "accuracy", table=True),),
    licence="CC-BY-4.0; its authors ask that questions not be shown in plain text on the internet",
    remote=Remote(
        url="https://openaipublic.blob.core.windows.net/simple-evals/gpqa_diamond.csv",
        sha256="41d1213cd7a4998605a26c2798500652572007161b3a92817ba46b35befcd305",
    ),
    samples=4,
    breakdown="subject",
    notes="zero-shot; prompt in the manner of OpenAI's simple-evals",
)
