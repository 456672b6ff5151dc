"""Folders of a run: what they hold already, paths that cannot be, and what is reported first."""

from pathlib import Path

import pytest

from megatron_vp2o.config.schema import (
    Resume,
)
from megatron_vp2o.config.store import save_config
from megatron_vp2o.config.validate import validate
from tests.config.configured import configured, problems
from tests.config.configured import empty_folder as empty_folder


def other_run(**settings) -> None:
    config = configured({"model.hidden_size": 64, **settings})
    save_config(config, "runs/run")


def test_a_folder_that_holds_a_run():
    run_dir = Path("runs/run")
    other_run()
    validate(configured({}))  # it never wrote a line: nothing is lost
    validate(configured({"resume": Resume.never}))
    (run_dir / "metrics.jsonl").write_text("{}\n")
    assert "runs/run already holds a run" in problems(configured({"resume": Resume.never}))[0]
    (found,) = problems(configured({}))
    assert "runs/run holds another run (model.hidden_size is 64 there and 128 here)" in found
    validate(configured({"model.hidden_size": 64, "algorithm.steps": 200}))  # the same run, longer
    assert "resume=must" in problems(configured({"resume": Resume.must, "model.hidden_size": 64}))[0]
    (run_dir / "checkpoints" / ".tmp").mkdir(parents=True)
    assert "resume=must" in problems(configured({"resume": Resume.must, "model.hidden_size": 64}))[0]
    (run_dir / "checkpoints" / "step_1").mkdir()
    validate(configured({"resume": Resume.must, "model.hidden_size": 64}))


def test_a_run_of_another_algorithm_or_task_is_named():
    other_run(**{"task.numbers": 4})
    Path("runs/run/metrics.jsonl").write_text("{}\n")
    (found,) = problems(configured({"model.hidden_size": 64}, supervised=True))
    assert "algorithm.name is grpo there and supervised here; task.numbers is 4 there and 3 here" in found


def test_run_dir_that_is_a_file():
    Path("runs").mkdir()
    Path("runs/run").touch()
    assert problems(configured({})) == ["run_dir=runs/run is a file: choose another run_dir or name"]


def test_causes_are_reported_without_what_follows_from_them():
    """A missing folder has nothing to do with a misspelt number, nor has a combination of numbers out of range."""
    missing = {"init_from": "runs/none", "algorithm.group_size": 1}
    assert len(problems(configured(missing))) == 1
    assert problems(configured({**missing, "optimizer.lr": -1.0})) == [
        "optimizer.lr=-1.0 must be at least 1e-12 and at most 10"
    ]
    assert "init_from=runs/none" in problems(configured({"init_from": "runs/none"}))[0]


FOLDERS = [
    ({"run_dir": ""}, "run_dir='' is empty"),
    ({"name": ".."}, "name=.. would put the run's folder elsewhere"),
    ({"name": "a/../../b"}, "would put the run's folder elsewhere"),
    ({"name": "  "}, "name='  ' is empty"),
    ({"name": "a\nb"}, r"name='a\nb' has characters that cannot be shown"),
    ({"run_dir": "runs/" + "x" * 256}, "has a component of 256 bytes"),
    ({"run_dir": "runs/" + "ü" * 128}, "has a component of 256 bytes"),
    ({"run_dir": "runs/a\0b"}, "null character"),
    ({"run_dir": "dangling"}, "run_dir=dangling is a link to nowhere, which does not exist"),
    ({"run_dir": "loop"}, "run_dir=loop is a link to loop, which does not exist"),
    ({"run_dir": "file/run"}, "which is a file"),
    ({"init_from": ""}, "init_from='' is empty"),
    ({"init_from": "x" * 300}, "has a component of 300 bytes"),
    ({"task.tokenizer": "y" * 300}, "is not a folder"),
    ({"task.tokenizer": "file"}, "task.tokenizer=file is not a folder"),
]


@pytest.mark.parametrize(("settings", "quoted"), FOLDERS, ids=lambda value: "")
def test_paths_that_cannot_be(settings, quoted):
    Path("dangling").symlink_to("nowhere")
    Path("loop").symlink_to("loop")
    Path("file").touch()
    before = sorted(Path().iterdir())
    (found,) = problems(configured(settings))
    assert quoted in found and "\n" not in found
    assert sorted(Path().iterdir()) == before


def test_paths_that_can_be():
    Path("real").mkdir()
    Path("link").symlink_to("real")
    for settings in ({"run_dir": "link"}, {"run_dir": "runs/" + "x" * 255}, {"run_dir": "a/b/c/d"}, {"name": "a/b"}):
        validate(configured(settings))
