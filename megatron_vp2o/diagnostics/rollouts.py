"""Recorded rollouts: how many answers are right, how many of these differ, and how far the two engines disagree.

A file has one JSON object a line, in either of two forms:

    {"step": 3, "problem": "p1", "responses": [{"text": ..., "answer": ..., "correct": true, "logprobs": [...]}, ...]}
    {"step": 3, "input": "p1", "output": ..., "score": 1.0}

The first is `samples.jsonl` of this project's runs, the second what verl writes to `trainer.rollout_data_dir`, one response a
line; those with the same step and prompt are a group.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_vp2o.core.evaluation import answer_entropy, coverage, pass_at_k
from megatron_vp2o.core.prior import k3
from megatron_vp2o.errors import ConfigError, DataError

NAMES: dict[str, tuple[str, ...]] = {
    "step": ("step",),
    "prompt": ("problem", "uid", "input", "prompt"),
    "answer": ("answer", "canonical", "pred", "acc_answer"),
    "text": ("text", "output", "response"),
    "correct": ("correct", "is_correct"),
    "score": ("score", "reward"),
    "logprobs": ("logprobs", "log_probs", "old_log_probs"),
    "rollout_logprobs": ("rollout_logprobs", "rollout_log_probs"),
    "solutions": ("solutions", "n_solutions"),
}
"""What a field may be called; the first that a line has is taken. `read_rollouts(names=...)` puts further ones in front."""


@dataclass(frozen=True)
class Response:
    """One response of a group."""

    answer: str
    """What tells two answers apart: the line's canonical answer, else its text without the white space around it."""
    right: bool
    logprobs: tuple[float, ...] | None = None
    """Log-probability of each token under the learner that recomputed it."""
    rollout_logprobs: tuple[float, ...] | None = None
    """Log-probability of each token under the engine that drew it."""


@dataclass(frozen=True)
class Group:
    """The responses to one prompt at one step."""

    step: int
    prompt: str
    responses: tuple[Response, ...] = ()
    solutions: int | None = None
    """Distinct right answers that the prompt has, where the file says so."""


@dataclass
class _Open:
    """A group while its lines come in."""

    responses: list[Response] = field(default_factory=list)
    solutions: int | None = None


def read_rollouts(path: str | Path, *, right_from: float = 1.0, names: Mapping[str, str] | None = None) -> list[Group]:
    """The groups of a file, in the order in which they begin.

    Args:
        path: a JSONL file. A last line that is torn, as a killed run leaves it, is left out.
        right_from: a response that says no `correct` is right from this score on.
        names: {field of `NAMES`: what this file calls it}.

    Raises:
        ConfigError: for an unknown name of a field.
        DataError: naming file, line and field, for a line that cannot be read; and for a file without a response.
    """
    unknown = set(names or {}) - NAMES.keys()
    if unknown:
        raise ConfigError(f"unknown field {sorted(unknown)[0]!r}: choose from {', '.join(NAMES)}")
    if not math.isfinite(right_from):
        raise ConfigError(f"right_from={right_from} must be a finite number")
    known = {key: ((names[key],) if names and key in names else ()) + found for key, found in NAMES.items()}
    path = Path(path)
    found: dict[tuple[int, str], _Open] = {}
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            if number == len(lines):
                break  # torn: it has no end of line
            raise DataError(f"{where}: not JSON ({error})") from None
        if not isinstance(row, dict):
            raise DataError(f"{where}: {type(row).__name__}, expected an object with named fields")
        _add(found, row, known, right_from, where)
    groups = [
        Group(step, prompt, tuple(group.responses), group.solutions)
        for (step, prompt), group in found.items()
        if group.responses
    ]
    if not groups:
        raise DataError(f"{path} has no whole line with a response")
    for one in groups:
        distinct = len({response.answer for response in one.responses if response.right})
        if one.solutions is not None and distinct > one.solutions:
            raise DataError(
                f"{path}: step {one.step}, prompt {_short(one.prompt)}: {distinct} different right answers, and the file says that "
                f"there are {one.solutions}; give canonical answers, or leave the number out"
            )
    return groups


def rollout_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Means over groups, under the names of docs/metrics.md; what the file does not say is left out.

    `rollout/pass_rate`, `rollout/pass_any`, `rollout/pass@k` for k = 2, 4, ... up to the smallest group, `rollout/distinct`
    (distinct right answers in a group), `rollout/coverage` (of all that the prompt has), `rollout/answer_entropy` (nats, over
    the groups with a right answer), `policy/logprob_mismatch` (largest |learner - engine| log-probability of a token),
    `policy/logprob_mismatch_mean` and `policy/mismatch_kl` (KL(engine || learner) of a token, k3 estimate).
    """
    if not groups:
        return {}
    right = [sum(response.right for response in group.responses) for group in groups]
    sizes = [len(group.responses) for group in groups]
    counts = [Counter(r.answer for r in group.responses if r.right) for group in groups]
    metrics = {
        "rollout/pass_rate": sum(right) / sum(sizes),
        "rollout/pass_any": _mean(float(count > 0) for count in right),
        "rollout/distinct": _mean(float(len(count)) for count in counts),
    }
    k = 2
    while k <= min(sizes):
        metrics[f"rollout/pass@{k}"] = _mean(pass_at_k(n, c, k) for n, c in zip(sizes, right, strict=True))
        k *= 2
    entropies = [entropy for count in counts if (entropy := answer_entropy(count)) is not None]
    if entropies:
        metrics["rollout/answer_entropy"] = _mean(entropies)
    covered = [
        coverage(len(count), group.solutions)
        for group, count in zip(groups, counts, strict=True)
        if group.solutions is not None
    ]
    if covered:
        metrics["rollout/coverage"] = _mean(covered)
    return metrics | _mismatch(groups)


def metrics_by_step(groups: Sequence[Group]) -> dict[int, dict[str, float]]:
    """`rollout_metrics` of each step's groups, steps ascending."""
    found: dict[int, list[Group]] = {}
    for group in groups:
        found.setdefault(group.step, []).append(group)
    return {step: rollout_metrics(found[step]) for step in sorted(found)}


