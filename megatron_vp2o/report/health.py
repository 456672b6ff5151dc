"""What a run's record says of its health: each check is one sentence with the numbers behind it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from statistics import median

from megatron_vp2o.tracking import format as fmt
from megatron_vp2o.tracking.runs import ACCURACY, Run

MISMATCH_FP32 = 1e-5  # two implementations of one float32 forward pass agree to this
MISMATCH_BF16 = 0.1  # bfloat16 keeps 8 bits of a logit of about 10
GRADIENT_SPIKE = 10.0  # times the median norm
MOST_CLIPPED = 0.3
MOST_TRUNCATED = 0.2
FEWEST_KEPT = 0.1  # of the groups
MOST_KL = 0.1  # nats between the behaviour policy and the learner
ENTROPY_LEFT = 0.1  # of the entropy at the start
DIVERSITY_LEFT = 0.5  # of the coverage at the start
ACCURACY_LOST = 0.05  # below the best evaluation
_RECENT = 10  # steps that "lately" means


class Level(Enum):
    good = "good"
    note = "note"
    warning = "warning"


@dataclass(frozen=True)
class Finding:
    """One check's verdict."""

    level: Level
    title: str
    detail: str


def mismatch_bound(run: Run) -> float:
    """How far recomputed log-probabilities may be from the rollouts' in this run's precision."""
    return MISMATCH_BF16 if run.setting("model", "precision") == "bf16" else MISMATCH_FP32


def findings(run: Run) -> list[Finding]:
    """Every check that this run's record allows, in a fixed order."""
    checked = (check(run) for check in _CHECKS)
    return [finding for finding in checked if finding is not None]


def _complete(run: Run) -> Finding | None:
    wanted = run.setting("algorithm", "steps")
    if not isinstance(wanted, int):
        return None
    if run.steps < wanted:
        detail = f"{run.steps:,} of {wanted:,} steps are recorded: still running, stopped, or killed."
        return Finding(Level.note, "Not at its end", detail)
    return Finding(Level.good, "Complete", f"All {wanted:,} steps are recorded.")


def _whole(run: Run) -> Finding:
    steps = [int(step or 0) for step in run.columns["step"]]
    for before, after in itertools.pairwise(steps):
        if after != before + 1:
            return Finding(Level.warning, "Steps are missing", f"Step {before:,} is followed by step {after:,}.")
    return Finding(Level.good, "No gaps", f"One line for each step from {steps[0]:,} to {steps[-1]:,}.")


def _finite(run: Run) -> Finding:
    broken = {}
    for key, column in run.columns.items():
        rows = [row for row, value in enumerate(column) if value is not None and not math.isfinite(value)]
        if rows:
            broken[key] = rows
    if not broken:
        return Finding(Level.good, "Finite", "No metric is NaN or infinite at any step.")
    first = min(rows[0] for rows in broken.values())
    lines = len({row for rows in broken.values() for row in rows})
    at = int(run.columns["step"][first] or 0)
    return Finding(
        Level.warning, "NaN or infinity", f"In {', '.join(broken)}, at {_times(lines, 'step')}; first at step {at:,}."
    )


def _skipped(run: Run) -> Finding | None:
    skipped, taken = run.last("optimizer/skipped"), run.last("optimizer/steps")
    if skipped is None:
        return None
    if skipped:
        detail = f"{skipped:,.0f} refused (gradient not finite, or no loss token), {taken or 0:,.0f} taken."
        return Finding(Level.warning, "Optimizer steps were skipped", detail)
    return Finding(Level.good, "Optimizer steps", f"All {taken or 0:,.0f} were taken, none refused.")


def _gradients(run: Run) -> Finding | None:
    norms = run.values("optimizer/grad_norm")
    if len(norms) < _RECENT:
        return None
    middle, largest = median(norms), max(norms)
    detail = f"Largest norm {fmt.number(largest)}, median {fmt.number(middle)}."
    if largest > GRADIENT_SPIKE * middle:
        return Finding(Level.note, "Gradient spikes", detail)
    return Finding(Level.good, "Gradients", detail)


