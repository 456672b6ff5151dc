"""The benchmarks' own arithmetic; the timings themselves are not tested."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_vp2o.config.compose import compose
from megatron_vp2o.config.schema import GRPOConfig
from tools.bench import peer_ours, peer_work, step, variants


def test_prompts_are_the_same_on_both_sides_and_about_twelve_characters() -> None:
    texts = peer_work.Work().prompt_texts(500)
    assert texts == peer_work.Work().prompt_texts(500)
    assert 11 <= sum(map(len, texts)) / len(texts) <= 13
    assert set("".join(texts)) <= set(peer_work.ALPHABET)


@pytest.mark.parametrize(("ids", "expected"), [([2, 4, 1], 1.0), ([1, 3, 2], 0.0), ([1, 2], 0.0), ([], 0.0)])
def test_reward_is_right_when_most_ids_are_even(ids: list[int], expected: float) -> None:
    assert peer_work.reward(ids) == expected


def test_every_id_of_ours_is_one_character_and_reads_back() -> None:
    tokenizer = peer_ours.CharacterIds(64)
    everything = list(range(64))
    assert tokenizer.encode(tokenizer.decode(everything)) == everything


def test_step_report_takes_medians_after_the_warm_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = tmp_path / "metrics.jsonl"
    rows = [
        {"step": i, "time/step_s": 9.0 if i <= step.WARMUP else 0.25, "time/tokens_per_s": 1000.0} for i in range(9)
    ]
    record.write_text("\n".join(map(json.dumps, rows)))
    step.report("grpo", record)
    shown = capsys.readouterr().out
    assert "5 steps" in shown and "250.0 ms" in shown and "1,000" in shown


def test_a_variant_is_compared_with_grpo_within_each_step() -> None:
    # the machine slows down by half in the last step: the shares of the steps stay
    turns = [
        {"step": 1.0 * slow, "grpo": 0.010 * slow, "darling": 0.030 * slow, variants.REFERENCE: 0.1 * slow}
        for slow in (1.0, 1.0, 1.5)
    ]
    shown = variants.report(turns, "process_time")
    assert "darling" in shown and "over grpo +2.00 % of a step (goal: 2 %)" in shown
    assert "reference's forward pass: 10.0 % of a step" in shown and "maxrl" not in shown


def test_every_variant_of_the_benchmark_changes_the_shaping() -> None:
    shapes = []
    for own in variants.VARIANTS.values():
        settings = compose("linear_order_tiny_grpo", [*own, "init_from=null"]).algorithm
        assert isinstance(settings, GRPOConfig)
        shapes.append((settings.advantage, settings.answer_repulsion, settings.unlikeliness, settings.kl_coef))
    assert all(shapes.count(shape) == 1 for shape in shapes)
