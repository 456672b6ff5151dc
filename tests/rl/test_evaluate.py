"""Held-out metrics of a scripted engine against what counting by hand gives."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from megatron_vp2o.config.schema import EvaluationConfig, RolloutConfig, SamplingConfig, TrainConfig
from megatron_vp2o.parallel.groups import Groups
from megatron_vp2o.rl.evaluate import PROBLEMS_FILE, evaluate, evaluate_splits
from megatron_vp2o.rl.types import Rollouts, Split
from tests.rl.fakes import TOKENIZER, FakeEngine, FakeTask, groups_of

PROBLEMS, SAMPLES = 5, 4


@pytest.fixture
def groups() -> Iterator[Groups]:
    with groups_of() as made:
        yield made


def first_characters(rollouts: Rollouts) -> list[str]:
    return [TOKENIZER.decode(rollouts.response(n)[:1]) for n in range(len(rollouts.total_len_N))]


def settings(**changed: Any) -> EvaluationConfig:
    values = {"problems": PROBLEMS, "samples": SAMPLES, "pass_at": [1, 2, 4], "temperature": 0.7, "top_p": 0.9}
    return EvaluationConfig(**{**values, **changed})


def tokens_that_repeat(engine: FakeEngine) -> None:
    """Make the responses of a group alike by threes, so that answers repeat."""
    generate = engine.generate

    def repeated(*args: Any) -> Rollouts:
        rollouts = generate(*args)
        rollouts.tokens_NS = 3 + rollouts.tokens_NS % 3 * (rollouts.tokens_NS > 0)
        return rollouts

    engine.generate = repeated  # type: ignore[assignment, method-assign]


@pytest.mark.parametrize("repeating", [False, True])
@pytest.mark.parametrize("right", ["", " ", "!#", "".join(chr(32 + n) for n in range(0, 40, 3))])
def test_metrics_are_what_counting_gives(groups: Groups, right: str, repeating: bool) -> None:
    engine, task = FakeEngine([]), FakeTask({Split.validation: 9}, right=right)
    if repeating:
        tokens_that_repeat(engine)
    arguments: Any = (engine, task, Split.validation, settings(), groups)
    metrics, tallies = evaluate(*arguments, max_new_tokens=8, seed=3, prefix="eval")
    assert len(engine.drawn) == 2, "one greedy response a problem, then samples"
    greedy, sampled = engine.drawn
    (prompts, uids, cold, one), (_, _, warm, many) = engine.asked
    assert prompts == [TOKENIZER.encode(f"{i}.0=") for i in range(PROBLEMS)] and uids == list(range(PROBLEMS))
    assert (cold.temperature, one, warm.temperature, warm.top_p, many) == (0.0, 1, 0.7, 0.9, SAMPLES)
    assert {sampling.seed for sampling in (cold, warm)} == {3}

    said = first_characters(sampled)
    groups_said = [said[p * SAMPLES : (p + 1) * SAMPLES] for p in range(PROBLEMS)]
    greedy_right = [c in right and c != "" for c in first_characters(greedy)]
    assert metrics["eval/greedy_accuracy"] == pytest.approx(sum(greedy_right) / PROBLEMS)
    for k in (1, 2, 4):
        hits = [any(c in right for c in subset) for group in groups_said for subset in combinations(group, k)]
        assert metrics[f"eval/pass@{k}"] == pytest.approx(sum(hits) / len(hits)), k
    found = [Counter(c for c in group if c in right) for group in groups_said]
    assert metrics["eval/distinct"] == pytest.approx(sum(map(len, found)) / PROBLEMS)
    assert metrics["eval/coverage"] == pytest.approx(sum(map(len, found)) / 40 / PROBLEMS)
    length = [len(sampled.response(n)) for n in range(PROBLEMS * SAMPLES)]
    assert metrics["eval/response_length"] == pytest.approx(sum(length) / len(length))
    solved = [counts for counts in found if counts]
    assert ("eval/answer_entropy" in metrics) == ("eval/solution_length" in metrics) == bool(solved)
    if solved:
        shares = [[many / counts.total() for many in counts.values()] for counts in solved]
        entropies = [-sum(share * math.log(share) for share in of_one) for of_one in shares]
        assert metrics["eval/answer_entropy"] == pytest.approx(sum(entropies) / len(solved), abs=1e-12)
        long = [length[n] for n in range(len(said)) if said[n] in right]
        assert metrics["eval/solution_length"] == pytest.approx(sum(long) / len(long))
    for p, tally in enumerate(tallies):
        assert (tally.problem, tally.prompt, tally.samples, tally.greedy) == (p, f"{p}.0=", SAMPLES, greedy_right[p])
        assert tally.answers == dict(found[p])


def test_where_answers_cannot_be_counted_there_is_no_coverage(groups: Groups) -> None:
    task: Any = FakeTask({Split.validation: 9}, countable=False)
    engine: Any = FakeEngine([])
    metrics, tallies = evaluate(
        engine, task, Split.validation, settings(), groups, max_new_tokens=8, seed=3, prefix="eval"
    )
    assert "eval/coverage" not in metrics and metrics["eval/distinct"] > 0
    assert {tally.n_solutions for tally in tallies} == {None}


@pytest.mark.parametrize(("size", "wanted", "expected"), [(9, 5, 5), (3, 5, 3)])
def test_problems_are_the_splits_first_ones_and_all_of_the_test_split(
    groups: Groups, size: int, wanted: int, expected: int
) -> None:
    task: Any = FakeTask({Split.validation: size, Split.test: size})
    for split in (Split.validation, Split.test):
        engine: Any = FakeEngine([])
        _, tallies = evaluate(
            engine, task, split, settings(problems=wanted), groups, max_new_tokens=8, seed=0, prefix="x"
        )
        assert [tally.problem for tally in tallies] == list(range(size if split is Split.test else expected))


def test_ranks_share_the_problems() -> None:
    asked = []
    for rank in range(3):
        with groups_of(rank, 3) as groups:
            engine: Any = FakeEngine([])
            task: Any = FakeTask({Split.validation: 9})
            evaluate(engine, task, Split.validation, settings(problems=8), groups, max_new_tokens=8, seed=0, prefix="x")
            asked.append(engine.asked[0][1])
    assert asked == [[0, 3, 6], [1, 4, 7], [2, 5]]


@pytest.mark.parametrize("final", [False, True])
@pytest.mark.parametrize("final_split", [False, True])
def test_the_last_evaluation_also_takes_the_test_split_and_writes_what_it_found(
    groups: Groups, tmp_path: Path, final: bool, final_split: bool
) -> None:
    task: Any = FakeTask({Split.validation: 9, Split.test: 6})
    engine: Any = FakeEngine([])
    config = TrainConfig(
        evaluation=settings(final_split=final_split),
        rollout=RolloutConfig(sampling=SamplingConfig(max_new_tokens=11)),
        run_dir=str(tmp_path / "run"),
        seed=4,
    )
    metrics = evaluate_splits(engine, task, config, groups, final=final)
    both = final and final_split
    assert engine.log == [
        "engine takes the learner's weights",
        *["engine generate"] * (4 if both else 2),
        "engine has its own again",
    ]
    assert {sampling.max_new_tokens for _, _, sampling, _ in engine.asked} == {11}
    assert 4 not in {sampling.seed for _, _, sampling, _ in engine.asked}, "other samples than training's"
    assert any(key.startswith("eval/") for key in metrics)
    assert any(key.startswith("test/") for key in metrics) == both
    written = {split: tmp_path / "run" / PROBLEMS_FILE.format(split=split.value) for split in Split}
    expected = {Split.validation: final, Split.test: both, Split.train: False}
    assert {split: path.exists() for split, path in written.items()} == expected
    if final:
        lines = [json.loads(line) for line in written[Split.validation].read_text().splitlines()]
        assert [line["problem"] for line in lines] == list(range(PROBLEMS))
        right = sum(sum(line["answers"].values()) for line in lines)
        assert metrics["eval/pass@1"] == pytest.approx(right / (PROBLEMS * SAMPLES))
        assert sorted(path.name for path in (tmp_path / "run").iterdir()) == sorted(
            path.name for split, path in written.items() if expected[split]
        )
