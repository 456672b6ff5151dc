"""Some of a step's prompts, responses, rewards and advantages, for people to look at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_vp2o.rl.grading import response_text
from megatron_vp2o.rl.interfaces import SampleSink, Tokenizer
from megatron_vp2o.rl.rewards import Earned
from megatron_vp2o.rl.types import Problem, Rollouts, Verdict


def samples_of(
    sink: SampleSink,
    tokenizer: Tokenizer,
    problems: Sequence[Problem],
    rollouts: Rollouts,
    verdicts: Sequence[Sequence[Verdict]],
    earned: Earned,
) -> list[dict[str, Any]]:
    """One plain object a prompt: its text, and of its responses the one with the highest and the one with the lowest reward, then
    further ones in their order."""
    return [
        {
            "problem": problem.uid,
            "prompt": problem.prompt,
            "responses": [
                _response(p, g, tokenizer, rollouts, verdicts[p][g], earned)
                for g in _chosen([verdict.reward for verdict in verdicts[p]], sink.responses)
            ],
        }
        for p, problem in enumerate(problems[: sink.prompts])
    ]


def _chosen(rewards: Sequence[float], count: int) -> list[int]:
    places = range(len(rewards))
    best, worst = max(places, key=lambda g: rewards[g]), min(places, key=lambda g: rewards[g])
    return list(dict.fromkeys([best, worst, *places]))[:count]


def _response(
    p: int, g: int, tokenizer: Tokenizer, rollouts: Rollouts, verdict: Verdict, earned: Earned
) -> dict[str, Any]:
    n = p * earned.rewards_PG.shape[1] + g
    ids = rollouts.response(n)
    return {
        "text": response_text(tokenizer, ids),
        "tokens": len(ids),
        "finished": bool(rollouts.finished_N[n]),
        "correct": verdict.correct,
        "reward": float(verdict.reward),
        "reason": verdict.reason,
        "answer": None if verdict.canonical is None else str(verdict.canonical),
        "parts": {name: float(value) for name, value in verdict.parts.items()},
        "advantage": float(earned.advantages_PG[p, g]),
    }
