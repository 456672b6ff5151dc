"""Composition: every choice of every group, overrides, user folders, and errors in one line."""

from pathlib import Path

import pytest

from megatron_vp2o.config.compose import compose
from megatron_vp2o.config.explain import setting_names
from megatron_vp2o.config.register import GROUPS, resource_dir
from megatron_vp2o.config.schema import GRPOConfig, Resume, SupervisedConfig, TrainConfig
from megatron_vp2o.errors import ConfigError

CHOICES = sorted(
    {(group, name) for group, choices in GROUPS.items() for name in choices}
    | {(group, path.stem) for group in GROUPS for path in (resource_dir("conf") / group).glob("*.yaml")}
)


def test_train_without_overrides_is_the_dataclass_defaults():
    expected = TrainConfig()
    expected.run_dir = "runs/run"
    assert compose("train") == expected


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_choice_of_every_group_composes(group, choice):
    if choice == "checkpoint":  # composes only where a program reads checkpoints: tests/hf/test_reader.py
        with pytest.raises(ConfigError, match="needs a program that reads checkpoints"):
            compose("train", [f"{group}={choice}"])
        return
    assert isinstance(compose("train", [f"{group}={choice}"]), TrainConfig)


def test_groups_of_conf_are_groups_of_the_schema():
    folders = {path.name for path in resource_dir("conf").iterdir() if path.is_dir()}
    assert folders - {"hydra", "executor"} <= set(GROUPS)  # executor: of megatron_vp2o.launch


def test_overrides_and_interpolation_arrive_as_plain_objects():
    config = compose(
        "train", ["algorithm=supervised", "algorithm.steps=7", "resume=never", "name=a", "notes={why: trial}"]
    )
    assert type(config.algorithm) is SupervisedConfig
    assert (config.algorithm.steps, config.resume, config.run_dir) == (7, Resume.never, "runs/a")
    assert config.notes == {"why": "trial"}
    assert type(config.evaluation.pass_at) is list


def test_setting_names_follow_the_algorithm():
    assert "algorithm.group_size" in setting_names(algorithm=GRPOConfig)
    assert "algorithm.group_size" not in setting_names(algorithm=SupervisedConfig)
    assert {"model", "model.num_layers", "rollout.sampling.top_p", "notes"} <= set(setting_names())


MISTAKES = [
    (["algorithm.grup_size=4"], ["'algorithm.grup_size'", "did you mean 'algorithm.group_size'"]),
    (["algoritm=grpo"], ["'algoritm'", "did you mean 'algorithm'"]),
    (["lr=0.1"], ["'lr'", "did you mean 'optimizer.lr'"]),
    (["temperture=1"], ["'temperture'", "temperature'"]),
    (["rollout.sampling.temprature=1"], ["did you mean 'rollout.sampling.temperature'"]),
    (["modle.num_layers=2"], ["'modle.num_layers'", "did you mean 'model.num_layers'"]),
    (["zzz=1"], ["'zzz'", "there are: algorithm, model"]),
    (["model.zzz=1"], ["'model.zzz'", "there are: model.num_layers"]),
    (["+foo=1"], ["'foo'"]),
    (["+algorithm.grup_size=1"], ["did you mean 'algorithm.group_size'"]),
    (["algorithm=supervised", "algorithm.group_size=4"], ["algorithm.group_size is a setting of algorithm=grpo"]),
    (["algorithm.steps=many"], ["algorithm.steps", "'many'", "Integer"]),
    (["resume=maybe"], ["resume", "'maybe'", "auto, never, must"]),
    (["evaluation.pass_at=[a]"], ["evaluation.pass_at[0]", "'a'"]),
    (["model=tinny"], ["model=tinny", "did you mean 'tiny'"]),
    (["algorithm=ppo"], ["algorithm=ppo", "grpo"]),
    (["run_dir=${nowhere}"], ["run_dir", "nowhere"]),
    (["name=[a"], ["name=[a", "KEY=VALUE"]),
    (["steps"], ["steps", "KEY=VALUE"]),
    (["optimizer.lr=1,2"], ["optimizer.lr=1,2", "--multirun"]),
    (["algorithm=null"], ["group override"]),
    ([f"optimizer.lr={'9' * 400}"], ["optimizer.lr=99999", "has 400 digits"]),
    (["model.recompute=7"], ["model.recompute=7 must be true or false"]),
    (["model.recompute=1.0"], ["model.recompute=1.0 must be true or false"]),
    (["optimizer.lr=true"], ["optimizer.lr", "'True'"]),
    (["optimizer.lr='1e-3'"], ["optimizer.lr='1e-3'", "must be a number: write it without quotes"]),
    (["optimizer={lr: '1'}"], ["optimizer.lr='1'", "without quotes"]),
    (["model.recompute='true'"], ["model.recompute='true'", "must be true or false"]),
    (["algorithm.steps=1.5"], ["algorithm.steps", "'1.5'", "Integer"]),
    (["algorithm.steps=null"], ["algorithm.steps", "not Optional"]),
    (["task.rows=9"], ["task.rows is a setting of task=shortest_path, but this run has another task"]),
]