def _mismatch(groups: Sequence[Group]) -> dict[str, float]:
    pairs = [
        (torch.tensor(r.logprobs, dtype=torch.float64), torch.tensor(r.rollout_logprobs, dtype=torch.float64))
        for group in groups
        for r in group.responses
        if r.logprobs is not None and r.rollout_logprobs is not None
    ]
    if not pairs:
        return {}
    learner_T, engine_T = torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs])
    if not len(learner_T):
        return {}
    difference_T = learner_T - engine_T
    return {
        "policy/logprob_mismatch": difference_T.abs().max().item(),
        "policy/logprob_mismatch_mean": difference_T.abs().mean().item(),
        "policy/mismatch_kl": k3(difference_T).mean().item(),
    }


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


def _add(
    found: dict[tuple[int, str], _Open],
    row: dict[str, Any],
    known: Mapping[str, Sequence[str]],
    right_from: float,
    where: str,
) -> None:
    """One line: a whole group, or one response of one."""
    step, prompt = _take(row, known["step"], 0), _take(row, known["prompt"], None)
    if prompt is None:
        raise DataError(f"{where}: no prompt to group by; it may be called {', '.join(known['prompt'])}")
    if not isinstance(step, int) or isinstance(step, bool):
        raise DataError(f"{where}: step is {_short(step)}, expected a whole number")
    group = found.setdefault((step, str(prompt)), _Open())
    solutions = _take(row, known["solutions"], None)
    if solutions is not None:
        if not isinstance(solutions, int) or isinstance(solutions, bool) or solutions < 1:
            raise DataError(f"{where}: solutions is {_short(solutions)}, expected a whole number from 1 on")
        group.solutions = solutions
    nested = row.get("responses")
    if nested is not None and not isinstance(nested, list):
        raise DataError(f"{where}: responses is {type(nested).__name__}, expected a list of objects")
    for response in [row] if nested is None else nested:
        if not isinstance(response, dict):
            raise DataError(f"{where}: a response is {type(response).__name__}, expected an object")
        group.responses.append(_response(response, known, right_from, where))


def _response(row: dict[str, Any], known: Mapping[str, Sequence[str]], right_from: float, where: str) -> Response:
    answer, text = _take(row, known["answer"], None), _take(row, known["text"], None)
    if answer is None and text is None:
        wanted = ", ".join((*known["answer"], *known["text"]))
        raise DataError(f"{where}: a response with neither answer nor text; they may be called {wanted}")
    right = _take(row, known["correct"], None)
    if right is None:
        score = _take(row, known["score"], None)
        if score is None:
            wanted = ", ".join((*known["correct"], *known["score"]))
            raise DataError(f"{where}: nothing says whether a response is right; it may be called {wanted}")
        if not isinstance(score, (int, float)) or not _finite(score):
            raise DataError(f"{where}: the score is {_short(score)}, expected a finite number")
        right = score >= right_from
    elif not isinstance(right, (int, float)) or right not in (0, 1):
        raise DataError(f"{where}: correct is {_short(right)}, expected true or false")
    learner, engine = (_numbers(row, known[name], name, where) for name in ("logprobs", "rollout_logprobs"))
    if learner is not None and engine is not None and len(learner) != len(engine):
        raise DataError(f"{where}: {len(learner)} logprobs and {len(engine)} rollout_logprobs of one response")
    return Response(str(answer if answer is not None else text).strip(), bool(right), learner, engine)


def _numbers(row: dict[str, Any], names: Sequence[str], what: str, where: str) -> tuple[float, ...] | None:
    values = _take(row, names, None)
    if values is None:
        return None
    if not isinstance(values, list) or not all(isinstance(value, (int, float)) for value in values):
        raise DataError(f"{where}: {what} is not a list of numbers")
    if not all(map(_finite, values)):
        raise DataError(f"{where}: {what} has a number that is not finite")
    return tuple(float(value) for value in values)


def _finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # JSON's whole numbers have no bound
        return False


def _short(value: Any) -> str:
    """For a message: in one line that is not long."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _take(row: Mapping[str, Any], names: Sequence[str], default: Any) -> Any:
    return next((row[name] for name in names if row.get(name) is not None), default)
