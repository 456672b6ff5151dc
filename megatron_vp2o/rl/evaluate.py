"""Held-out evaluation: how often the model is right, in how many ways, and at what length.

Shape legend: P problems of this data-parallel rank, n samples of one problem.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_vp2o.config.schema import EvaluationConfig, TrainConfig
from megatron_vp2o.core.evaluation import answer_entropy, coverage, pass_at_k
from megatron_vp2o.parallel.groups import Groups, gather_objects, sum_scalars
from megatron_vp2o.rl.grading import Grading
from megatron_vp2o.rl.interfaces import RolloutEngine, Task
from megatron_vp2o.rl.types import Problem, Rollouts, SamplingParams, Split, Verdict

PROBLEMS_FILE = "problems_{split}.jsonl"
"""In the run folder after a run's last evaluation: one line a problem (`Tally`), for statistics over problems."""


@dataclass(frozen=True)
class Tally:
    """What the samples of one problem came to."""

    problem: int  # index in its split
    prompt: str
    n_solutions: int | None
    samples: int
    greedy: bool  # whether the greedy response is right
    answers: dict[str, int]  # canonical right answer -> how many samples gave it


def evaluate_splits(
    engine: RolloutEngine, task: Task, config: TrainConfig, groups: Groups, *, final: bool
) -> dict[str, float]:
    """Validation metrics (`eval/*`) of the learner's weights, and at the end of a run also the test split's (`test/*`).

    The last evaluation also writes what it found of each problem into the run folder (`PROBLEMS_FILE`).
    """
    splits = {"eval": Split.validation}
    if final and config.evaluation.final_split:
        splits["test"] = Split.test
    metrics: dict[str, float] = {}
    with engine.at_learner_weights():
        for prefix, split in splits.items():
            found, tallies = evaluate(
                engine,
                task,
                split,
                config.evaluation,
                groups,
                max_new_tokens=config.rollout.sampling.max_new_tokens,
                seed=config.seed + 1,
                prefix=prefix,
            )
            metrics |= found
            if final and groups.rank == 0:
                _write(Path(config.run_dir) / PROBLEMS_FILE.format(split=split.value), tallies)
    return metrics


def _write(path: Path, tallies: list[Tally]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text("".join(json.dumps(vars(tally)) + "\n" for tally in tallies), encoding="utf-8")
    temporary.replace(path)


def evaluate(
    engine: RolloutEngine,
    task: Task,
    split: Split,
    settings: EvaluationConfig,
    groups: Groups,
    *,
    max_new_tokens: int,
    seed: int,
    prefix: str,
) -> tuple[dict[str, float], list[Tally]]:
    """Greedy accuracy, unbiased pass@k, distinct right answers, coverage, answer entropy and lengths. Collective.

    Uses the weights that the engine holds. The same `seed` gives the same samples for the same weights.

    Returns:
        Means over all problems, and what was found of each, in their order.
    """
    count = task.size(split) if split is Split.test else min(settings.problems, task.size(split))
    problems = [task.problem(split, i) for i in range(groups.dp_rank, count, groups.dp_size)]
    prompts = [problem.prompt_tokens(task.tokenizer) for problem in problems]
    uids = [problem.uid for problem in problems]
    with Grading(task, problems, 1, groups) as once, Grading(task, problems, settings.samples, groups) as often:
        with once.beside(engine):
            greedy = engine.generate(prompts, uids, SamplingParams(0.0, 1.0, max_new_tokens, seed))
        sampling = SamplingParams(settings.temperature, settings.top_p, max_new_tokens, seed)
        with often.beside(engine):
            sampled = engine.generate(prompts, uids, sampling, settings.samples)
        verdicts = (once.verdicts(greedy), often.verdicts(sampled))
    sums, own = _tally(problems, sampled, verdicts, settings)
    sums = sum_scalars(sums, groups.dp)
    tallies = sorted((t for part in gather_objects(own, groups.dp) for t in part), key=lambda tally: tally.problem)
    solved, right = sums.pop("solved"), sums.pop("right")
    if not sums.pop("countable"):  # nobody knows how many right answers there are
        del sums["coverage"]
    entropy, tokens_of_right = sums.pop("answer_entropy"), sums.pop("tokens_of_right")
    metrics = {f"{prefix}/{key}": value / count for key, value in sums.items()}
    if solved:  # what is said of right answers only is not measured where there are none
        metrics[f"{prefix}/answer_entropy"] = entropy / solved
        metrics[f"{prefix}/solution_length"] = tokens_of_right / right
    return metrics, tallies


def _tally(
    problems: Sequence[Problem],
    sampled: Rollouts,
    verdicts: tuple[list[list[Verdict]], list[list[Verdict]]],
    settings: EvaluationConfig,
) -> tuple[dict[str, float], list[Tally]]:
    """Sums over this rank's problems, and what was found of each; `verdicts` are those of the greedy and the sampled ones."""
    tallies: list[Tally] = []
    n = settings.samples
    keys = ["greedy_accuracy", *(f"pass@{k}" for k in settings.pass_at), "distinct", "coverage", "response_length"]
    sums = dict.fromkeys([*keys, "countable", "solved", "answer_entropy", "right", "tokens_of_right"], 0.0)
    greedy_verdicts, sampled_verdicts = verdicts
    for p, problem in enumerate(problems):
        sums["greedy_accuracy"] += greedy_verdicts[p][0].correct
        answers: Counter[Hashable] = Counter()
        for g, verdict in enumerate(sampled_verdicts[p]):
            length = len(sampled.response(p * n + g))
            sums["response_length"] += length / n
            if verdict.correct:
                answers[verdict.canonical] += 1
                sums["tokens_of_right"] += length
        right = answers.total()
        sums["right"] += right
        for k in settings.pass_at:
            sums[f"pass@{k}"] += pass_at_k(n, right, k)
        sums["distinct"] += len(answers)
        if problem.n_solutions is not None:
            sums["coverage"] += coverage(len(answers), problem.n_solutions)
            sums["countable"] += 1
        entropy = answer_entropy(answers)
        if entropy is not None:
            sums["solved"] += 1
            sums["answer_entropy"] += entropy
        tallies.append(
            Tally(
                problem.uid,
                problem.prompt,
                problem.n_solutions,
                n,
                greedy_verdicts[p][0].correct,
                {str(canonical): many for canonical, many in answers.items()},
            )
        )
    return sums, tallies
