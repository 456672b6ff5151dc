"""Shipped YAML: every recipe is complete and valid, and nothing repeats a default."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from megatron_vp2o.config.compose import compose
from megatron_vp2o.config.register import GROUPS, recipe_names, resource_dir
from megatron_vp2o.config.schema import DataSource, SupervisedConfig, TrainConfig
from megatron_vp2o.config.validate import validate

GROUP_FILES = sorted(path for group in GROUPS for path in (resource_dir("conf") / group).glob("*.yaml"))


def leaves(tree, prefix=""):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def lookup(config: TrainConfig, dotted: str):
    value = config
    for part in dotted.split("."):
        value = getattr(value, part)
    return getattr(value, "name", value)


def repeated(body: dict, base: TrainConfig, prefix: str = "") -> list[str]:
    """Settings of a file that say what would hold without them."""
    return [key for key, value in leaves(body, prefix) if lookup(base, key) == value]


def test_there_are_recipes():
    assert {"countdown_tiny_supervised", "countdown_tiny_grpo"} <= set(recipe_names())


@pytest.mark.parametrize("name", recipe_names())
def test_recipe_is_valid(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = compose(name)
    if config.init_from is not None:
        made_by = Path(config.init_from).name
        assert made_by in recipe_names()
        first = compose(made_by)
        assert first.run_dir == config.init_from
        assert (first.task, first.model) == (config.task, config.model)  # what was learnt there is of use here
        Path(config.init_from).mkdir(parents=True)
    if isinstance(config.algorithm, SupervisedConfig) and config.algorithm.data.source is DataSource.jsonl:
        Path("text.jsonl").write_text('{"text": "a"}\n')
        config.algorithm.data.path = "text.jsonl"
    validate(config)
    assert (config.name, config.run_dir) == (name, f"runs/{name}")


@pytest.mark.parametrize("name", recipe_names())
def test_recipe_repeats_no_default(name, tmp_path):
    body = yaml.safe_load((resource_dir("recipes") / f"{name}.yaml").read_text())
    defaults = body.pop("defaults")
    (tmp_path / "bare.yaml").write_text(yaml.safe_dump({"defaults": defaults}))
    assert repeated(body, compose("bare", config_dir=tmp_path)) == []


@pytest.mark.parametrize("path", GROUP_FILES, ids=lambda path: f"{path.parent.name}={path.stem}")
def test_group_file_is_made_of_differences(path):
    body = yaml.safe_load(path.read_text()) or {}
    base = TrainConfig()
    for entry in body.pop("defaults", []):
        if entry in GROUPS[path.parent.name]:
            base = dataclasses.replace(base, **{path.parent.name: GROUPS[path.parent.name][entry]()})
    assert body, "a file that changes nothing"
    assert repeated(body, base, f"{path.parent.name}.") == []
