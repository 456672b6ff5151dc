"""Settings that changed since a run was started: every one of them is refused, named, or free on purpose."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_vp2o.config import continuity
from megatron_vp2o.config.compose import compose
from megatron_vp2o.config.continuity import changes
from megatron_vp2o.config.schema import TrainConfig
from megatron_vp2o.config.store import as_plain, save_config
from megatron_vp2o.config.validate import validate
from megatron_vp2o.errors import ConfigError

RECIPES = ["countdown_tiny_vp2o", "countdown_tiny_grpo", "text_tiny_supervised", "rows_tiny_grpo"]


def composed(recipe: str, *overrides: str) -> TrainConfig:
    return compose(recipe, ["init_from=null", *overrides])


def flat(config: TrainConfig) -> dict[str, Any]:
    return continuity._flat(as_plain(config))


def other_value(value: Any) -> Any:
    """Another value of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    return [*value, 1] if isinstance(value, list) else f"{value}x"


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_setting_that_changed_is_found(tmp_path: Path, recipe: str) -> None:
    config = composed(recipe)
    save_config(config, tmp_path)
    assert changes(config, tmp_path) == continuity.Changes()
    settings = flat(config)
    assert len(settings) > 80
    for name in settings:
        found = continuity.compare(settings, settings | {name: other_value(settings[name])})
        kinds = [found.another_run, found.misplaced, found.chosen]
        named = [kind for kind in kinds if any(change.startswith(f"{name} is ") for change in kind)]
        free = continuity._is_among(name, continuity._FREE)
        assert len(named) == (0 if free else 1) and sum(map(len, kinds)) == len(named), name
        section = name.split(".")[0]
        if section in ("task", "model") and not free:
            assert named[0] is found.another_run, name
        trained = section in ("optimizer", "rollout", "evaluation") or name.startswith("algorithm.stein.")
        if trained and not free:  # which servers generate is the user's business
            assert named[0] is found.chosen, name


def test_names_in_the_lists_are_settings() -> None:
    names = set().union(*(flat(composed(recipe)) for recipe in RECIPES))
    for listed in (*continuity._ANOTHER_RUN, *continuity._PLACES_DATA, *continuity._FREE):
        assert any(continuity._is_among(name, (listed,)) for name in names), listed


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=7", "seed is 1234 there and 7 here): keep its settings"),
        ("model.hidden_size=64", "holds another run (model.hidden_size is 128 there and 64 here"),
        ("task.seed=9", "holds another run (task.seed is 0 there and 9 here"),
    ],
)
def test_what_would_be_wrong_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, override: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    config = composed("countdown_tiny_vp2o")
    save_config(config, config.run_dir)
    (Path(config.run_dir) / "metrics.jsonl").write_text('{"step": 0}\n')
    other = composed("countdown_tiny_vp2o", override)
    if "another run" not in message:
        validate(other)  # there is no checkpoint yet: the run starts over
    (Path(config.run_dir) / "checkpoints" / "step_000001").mkdir(parents=True)
    with pytest.raises(ConfigError) as refused:
        validate(other)
    assert message in str(refused.value) and "\n" not in str(refused.value)
    validate(
        composed("countdown_tiny_vp2o", "optimizer.lr=1e-3", "algorithm.stein.eta=0.5", "parallel.expert_parallel=1")
    )
