"""The configuration kept with a run."""

import platform
from importlib import metadata

import pytest
import yaml

from megatron_vp2o import atomic
from megatron_vp2o.config.compose import compose
from megatron_vp2o.config.store import load_config, save_config
from megatron_vp2o.errors import ConfigError


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["algorithm=supervised", "algorithm.data.source=jsonl", "algorithm.data.path=a b.jsonl"],
        ["notes={list: [1, 'x'], text: 'Grüße: #1'}", "init_from='runs/a=1,b'", "parallel.sequence_parallel=false"],
        ["model=qwen3_30b_a3b", "optimizer.lr=3e-5", "seed=0"],
    ],
)
def test_what_was_saved_is_loaded(tmp_path, overrides):
    config = compose("train", overrides)
    path = save_config(config, tmp_path / "new" / "run")
    assert path == tmp_path / "new" / "run" / "config.yaml"
    assert load_config(path.parent) == config
    assert [file.name for file in path.parent.iterdir()] == ["config.yaml"]


def test_the_file_is_plain_yaml_with_versions(tmp_path):
    stored = yaml.safe_load(save_config(compose("train", ["name=x"]), tmp_path).read_text())
    assert stored["versions"]["python"] == platform.python_version()
    assert stored["versions"]["hydra-core"] == metadata.version("hydra-core")
    assert {"torch", "megatron-core"} <= set(stored["versions"])
    assert stored["config"]["run_dir"] == "runs/x"  # resolved
    assert stored["config"]["algorithm"]["name"] == "grpo"


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = save_config(compose("train", ["name=old"]), tmp_path)
    before = path.read_bytes()

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic.os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_config(compose("train", ["name=new"]), tmp_path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, "holds no run"),
        ("", "not the stored configuration"),
        ("config: 3", "not the stored configuration"),
        ("a: [", "not the stored configuration"),
        ("config: {algorithm: {name: ppo}}", "not the stored configuration"),
        ("config: {algorithm: {name: grpo, grup_size: 3}}", "did you mean 'algorithm.group_size'"),
        ("config: {algorithm: {name: grpo, steps: x}}", "algorithm.steps: Value 'x'"),
    ],
)
def test_a_file_that_is_none_of_ours_is_refused(tmp_path, text, expected):
    if text is not None:
        (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path)
    assert expected in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_a_configuration_stored_with_the_settings_of_all_tasks_is_still_read(tmp_path):
    for overrides, name in (([], "countdown"), (["task=shortest_path", "task.rows=5"], "shortest_path")):
        config = compose("train", overrides)
        path = save_config(config, tmp_path)
        stored = yaml.safe_load(path.read_text())
        both: dict[str, float] = {"numbers": 3, "min_number": 1, "max_number": 9, "min_target": 1, "max_target": 30}
        both |= {"rows": 4, "columns": 4, "blocked_probability": 0.3}
        stored["config"]["task"] = {**both, **stored["config"]["task"]}
        path.write_text(yaml.safe_dump(stored))
        assert load_config(tmp_path) == config
        assert config.task.name == name
