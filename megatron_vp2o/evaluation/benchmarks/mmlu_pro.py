"""MMLU-Pro: 12,032 questions of fourteen subjects with up to ten choices.

The prompt is zero-shot. The benchmark's own script shows five worked examples first, so accuracies of base models are
not comparable with its leaderboard.
"""

from __future__ import annotations

from megatron_vp2o.evaluation.benchmark import Benchmark, Metric, Question, Remote, Row, column, identity
from megatron_vp2o.evaluation.benchmarks.gpqa import lettered
from megatron_vp2o.rewards.grade import RowError
from megatron_vp2o.rewards.graders.choice import ALPHABET

PROMPT = """The following is a multiple choice question about {subject}. Think step by step, and finish with \
"The answer is (X)", where X is the letter of the right choice.

{question}

{choices}"""


def ask(row: Row, number: int, seed: int) -> Question:
    """Columns: `question`, `options` (two to ten), `answer` (a letter) or `answer_index`, `category`, `id`."""
    options = column(row, "options")
    if not isinstance(options, list) or not 2 <= len(options) <= 10:
        raise RowError(f"its options are {options!r:.60}, not a list of two to ten texts")
    letters = ALPHABET[: len(options)]
    index = row.get("answer_index")
    answer = letters[index] if isinstance(index, int) and 0 <= index < len(letters) else str(column(row, "answer"))
    if len(answer) != 1 or answer not in letters:
        raise RowError(f"its answer is {answer!r:.40}, not one of {letters}")
    subject = str(column(row, "category"))
    prompt = PROMPT.format(
        subject=subject, question=str(column(row, "question")).strip(), choices=lettered([str(o) for o in options])
    )
    name = identity(row, number, "id", "question_id")
    return Question(name, prompt, {"answer": answer, "letters": letters, "last_letter": True, "subject": subject})


MMLU_PRO = Benchmark(
    "mmlu_pro",
    "MMLU-Pro",
    "Knowledge",
    "choice",
    ask,
    (Metric("accuracy", "accuracy", table=True),),
    licence="MIT",
    remote=Remote(hub="TIGER-Lab/MMLU-Pro", split="test", revision="527feea0afed1de15a8c115abf7be4c912123315"),
    breakdown="subject",
    notes="zero-shot; the benchmark's own script is five-shot. The paper's text cites MMLU-Pro as MMLU",
)