@pytest.mark.parametrize(("overrides", "expected"), MISTAKES, ids=[" ".join(overrides) for overrides, _ in MISTAKES])
def test_a_mistake_is_one_line_that_names_the_remedy(overrides, expected):
    with pytest.raises(ConfigError) as caught:
        compose("train", overrides)
    message = str(caught.value)
    assert "\n" not in message
    assert "full_key" not in message
    for part in expected:
        assert part in message


def test_unknown_recipe_names_the_closest():
    with pytest.raises(ConfigError, match="there is no such recipe; did you mean 'countdown_tiny_grpo'"):
        compose("countdown_tiny_grop")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "defaults: [train, _self_]\nalgorithm: {grup_size: 3}\n",
            "in mine.yaml: there is no setting 'algorithm.grup_size'",
        ),
        ("defaults: [train, _self_]\nalgorithm: {steps: many}\n", "in mine.yaml: algorithm.steps: Value 'many'"),
        (
            "defaults: [train, {override /model: tinny}, _self_]\n",
            "model=tinny: there is no such choice; did you mean 'tiny'",
        ),
        ("defaults: [train, {override /modle: tiny}, _self_]\n", "there is no group 'modle'; did you mean 'model'"),
        ("name: alone\n", "not built on `train`"),
        ("defaults: [train, _self_]\noptimizer.lr: 1\n", "sections are nested: write `optimizer: {lr: ...}`"),
        (
            "defaults: [train, _self_]\nmodel: {recompute: 7}\n",
            "in mine.yaml: model.recompute: 7 must be true or false",
        ),
        ('defaults: [train, _self_]\noptimizer: {lr: "1"}\n', "in mine.yaml: optimizer.lr='1' is text"),
        (f"defaults: [train, _self_]\noptimizer: {{lr: {'9' * 400}}}\n", "in mine.yaml: optimizer.lr=999"),
        ("defaults: [train, _self_]\noptimizer: 3\n", "in mine.yaml: Merge error"),
        ("defaults: [train, _self_]\nalgorithm: [1,\n", "cannot read a YAML file"),
    ],
)
def test_a_mistake_in_a_recipe_is_one_line_too(tmp_path: Path, text, expected):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        compose("mine", config_dir=tmp_path)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_users_copy_of_a_recipe_wins_over_ours(tmp_path: Path):
    (tmp_path / "countdown_tiny_grpo.yaml").write_text("defaults: [train, _self_]\nname: mine\n")
    assert compose("countdown_tiny_grpo", config_dir=tmp_path).name == "mine"
    assert compose("countdown_tiny_grpo").name == "countdown_tiny_grpo"


def test_a_users_folder_may_add_choices_to_a_group(tmp_path: Path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "wide.yaml").write_text("hidden_size: 256\n")
    config = compose("train", ["model=wide"], config_dir=tmp_path)
    assert (config.model.hidden_size, config.model.num_layers) == (256, 4)
