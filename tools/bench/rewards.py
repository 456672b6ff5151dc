"""Answers graded in a second: mathematics without and with bad answers among them, and programs in the sandbox.

Of the bad answers a quarter each sleeps, spins, crashes and allocates without bound. Every other answer must get its grade.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_vp2o.config.reward import RewardConfig, RewardWeights
from megatron_vp2o.errors import RewardError
from megatron_vp2o.rewards import make_reward
from megatron_vp2o.rl.types import RewardResult
from tools.bench.reward_work import BAD

WORK = Path(__file__).parent / "reward_work.py"
GROUP = 8
"""Responses to one question, as in training."""
SUM = "```python\na, b = map(int, input().split())\nprint(a + b)\n```"


def main(arguments: Sequence[str] = ()) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.bench rewards", description=__doc__)
    parser.add_argument("--answers", type=int, default=10_000)
    parser.add_argument("--plain", type=int, default=2000, help="answers of the run without bad ones")
    parser.add_argument("--bad", type=float, default=0.01, help="share of answers that misbehave")
    parser.add_argument("--timeout", type=float, default=2.0, help="seconds for an answer")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--programs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    draw = random.Random(options.seed)
    answers = [_answer(draw, number) for number in range(options.answers)]
    limits: dict[str, Any] = {"workers": options.workers, "timeout_s": options.timeout, "memory_mib": 512}

    _, wrong = _timed("math", RewardConfig(RewardWeights(math=1.0), **limits), answers[: options.plain])
    bad = {number: BAD[i % len(BAD)] for i, number in enumerate(_some(draw, options.answers, options.bad))}
    mixed = [(bad.get(n, response), row, right and n not in bad) for n, (response, row, right) in enumerate(answers)]
    config = RewardConfig(path=f"{WORK}:mathematics", batch_size=16, **limits)
    results, more = _timed(f"math with {len(bad)} bad answers", config, mixed)
    for kind in BAD:
        reasons = {results[number].reason for number, one in bad.items() if one == kind}
        print(f"  {kind}: {', '.join(sorted(reasons))}")
    programs = [(SUM, {"tests": [{"input": f"{n} 1", "output": str(n + 1)}]}, True) for n in range(options.programs)]
    try:
        _, less = _timed("programs of one test", RewardConfig(RewardWeights(code=1.0), **limits), programs)
    except RewardError as error:
        print(f"programs: not measured: {error}")
        less = 0
    return int(wrong + more + less > 0)


def _timed(
    name: str, config: RewardConfig, answers: Sequence[tuple[str, dict[str, Any], bool]]
) -> tuple[list[RewardResult], int]:
    """Results, and how many are wrong."""
    start = time.monotonic()
    reward = make_reward(config)
    assert reward is not None
    with reward:
        ready = time.monotonic()
        results = reward([""] * len(answers), [answer[0] for answer in answers], [answer[1] for answer in answers])
        seconds = time.monotonic() - ready
        counts = reward.counts
    wrong = sum(result.correct is not right for result, (_, _, right) in zip(results, answers, strict=True))
    print(
        f"{name}: {len(answers)} answers in {seconds:.1f} s, {len(answers) / seconds:.0f}/s with {config.workers} workers "
        f"(start {ready - start:.1f} s); graded wrongly: {wrong}; timed out {counts.timed_out}, crashed {counts.crashed}, "
        f"workers replaced {counts.workers_lost}",
        flush=True,
    )
    return results, wrong


def _answer(draw: random.Random, number: int) -> tuple[str, dict[str, Any], bool]:
    """A response, its row, and whether it is right: fractions, GROUP responses to each question."""
    question = random.Random(number // GROUP)
    a, b = question.randint(1, 400), question.randint(2, 30)
    right, factor = draw.random() < 0.5, draw.randint(1, 9)
    shown = a if right else a + 1
    style = draw.choice(
        [
            rf"Therefore \boxed{{\frac{{{shown}}}{{{b}}}}}",
            f"The answer is {shown * factor}/{b * factor}.",
            f"<think>perhaps {shown + 3}?</think> It is {shown * factor}/{b * factor}",
        ]
    )
    return style, {"answer": rf"\frac{{{a}}}{{{b}}}"}, right


def _some(draw: random.Random, total: int, share: float) -> list[int]:
    return draw.sample(range(total), round(total * share))
