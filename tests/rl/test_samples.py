"""Samples of rollouts: what is in a line, which steps have one, what a resumed run keeps, and how the report shows them."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import pytest
import torch

from megatron_vp2o.config.schema import GRPOConfig, LoggingConfig
from megatron_vp2o.report.samples import samples as section
from megatron_vp2o.rl.rewards import RewardShaping
from megatron_vp2o.rl.samples import samples_of
from megatron_vp2o.rl.types import Problem, Rollouts, Verdict
from megatron_vp2o.tasks.tokenizer import CharTokenizer
from megatron_vp2o.tracking.runs import Run
from megatron_vp2o.tracking.samples import RunSamples, read_samples

GROUP, TOKENIZER = 4, CharTokenizer()


def rollouts_of(prompts: list[str], responses: list[str], finished: list[bool]) -> Rollouts:
    """Responses group by group; the finished ones end with end-of-sequence."""
    ids = [
        (TOKENIZER.encode(prompts[n // GROUP]), [*TOKENIZER.encode(text), *([TOKENIZER.eos_id] if finished[n] else [])])
        for n, text in enumerate(responses)
    ]
    width = max(len(prompt) + len(response) for prompt, response in ids)
    tokens_NS = torch.zeros(len(ids), width, dtype=torch.int64)
    for row, (prompt, response) in zip(tokens_NS, ids, strict=True):
        row[: len(prompt) + len(response)] = torch.tensor([*prompt, *response])
    prompt_N, total_N = (torch.tensor(x) for x in zip(*[(len(p), len(p) + len(r)) for p, r in ids], strict=True))
    zeros_NS = torch.zeros(len(ids), width)
    return Rollouts(tokens_NS, prompt_N, total_N, zeros_NS, zeros_NS, torch.tensor(finished), 0)


def test_a_sample_says_what_was_written_and_what_it_earned(tmp_path: Path) -> None:
    random = Random(0)
    prompts = [f"{i}+{i}=" for i in range(3)]
    responses = [f"{random.randrange(99)}" for _ in range(3 * GROUP)]
    rewards = [random.choice([0.0, 0.25, 1.0]) for _ in responses]
    finished = [random.random() < 0.7 for _ in responses]
    rollouts = rollouts_of(prompts, responses, finished)
    problems = [Problem(10 + i, prompt, None, 1) for i, prompt in enumerate(prompts)]
    verdicts = [
        [
            Verdict(reward == 1, "x" if reward == 1 else None, "" if reward == 1 else "wrong", reward, {"math": reward})
            for reward in group
        ]
        for group in (rewards[:4], rewards[4:8], rewards[8:])
    ]
    earned = RewardShaping(GRPOConfig(group_size=GROUP), TOKENIZER)(verdicts, rollouts, None)
    sink = RunSamples(LoggingConfig(sample_prompts=2, sample_responses=3), tmp_path, rank=0)
    samples = samples_of(sink, TOKENIZER, problems, rollouts, verdicts, earned)
    assert [(s["problem"], s["prompt"]) for s in samples] == [(10, "0+0="), (11, "1+1=")]
    for p, sample in enumerate(samples):
        group = range(GROUP * p, GROUP * (p + 1))
        assert len(sample["responses"]) == 3
        assert sample["responses"][0]["reward"] == max(rewards[n] for n in group)
        assert min(rewards[n] for n in group) in [r["reward"] for r in sample["responses"][:2]]
        for response in sample["responses"]:
            twins = [n for n in group if responses[n] == response["text"]]
            assert any(
                (response["reward"], response["finished"], response["tokens"], response["correct"])
                == (rewards[n], finished[n], len(responses[n]) + finished[n], rewards[n] == 1)
                and response["advantage"] == pytest.approx(float(earned.advantages_PG.flatten()[n]))
                for n in twins
            )
            assert response["reason"] == ("" if response["correct"] else "wrong")
            assert response["parts"] == {"math": response["reward"]}
    sink.write(7, samples)
    assert read_samples(sink.path) == [{"step": 7, **sample} for sample in json.loads(json.dumps(samples))]


def line(step: int, text: str = "<b>&\ud83d\u2028") -> dict[str, object]:
    response = {"text": text, "reward": 0.5, "advantage": -1.0, "reason": "<wrong>", "finished": False}
    return {"problem": 1, "prompt": f"prompt {step}", "responses": [response]}


def test_when_and_what_a_resumed_run_keeps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sink = RunSamples(LoggingConfig(sample_interval=4, sample_table=True), tmp_path, rank=0)
    assert [step for step in range(1, 13) if sink.due(step)] == [1, 4, 8, 12]
    for rank, interval in ((1, 4), (0, 0)):
        other = RunSamples(LoggingConfig(sample_interval=interval), tmp_path, rank)
        assert not any(other.due(step) for step in range(1, 13))
    sink.start(0)
    for step in (1, 4, 8, 12):
        sink.write(step, [line(step)])
    assert "prompt 12" in capsys.readouterr().err
    with sink.path.open("ab") as file:
        file.write(b'{"step": 13, "prom')
    sink.start(8)
    assert [sample["step"] for sample in read_samples(sink.path)] == [1, 4, 8]
    sink.write(12, [line(12)])
    assert [sample["step"] for sample in read_samples(sink.path)] == [1, 4, 8, 12]
    sink.start(0)
    assert read_samples(sink.path) == []


def test_the_report_shows_the_last_step(tmp_path: Path) -> None:
    sink = RunSamples(LoggingConfig(), tmp_path / "a", rank=0)
    for step in (1, 10):
        sink.write(step, [line(step), line(step, "x" * 9000)])
    runs = [Run(tmp_path / name, name, {"step": [1]}) for name in ("a", "b")]
    html = section(runs, ["a", "b"])
    html.encode()
    assert "a, step 10" in html and "prompt 10" in html and "prompt 1<" not in html and "b, step" not in html
    assert "&lt;b&gt;&amp;" in html and "<b>" not in html and "&lt;wrong&gt;" in html and "cut off" in html
    assert "x" * 9000 not in html and "[...]" in html
    assert section(runs[1:], ["b"]) == ""
