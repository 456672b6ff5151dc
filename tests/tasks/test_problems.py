"""Splits that don't overlap, determinism, sizes, and the registry."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import pickle
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest
import yaml

from megatron_vp2o.config.register import GROUPS, resource_dir
from megatron_vp2o.config.schema import CountdownTaskConfig, ShortestPathTaskConfig, TaskConfig
from megatron_vp2o.errors import ConfigError
from megatron_vp2o.rl.interfaces import Task
from megatron_vp2o.rl.types import Split
from megatron_vp2o.tasks import make_task, problems

CONFIGS = [
    CountdownTaskConfig(train_size=400, validation_size=60, test_size=80),
    CountdownTaskConfig(numbers=4, train_size=400, validation_size=60, test_size=80),
    ShortestPathTaskConfig(blocked_probability=0.3, train_size=400, validation_size=60, test_size=80),
]


def contents(task: Task, split: Split) -> list[str]:
    """The canonical texts of a split: for countdown sorted numbers and target, for paths the grid."""
    return [repr(problem.data) for problem in (task.problem(split, i) for i in range(task.size(split)))]


@pytest.fixture(scope="module", params=CONFIGS, ids=["countdown3", "countdown4", "shortest_path"])
def made(request: pytest.FixtureRequest) -> tuple[TaskConfig, Task]:
    return request.param, make_task(request.param)


def test_splits_do_not_overlap(made: tuple[TaskConfig, Task]) -> None:
    config, task = made
    assert [task.size(split) for split in Split] == [400, 60, 80]
    for one, other in combinations(Split, 2):
        assert not set(contents(task, one)) & set(contents(task, other))
    for split in Split:
        assert len(set(contents(task, split))) == task.size(split)
    # nor with another seed and other sizes: a model warmed up there may be evaluated here
    other_task = make_task(dataclasses.replace(config, seed=3, train_size=600))
    for one, other in combinations(Split, 2):
        assert not set(contents(task, one)) & set(contents(other_task, other))
        assert not set(contents(other_task, one)) & set(contents(task, other))


def test_same_seed_same_problems(made: tuple[TaskConfig, Task]) -> None:
    config, one = made
    other = make_task(config)
    for split in Split:
        indices = range(0, one.size(split), 7)
        backwards = {i: other.problem(split, i) for i in reversed(indices)}
        assert [one.problem(split, i) for i in indices] == [backwards[i] for i in indices]
        assert [one.problem(split, i).uid for i in indices] == list(indices)
    different = make_task(dataclasses.replace(config, seed=1))
    assert contents(one, Split.train) != contents(different, Split.train)
    # neighbouring seeds must not give the same stream shifted by one
    assert contents(one, Split.train)[:10] != contents(different, Split.train)[:10]


def test_problems_are_the_same_on_every_machine(made: tuple[TaskConfig, Task]) -> None:
    """Pinned: a change here means that older checkpoints may have been trained on what is now held out."""
    config, task = made
    prompts = [task.problem(split, i).prompt for split in Split for i in range(task.size(split))]
    digest = hashlib.sha256("\n".join(prompts).encode()).hexdigest()[:16]
    assert digest == ["d7ca3d359de712b5", "a482cc8fb11d85ce", "5b6539a44fd3e68d"][CONFIGS.index(config)]


def test_splits_have_problems_of_one_kind() -> None:
    """Held-out problems are as hard as those trained on: the mean number of right answers agrees."""
    task = make_task(CountdownTaskConfig(train_size=1000, validation_size=100, test_size=200))
    means = {
        split: sum(task.problem(split, i).n_solutions or 0 for i in range(task.size(split))) / task.size(split)
        for split in Split
    }
    assert means[Split.test] == pytest.approx(means[Split.train], abs=0.3)
    assert means[Split.validation] == pytest.approx(means[Split.train], abs=0.4)


def test_split_of_depends_on_the_text_alone() -> None:
    assert problems.split_of("countdown 4 6 8=24") is problems.split_of("countdown 4 6 8=24")
    shares = Counter(problems.split_of(f"some problem {i}") for i in range(20000))
    assert shares[Split.test] / 20000 == pytest.approx(problems.TEST_SHARE, abs=0.01)
    assert shares[Split.validation] / 20000 == pytest.approx(problems.VALIDATION_SHARE, abs=0.01)


def test_longest_prompt(made: tuple[TaskConfig, Task]) -> None:
    _, task = made
    lengths = [
        len(task.tokenizer.encode(task.problem(split, i).prompt)) for split in Split for i in range(task.size(split))
    ]
    assert task.max_prompt_tokens == max(lengths)


def test_a_small_space_is_used_up_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        task = make_task(CountdownTaskConfig(numbers=2, train_size=2000, validation_size=5, test_size=10))
    assert 80 < task.size(Split.train) < 123  # 123 problems in all
    assert [record.message for record in caplog.records] == [
        f"countdown has {task.size(Split.train)} distinct training problems with these settings, fewer than "
        "task.train_size=2000: all are used"
    ]


def test_too_few_held_out_problems() -> None:
    with pytest.raises(
        ConfigError, match=r"task\.test_size=50, .* only (\d+) distinct test problems: choose at most \1,"
    ):
        make_task(CountdownTaskConfig(numbers=2, train_size=10, validation_size=5, test_size=50))


def test_no_problem_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(problems, "PATIENCE", 20)
    with pytest.raises(ConfigError, match="gave no problem in 20 draws"):
        make_task(CountdownTaskConfig(numbers=2, max_number=3, min_target=500, max_target=600))


def test_unknown_name() -> None:
    with pytest.raises(ConfigError, match=r"task\.name=sudoku is unknown: there are countdown, shortest_path"):
        make_task(TaskConfig(name="sudoku"))


def test_index_out_of_range() -> None:
    task = make_task(CONFIGS[0])
    for index in (-1, 400):
        with pytest.raises(IndexError, match="countdown has 400 train problems"):
            task.problem(Split.train, index)


def test_quiet_without_progress(capfd: pytest.CaptureFixture[str]) -> None:
    make_task(CONFIGS[1])
    assert capfd.readouterr() == ("", "")


def test_tasks_can_be_pickled() -> None:
    task = make_task(CONFIGS[2])
    copy = pickle.loads(pickle.dumps(task))
    assert copy.problem(Split.test, 3) == task.problem(Split.test, 3)


@pytest.mark.parametrize("path", sorted(resource_dir("conf").glob("task/*.yaml")), ids=lambda path: path.stem)
def test_shipped_configurations(path: Path) -> None:
    settings = yaml.safe_load(path.read_text())
    choices = settings.pop("defaults")
    (base,) = (cls for name, cls in GROUPS["task"].items() if name in choices)
    defaults = vars(base())
    assert settings
    assert all(key in defaults and value != defaults[key] for key, value in settings.items()), (
        "only differences belong here"
    )
    config = base(**settings)
    task = make_task(config)
    assert [task.size(split) for split in Split] == [config.train_size, config.validation_size, config.test_size]