def _mismatch(run: Run) -> Finding | None:
    worst = _largest(run, "policy/logprob_mismatch")
    if worst is None:
        return None
    value, step = worst
    bound = mismatch_bound(run)
    detail = f"Rollout and recomputed log-probabilities differ by at most {fmt.number(value)} nats (step {step:,})"
    if value > bound:
        return Finding(Level.warning, "Log-probabilities disagree", f"{detail}; the bound is {fmt.number(bound)}.")
    return Finding(Level.good, "Log-probabilities agree", f"{detail}, within {fmt.number(bound)}.")


def _off_policy(run: Run) -> Finding | None:
    kl, clip = _largest(run, "policy/approx_kl"), _largest(run, "policy/clip_fraction")
    if kl is None or clip is None:
        return None
    detail = f"Largest KL of a step {fmt.number(kl[0])} nats, most tokens clipped {fmt.percent(clip[0])}."
    if kl[0] > MOST_KL or clip[0] > MOST_CLIPPED:
        bounds = f"Beyond {MOST_KL:g} nats or {fmt.percent(MOST_CLIPPED)} the surrogate says little."
        return Finding(Level.note, "Far off-policy", f"{detail} {bounds}")
    return Finding(Level.good, "Near on-policy", detail)


def _signal(run: Run) -> Finding | None:
    kept, left_out = _lately(run, "rollout/groups_kept"), _lately(run, "rollout/groups_filtered")
    if kept is None or left_out is None or kept + left_out == 0:
        return None
    share = kept / (kept + left_out)
    detail = f"Lately {fmt.percent(share)} of the groups had both right and wrong answers."
    if share < FEWEST_KEPT:
        return Finding(Level.note, "Little left to learn from", detail)
    return Finding(Level.good, "Learning signal", detail)


def _truncated(run: Run) -> Finding | None:
    share = _lately(run, "rollout/truncated")
    if share is None:
        return None
    detail = f"Lately {fmt.percent(share)} of the responses were cut at the length limit."
    if share > MOST_TRUNCATED:
        return Finding(Level.note, "Many responses are cut", f"{detail} Raise rollout.sampling.max_new_tokens?")
    return Finding(Level.good, "Response limit", detail)


def _entropy(run: Run) -> Finding | None:
    entropies = run.values("policy/entropy")
    if len(entropies) < 2 * _RECENT:
        return None
    before, now = median(entropies[:_RECENT]), median(entropies[-_RECENT:])
    detail = f"Token entropy went from {fmt.number(before)} to {fmt.number(now)} nats."
    if now < ENTROPY_LEFT * before:
        return Finding(Level.note, "Entropy collapsed", detail)
    return Finding(Level.good, "Entropy", detail)


def _diversity(run: Run) -> Finding | None:
    coverage = run.values("eval/coverage")
    if run.supervised or len(coverage) < 2:
        return None
    detail = f"Coverage of right answers went from {fmt.percent(coverage[0])} to {fmt.percent(coverage[-1])}."
    if coverage[-1] < DIVERSITY_LEFT * coverage[0]:
        return Finding(Level.note, "Answers lost diversity", detail)
    return Finding(Level.good, "Answer diversity", detail)


def _regress(run: Run) -> Finding | None:
    accuracy = run.values(f"eval/{ACCURACY}")
    if len(accuracy) < 2:
        return None
    detail = f"Best greedy accuracy {fmt.percent(max(accuracy))}, last {fmt.percent(accuracy[-1])}."
    if accuracy[-1] < max(accuracy) - ACCURACY_LOST:
        return Finding(Level.note, "Fell back from its best", detail)
    return Finding(Level.good, "Held its accuracy", detail)


_CHECKS: tuple[Callable[[Run], Finding | None], ...] = (
    _complete,
    _whole,
    _finite,
    _skipped,
    _gradients,
    _mismatch,
    _off_policy,
    _signal,
    _truncated,
    _entropy,
    _diversity,
    _regress,
)


def _largest(run: Run, key: str) -> tuple[float, int] | None:
    finite = [(y, x) for x, y in run.points("step", key) if y is not None]
    if not finite:
        return None
    value, step = max(finite, key=lambda pair: pair[0])
    return value, int(step)


def _lately(run: Run, key: str) -> float | None:
    values = run.values(key)[-_RECENT:]
    return sum(values) / len(values) if values else None


def _times(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"
