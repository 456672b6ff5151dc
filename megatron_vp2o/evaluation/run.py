"""Generate, grade, append: the loop of an evaluation. It takes up where an earlier one was interrupted."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from megatron_vp2o.errors import ConfigError
from megatron_vp2o.evaluation.benchmark import Question
from megatron_vp2o.evaluation.data import Questions
from megatron_vp2o.evaluation.grading import Grading
from megatron_vp2o.evaluation.model import Model, Response, Sampling
from megatron_vp2o.evaluation.results import EXPECTED, Key, Sample, SampleFile, path_of

SAMPLES_OF_A_PROBLEM = 2**20
FACTS = ("rating", "contest", "index", "subject")
"""Columns of a grader's row that metrics need."""


class Ranks(Protocol):
    """The processes that evaluate together; the first one grades and writes."""

    rank: int

    def first_says(self, value: Any) -> Any:
        """What the first one gives here, on all of them. Collective."""
        ...


class Alone:
    """One process."""

    rank = 0

    def first_says(self, value: Any) -> Any:
        return value


@dataclass(frozen=True)
class Settings:
    """How an evaluation is done."""

    lengths: tuple[int, ...]
    temperature: float = 0.6
    top_p: float = 0.95
    seed: int = 0
    samples: int | None = None
    """Samples of each problem; None: the benchmark's own number."""
    limit: int | None = None
    """Only so many problems of each benchmark, the first."""
    batch: int = 64
    """Answers that are generated together."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Further settings of generation that headers note."""

    def samples_of(self, questions: Questions) -> int:
        count = questions.benchmark.samples if self.samples is None else self.samples
        if not 1 <= count < SAMPLES_OF_A_PROBLEM:
            raise ConfigError(f"--samples {count}: it must be from 1 to {SAMPLES_OF_A_PROBLEM - 1}")
        return 1 if self.temperature == 0 else count  # greedy answers are all the same

    def chosen(self, questions: Questions) -> tuple[Question, ...]:
        return questions.questions[: self.limit]


@dataclass(frozen=True)
class Part:
    """One file of the results: a benchmark at a length."""

    questions: Questions
    length: int


def parts_of(all_questions: Sequence[Questions], lengths: Sequence[int]) -> list[Part]:
    """In the order in which they are evaluated."""
    return [Part(questions, length) for length in lengths for questions in all_questions]


def evaluate(
    models: Iterable[tuple[Model, Sequence[Part]]],
    total: int,
    settings: Settings,
    out: Path,
    grading: Grading,
    ranks: Ranks | None = None,
) -> int:
    """Evaluate each model on its parts. Returns how many samples were added. Collective over `ranks`.

    Args:
        models: each is made when its turn comes, and may be given up after it.
        total: samples of all of them together, for the progress bar.

    Raises:
        UserError: whatever makes going on impossible. What was written before is kept, and the next call goes on from it.
    """
    ranks = ranks or Alone()
    added = 0
    with tqdm(total=total, unit="sample", disable=ranks.rank != 0, dynamic_ncols=True) as bar:
        for model, parts in models:
            for part in parts:  # before anything is spent
                model.check([question.prompt for question in settings.chosen(part.questions)], part.length)
            for part in parts:
                bar.set_description(f"{model.label} {model.step} {part.questions.benchmark.name}@{part.length}")
                added += _part(model, part, settings, out, grading, ranks, bar)
    return added


def samples_of(parts: Sequence[Part], settings: Settings) -> int:
    """Number of samples of one model on these parts."""
    return sum(len(settings.chosen(part.questions)) * settings.samples_of(part.questions) for part in parts)


def _part(
    model: Model, part: Part, settings: Settings, out: Path, grading: Grading, ranks: Ranks, bar: tqdm[Any]
) -> int:
    benchmark = part.questions.benchmark
    samples = settings.samples_of(part.questions)
    jobs = [
        (number, question, sample)
        for number, question in enumerate(settings.chosen(part.questions))
        for sample in range(samples)
    ]
    path = path_of(out, model.label, model.step, benchmark.name, part.length)
    added = 0
    with ExitStack() as stack:
        file = None
        done: set[Key] = set()
        if ranks.rank == 0:
            file = stack.enter_context(SampleFile(path, header(model, part, settings)))
            _note_expected(path, len(jobs))
            grading.open(benchmark.grader)
            done = file.done
        done = ranks.first_says(set(done))
        bar.update(sum((question.id, sample) in done for _, question, sample in jobs))
        for chunk in _chunks(jobs, settings.batch):
            missing = [job for job in chunk if (job[1].id, job[2]) not in done]
            if not missing:
                continue
            asked = chunk if model.own_numbers else missing
            responses = model.generate(
                [question.prompt for _, question, _ in asked],
                [number * SAMPLES_OF_A_PROBLEM + sample for number, _, sample in asked],
                Sampling(settings.temperature, settings.top_p, part.length, settings.seed),
            )
            if file is not None:
                file.append(_graded(grading, part, asked, responses))
            added += len(missing)
            bar.update(len(missing))
    return added


Job = tuple[int, Question, int]


def _graded(grading: Grading, part: Part, jobs: Sequence[Job], responses: Sequence[Response]) -> Iterator[Sample]:
    questions = [question for _, question, _ in jobs]
    grades = grading.grade(part.questions.benchmark, questions, [response.solution for response in responses])
    for (_, question, sample), response, grade in zip(jobs, responses, grades, strict=True):
        yield Sample(
            problem=question.id,
            sample=sample,
            values=dict(grade.parts),
            reason=grade.reason,
            thinking_tokens=response.thinking_tokens,
            solution_tokens=response.solution_tokens,
            truncated=response.truncated,
            text=response.text,
            facts={key: question.row[key] for key in FACTS if question.row.get(key) not in (None, "")},
        )


def _chunks(jobs: Sequence[Job], size: int) -> Iterator[Sequence[Job]]:
    yield from (jobs[first : first + size] for first in range(0, len(jobs), size))


def header(model: Model, part: Part, settings: Settings) -> dict[str, Any]:
    """What all samples of a file have in common. How many problems and samples are evaluated is not part of it."""
    return {
        "label": model.label,
        "step": model.step,
        "model": model.identity,
        "benchmark": part.questions.benchmark.name,
        "rows": part.questions.digest,
        "revision": part.questions.revision,
        "own": part.questions.own,
        "problems": len(part.questions.questions),
        "length": part.length,
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "seed": settings.seed,
        "batch": settings.batch if model.own_numbers else None,
        **settings.extra,
    }


def _note_expected(path: Path, expected: int) -> None:
    """How many samples a file is to have: tables say so where they are not all there."""
    target = path.with_suffix(EXPECTED)
    if target.is_file() and target.read_text() == f"{expected}\n":
        return
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    temporary.write_text(f"{expected}\n", encoding="utf-8")
    temporary.replace(target)


def step_of(folder: Path) -> int:
    """The training step that a checkpoint's folder is of; 0 where its name does not say."""
    match = re.search(r"(?:step|checkpoint|iter)[-_]0*(\d+)$", folder.name)
    return int(match[1]) if match else 0
