"""Which charts a report has: metrics, in the order in which they are read, over samples, steps or time."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_vp2o.report.health import mismatch_bound
from megatron_vp2o.report.svg import Axis, Chart, Series
from megatron_vp2o.tracking import format as fmt
from megatron_vp2o.tracking.metric import COUNT, FRACTION, NONE
from megatron_vp2o.tracking.runs import ACCURACY, Run
from megatron_vp2o.tracking.schema import SECTIONS, find_metric

# Okabe and Ito's palette: told apart with every common colour vision, dark enough on white.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#b3548f", "#8a6d00", "#3f9fd8", "#555555")
_DASHES = ("", "7 4", "2 3", "10 3 2 3")

SAMPLES = "samples"
STEP = "step"
ELAPSED = "time/elapsed_s"


@dataclass(frozen=True)
class Spec:
    """A chart of one metric. `exact`: no noise to smooth away (a schedule, a count)."""

    key: str
    title: str
    log: bool = False
    zero: bool = True
    exact: bool = False


ACCURACY_CHART = Spec(f"eval/{ACCURACY}", "Greedy accuracy")
DIVERSITY = (
    Spec("eval/distinct", "Distinct right answers"),
    Spec("eval/coverage", "Coverage of right answers"),
    Spec("eval/answer_entropy", "Answer entropy"),
)
TRAINING = (
    Spec("reward/mean", "Mean reward"),
    Spec("rollout/pass_any", "Groups solved"),
    Spec("rollout/groups_kept", "Groups with a learning signal"),
    Spec("rollout/distinct", "Distinct right answers in rollouts"),
    Spec("rollout/response_length", "Response length in rollouts", zero=False),
    Spec("eval/response_length", "Response length in evaluations", zero=False),
    Spec("eval/solution_length", "Length of right answers", zero=False),
    Spec("rollout/truncated", "Truncated responses"),
    Spec("policy/entropy", "Token entropy"),
    Spec("policy/approx_kl", "KL of a step"),
    Spec("policy/kl_reference", "KL to the reference"),
    Spec("policy/clip_fraction", "Clipped tokens"),
    Spec("policy/ratio_max", "Largest importance ratio", log=True),
    Spec("policy/loss", "Loss", zero=False),
    Spec("policy/logprob_mismatch", "Log-probability mismatch", log=True),
    Spec("optimizer/grad_norm", "Gradient norm", log=True),
    Spec("optimizer/lr", "Learning rate", exact=True),
    Spec("moe/load_balancing_loss", "Load-balancing loss", zero=False),
    Spec("moe/z_loss", "Router z-loss", zero=False),
    Spec("actor/age", "Actor age", exact=True),
    Spec("actor/refreshes", "Actor refreshes", exact=True),
)
EXPERTS = (
    Spec("moe/router_entropy", "Router entropy", zero=False),
    Spec("moe/effective_experts", "Evenness of the load"),
    Spec("moe/load_violation", "Load violation"),
    Spec("moe/output_overlap", "Overlap of expert outputs"),
    Spec("stein/prototype_overlap", "Overlap of prototypes"),
    Spec("stein/prototype_rank", "Effective rank of prototypes", zero=False),
    Spec("stein/self_weight", "Weight of the own gradient", zero=False),
    Spec("stein/repulsion_ratio", "Repulsion over attraction"),
    Spec("trust_region/distance", "Distance of barycenters"),
    Spec("trust_region/distance_gates", "Its part from routers"),
    Spec("trust_region/distance_prototypes", "Its part from prototypes"),
    Spec("trust_region/policy_drift", "Drift of the policy after the step"),
    Spec("trust_region/rejected", "Rejected steps", exact=True),
    Spec("budget/drift", "Drift"),
    Spec("budget/ess", "Effective sample size", zero=False),
)
WARM_UP = (
    Spec("supervised/loss", "Training loss", zero=False),
    Spec("supervised/validation_loss", "Validation loss", zero=False),
    ACCURACY_CHART,
    Spec("eval/coverage", "Coverage of right answers"),
    Spec("optimizer/grad_norm", "Gradient norm", log=True),
    Spec("optimizer/lr", "Learning rate", exact=True),
    Spec("moe/load_balancing_loss", "Load-balancing loss", zero=False),
)
SPEED = (
    Spec("time/step_s", "Time of a step"),
    Spec("time/tokens_per_s", "Training speed"),
    Spec("time/rollout_tokens_per_s", "Rollout speed"),
)
# Shown otherwise (tables, time bars), or said by another chart.
_NOT_DRAWN = {"step", "samples", "tokens", "reward/std", "rollout/pass_rate", "rollout/groups_filtered"}
_NOT_DRAWN |= {"optimizer/steps", "optimizer/skipped", "actor/version"}


class Palette:
    """Colour and dash of each run of a report, and the short name of its legend entries."""

    def __init__(self, runs: Sequence[Run], names: Sequence[str]) -> None:
        self._style = {
            id(run): (name, _COLOURS[i % len(_COLOURS)], _DASHES[i // len(_COLOURS) % len(_DASHES)])
            for i, (run, name) in enumerate(zip(runs, names, strict=True))
        }

    def name(self, run: Run) -> str:
        return self._style[id(run)][0]

    def colour(self, run: Run) -> str:
        return self._style[id(run)][1]

    def series(self, run: Run, x: str, spec: Spec) -> Series:
        name, colour, dash = self._style[id(run)]
        noisy = not spec.exact and not spec.key.startswith("eval/")
        return Series(name, colour, run.points(x, spec.key), dash, noisy)


def x_axis(x: str, runs: Sequence[Run]) -> Axis:
    """The axis of samples, steps, or time in the unit that suits the longest run."""
    if x == SAMPLES:
        return Axis("training samples", whole=True)
    if x == STEP:
        return Axis("training step", whole=True)
    longest = max((run.last(ELAPSED) or 0.0) for run in runs)
    unit, seconds = ("s", 1) if longest < 300 else ("min", 60) if longest < 3 * 3600 else ("h", 3600)
    return Axis(f"time ({unit})", scale=1 / seconds)


def chart(spec: Spec, x: str, runs: Sequence[Run], palette: Palette) -> Chart:
    """The chart of one metric with a line for each run."""
    metric = find_metric(spec.key)
    unit = metric.unit if metric is not None else NONE
    name = spec.title[0].lower() + spec.title[1:] if not spec.title.startswith("KL") else spec.title
    note = _sentence(metric.meaning if metric is not None else spec.key)
    if k := re.search(r"@(\d+)$", spec.key):
        note = note.replace("one of k samples", "a sample" if k.group(1) == "1" else f"one of {k.group(1)} samples")
    threshold = None
    if spec.key == "policy/logprob_mismatch":
        bound = max(mismatch_bound(run) for run in runs)
        threshold = (bound, f"bound {fmt.number(bound)}")
    return Chart(
        title=spec.title,
        note=note,
        x=x_axis(x, runs),
        y=Axis(
            name if unit in (FRACTION, NONE, COUNT) else f"{name} ({unit})",
            percent=unit == FRACTION,
            whole=all(value.is_integer() for run in runs for value in run.values(spec.key)),
            log=spec.log,
            zero=spec.zero,
        ),
        series=[palette.series(run, x, spec) for run in runs if run.has(spec.key)],
        threshold=threshold,
    )


def pass_at_specs(runs: Sequence[Run]) -> list[Spec]:
    """A chart for every k that a run evaluated."""
    keys = {key for run in runs for key in run.columns if re.fullmatch(r"eval/pass@\d+", key)}
    return [Spec(key, key.removeprefix("eval/")) for key in sorted(keys, key=lambda key: int(key.split("@")[1]))]


def further_specs(runs: Sequence[Run], drawn: Sequence[Spec]) -> list[Spec]:
    """Charts of what the record holds beyond those, registered or not: new metrics show up by themselves."""
    known = {spec.key for spec in drawn} | _NOT_DRAWN
    order = [metric.key for section in SECTIONS for metric in section.metrics]
    keys = {key for run in runs for key in run.columns if run.has(key)} - known
    keys = {key for key in keys if not key.startswith(("time/", "eval/", "test/"))}
    ranked = sorted(keys, key=lambda key: (order.index(key) if key in order else len(order), key))
    return [Spec(key, key, zero=False) for key in ranked]


def _sentence(text: str) -> str:
    text = text.replace("`", "")
    return f"{text[0].upper()}{text[1:]}."
