"""A few random overrides with a fixed seed; `python -m tests.config.fuzz` does any number (see there).

FUZZ=NUMBER in the environment draws that many single overrides and a third as many pairs instead.
"""

import os
from random import Random

import pytest

from megatron_vp2o.config.compose import compose
from megatron_vp2o.config.schema import TrainConfig
from megatron_vp2o.errors import ConfigError
from tests.config.fuzz import ODD, attempt, fuzz, odd, plausible, quick_compose, settings, unclear, unsound

NUMBER = int(os.environ.get("FUZZ", "20"))


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_odd_single_overrides_are_refused_in_plain_lines():
    counts, wrong = fuzz(NUMBER, seed=11, pairs=False)
    assert wrong == []
    assert counts["refused"] > NUMBER // 2 and sum(counts.values()) == NUMBER


def test_pairs_of_overrides_are_refused_in_plain_lines_or_sound():
    number = max(NUMBER // 3, 4)
    counts, wrong = fuzz(number, seed=12, pairs=True)
    assert wrong == []
    assert sum(counts.values()) == number


def test_the_fuzz_test_sees_what_is_absurd():
    """It is not blind: configurations that ought to be refused, as if they had been accepted."""
    config = compose("train")
    assert unsound(config, ["seed=3"]) == []
    config.optimizer.lr, config.name, config.run_dir, config.model.glu_linear_offset = float("nan"), "..", "", -2.0
    overrides = ["optimizer.lr=nan", "optimzer.lr=1", "model.recompute=7", "model.glu_linear_offset=-2", "name=2026_1"]
    found = "\n".join(unsound(config, overrides))
    for part in (
        "not finite",
        "optimzer.lr is no setting",
        "model.recompute=7: no switch",
        "run_dir=''",
        "became '..'",
    ):
        assert part in found
    assert "glu_linear_offset" not in found
    assert unclear("something failed", ["optimizer.lr=1"]) and unclear("Traceback (most recent", ["a=1"])


def test_draws_reach_every_setting_and_odd_value():
    random, known = Random(0), settings(compose("train", ["algorithm=vp2o"]))
    drawn = [odd(random, random.choice(known)) for _ in range(3000)]
    assert {setting.name for setting in known} <= {override.partition("=")[0] for override in drawn}
    assert set(ODD) == {override.partition("=")[2] for override in drawn}
    assert all("=" in plausible(random, setting) for setting in known)


def test_allowed_values_compose():
    random, known = Random(1), settings(compose("train"))
    numbers = [setting for setting in known if int in setting.kinds or float in setting.kinds]
    results = [attempt("train", [plausible(random, setting)], []) for setting in random.sample(numbers, 5)]
    assert any(isinstance(result, TrainConfig) for result in results)
    assert not any(isinstance(result, str) and "Value" in result for result in results)


def test_the_quick_way_to_compose_says_what_composing_says():
    random, known = Random(2), settings(compose("train"))
    drawn = [odd(random, random.choice(known)) for _ in range(4)] + [plausible(random, random.choice(known))]
    for override in drawn:
        results: list[object] = []
        for way in (lambda text: compose("train", [text]), lambda text: quick_compose("train", (), [text])):
            try:
                results.append(way(override))
            except ConfigError as error:
                results.append(str(error))
        assert results[0] == results[1], override
