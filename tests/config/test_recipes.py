"""Shipped YAML: every recipe is complete and valid, and nothing repeats a default."""

import dataclasses
import importlib.util
import re
from pathlib import Path

import pytest
import yaml

from megatron_vp2o.config.compose import compose
from megatron_vp2o.config.register import GROUPS, PLANNED, recipe_files, recipe_list, recipe_names, resource_dir
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


def test_planned_recipes_are_in_a_folder_of_their_own():
    for path in recipe_files().values():
        assert ("Planned, never run" in path.read_text()) == (path.parent.name == PLANNED), path


def test_help_shows_first_what_has_been_run():
    text = recipe_list()
    ready, planned = text.split("planned, never run")
    assert "countdown_tiny_vp2o" in ready and "64xh100" not in ready
    assert "vp2o_33b_a4b_countdown4_8k_64xh100" in planned


def world_size(name: str) -> int:
    """Processes for which a recipe's name leaves GPUs (`..._64xh100`) beside its servers; one where it names no hardware."""
    hardware = re.search(r"_(\d+)x[a-z]+\d+$", name)
    if hardware is None:
        return 1
    rollout = compose(name).rollout
    servers = rollout.server.count * rollout.server.hosts if rollout.launch else 0
    return int(hardware[1]) - servers * rollout.server.tensor_parallel


@pytest.mark.parametrize("name", recipe_names())
def test_recipe_is_valid(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if world_size(name) > 1:  # the hardware that it names has transformer-engine, which this machine may lack
        find_spec = importlib.util.find_spec
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda module: module if module == "transformer_engine" else find_spec(module)
        )
    config = compose(name)
    if config.init_from is not None and config.task.tokenizer is not None:  # somebody else's model, converted
        assert Path(config.init_from).parent == Path(config.task.tokenizer).parent
        Path(config.init_from).mkdir(parents=True)
    elif config.init_from is not None:
        made_by = Path(config.init_from).name
        assert made_by in recipe_names()
        first = compose(made_by)
        assert first.run_dir == config.init_from
        assert (first.task, first.model) == (config.task, config.model)  # what was learnt there is of use here
        Path(config.init_from).mkdir(parents=True)
    if isinstance(config.algorithm, SupervisedConfig) and config.algorithm.data.source is not DataSource.task:
        for name_of_file in ("text", "text.bin", "text.idx"):
            Path(name_of_file).touch()
        config.algorithm.data.path = "text"
    if config.task.tokenizer is not None:
        Path(config.task.tokenizer).mkdir(parents=True, exist_ok=True)  # a Hugging Face folder is both
    validate(config, world_size(name))
    assert (config.name, config.run_dir) == (name, f"runs/{name}")


@pytest.mark.parametrize("name", [name for name in recipe_names() if "_served_" in name])
def test_recipes_with_servers_are_the_others_on_fewer_ranks(name):
    served, plain = compose(name), compose(name.replace("_served_", "_countdown4_"))
    assert served.rollout.launch and served.rollout.server.hosts > 0 and world_size(name) == 32
    assert dataclasses.replace(served, rollout=plain.rollout, name=plain.name, run_dir=plain.run_dir) == plain


LARGE_TWINS = [name for name in recipe_names() if re.match(r"vp2o_.*k_\d+xh100$", name)]


def test_large_twins_are_there():
    matches = [re.fullmatch(r"vp2o_(.*)_countdown4_(\d+k)_\d+xh100", name) for name in LARGE_TWINS]
    sizes = {match.groups() for match in matches if match}
    models = ("33b_a4b", "qwen3_30b_a3b", "gpt_oss_20b", "mixtral_8x7b")
    assert sizes == {(model, length) for model in models for length in ("8k", "16k")}
    for model in ("33b_a4b", "qwen3_30b_a3b"):
        for kind in ("math", "code", "instructions"):
            for length in ("8k", "16k"):
                config = compose(f"vp2o_{model}_{kind}_{length}_64xh100")
                assert config.task.name == "rows" and set(config.reward.active()) == {kind}
                assert config.rollout.sampling.max_new_tokens == {"8k": 8192, "16k": 16384}[length]


@pytest.mark.parametrize("name", LARGE_TWINS)
def test_large_twins_differ_in_the_algorithm_only(name):
    ours, twin = compose(name), compose(name.replace("vp2o", "grpo", 1))
    shared = {field.name: getattr(twin.algorithm, field.name) for field in dataclasses.fields(twin.algorithm)}
    own = ("name", "objective", "stein", "specialization", "kl_coef", "kl_estimator", "kl_reference")
    for setting in own:
        assert getattr(ours.algorithm, setting) == getattr(type(ours.algorithm)(), setting)
        del shared[setting]
    assert {key: getattr(ours.algorithm, key) for key in shared} == shared
    assert dataclasses.replace(ours, algorithm=twin.algorithm, name=twin.name, run_dir=twin.run_dir) == twin
    assert ours.checkpoint.interval == 80


@pytest.mark.parametrize("name", recipe_names())
def test_recipe_repeats_no_default(name, tmp_path):
    body = yaml.safe_load(recipe_files()[name].read_text())
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
