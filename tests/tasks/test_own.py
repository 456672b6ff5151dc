"""A task in one file plus one recipe: what CONTRIBUTING.md shows works as it stands, and what is no task is one clear error."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from megatron_vp2o.config.compose import compose
from megatron_vp2o.config.schema import OwnTaskConfig
from megatron_vp2o.config.validate import validate
from megatron_vp2o.errors import ConfigError
from megatron_vp2o.rl.types import Split
from megatron_vp2o.tasks import make_task
from tests.resume_job import Run, run_in_one_process

ROOT = Path(__file__).parents[2]
FEW: dict[str, Any] = {"train_size": 30, "validation_size": 5, "test_size": 5}


def example(folder: Path) -> Path:
    """The two files of CONTRIBUTING.md, written into a folder."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for name, language in (("my_task.py", "python"), ("my_task.yaml", "yaml")):
        found = re.search(rf"```{language}\n# {re.escape(name)}\n(.*?)```", text, re.DOTALL)
        assert found is not None, name
        (folder / name).write_text(found[1])
    return folder / "my_task.py"


def test_the_example_is_a_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    example(tmp_path)
    monkeypatch.chdir(tmp_path)
    config = compose("my_task", config_dir=tmp_path)
    validate(config)
    task = make_task(config.task)
    problem = task.problem(Split.train, 0)
    right = task.demonstration(problem, 0)
    assert problem.prompt == f"{right[::-1]}>" and len(right) == 4
    assert [verdict.correct for verdict in task.verify_all([problem] * 2, [right, right + "a"])] == [True, False]
    assert task.size(Split.train) == config.task.train_size


@pytest.mark.slow
def test_the_example_trains_and_reinforces(tmp_path: Path) -> None:
    path = example(tmp_path)
    small = ["model=micro", f"task.path={path}:Backwards", *(f"task.{key}={value}" for key, value in FEW.items())]
    small += [
        "evaluation.problems=5",
        "evaluation.samples=2",
        "evaluation.pass_at=[1]",
        "logging.tensorboard=false",
        "threads=1",
    ]
    arguments = [f"--config-dir={tmp_path}", "--config-name=my_task", *small]
    warm, then = str(tmp_path / "warm"), str(tmp_path / "then")
    runs = [
        Run(warm, [*arguments, "algorithm.steps=2", "algorithm.global_batch_size=8"]),
        Run(
            then,
            [*arguments, "algorithm=grpo", f"init_from={warm}", "algorithm.steps=1", "algorithm.prompts_per_step=4"],
        ),
    ]
    statuses = run_in_one_process(tmp_path / "job", runs)
    said = [(tmp_path / "job" / f"output-{number}.txt").read_text() for number in range(2)]
    assert [status for (status,) in statuses] == [0, 0], said


@pytest.mark.parametrize(
    ("path", "said"),
    [
        (None, "name your class"),
        ("my_task.py", "name your class"),
        ("nowhere.py:Task", "there is no file"),
        ("no.such.module:Task", "importing no.such.module raises ModuleNotFoundError"),
        ("{folder}/my_task.py:Forwards", "has no class Forwards; it has"),
        ("{folder}/my_task.py:count", "cannot be made as Class"),
        ("{folder}/my_task.py:PooledTask", "lacks _count, demonstration, verify"),
        ("{folder}/function.py:make", "is a function, not a class"),
        ("{folder}/function.py:Empty", "is no task: it lacks tokenizer, max_prompt_tokens, size"),
        ("{folder}/broken.py:Task", "importing it raises ZeroDivisionError"),
    ],
)
def test_what_is_no_task_is_refused(path: str | None, said: str, tmp_path: Path) -> None:
    example(tmp_path)
    (tmp_path / "function.py").write_text(
        "def make(config): ...\nclass Empty:\n    def __init__(self, config, *, progress): self.name = 'x'\n"
    )
    (tmp_path / "broken.py").write_text("1 / 0\n")
    named = None if path is None else path.format(folder=tmp_path)
    with pytest.raises(ConfigError, match=said):
        make_task(OwnTaskConfig(path=named, settings={"letters": 4}, **FEW))
