"""What a metric is: key, unit, meaning, when it is measured, and how several of its values become one. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from megatron_vp2o.config.schema import Algorithm

ALL = frozenset(Algorithm)
REINFORCEMENT = ALL - {Algorithm.supervised}
SUPERVISED = frozenset({Algorithm.supervised})
VP2O = frozenset({Algorithm.vp2o})

LINE = "every line"
STEP = "every training step"
LEARNT = "training steps with a loss token"
EVALUATION = "evaluations"
END = "end of the run"
SUITES = "evaluations of evaluation.suites"
REGION = "training steps with a loss token of runs with a trust region"
MISMATCH = "training steps of runs that measure or correct it"
OVERLAP = "training steps of runs with rollout.ahead"
PACKING = "training steps of runs with algorithm.micro_batch_tokens and algorithm.prefix_sharing=on or auto"
REPLAY = "training steps with a loss token of runs with rollout.router_replay"
BUDGET = "training steps with a loss token of runs with a budget"
STEIN = "training steps with a token of runs with a Stein field, or that monitor one; means over layers"

FRACTION = "fraction"
TOKENS = "tokens"
NATS = "nats"
SECONDS = "s"
RATE = "tokens/s"
COUNT = "count"
NONE = "1"


class Aggregate(Enum):
    """How the values of several optimizer steps (and micro-batches, ranks) become one number of a training step."""

    mean = "mean"
    """Each optimizer step weighs the same."""
    token_mean = "token_mean"
    """Each weighs its loss tokens; steps without any do not count."""
    maximum = "maximum"
    """Also for totals that only grow."""


@dataclass(frozen=True)
class Metric:
    """One number of a line. A key with `{k}` stands for one key for each k of `evaluation.pass_at`, one with `{part}` for one
    for each summand of the reward, one with `{suite}` for one for each benchmark that is evaluated during training."""

    key: str
    unit: str  # "1" for what has none
    meaning: str
    when: str  # it is null on lines where it was not measured
    algorithms: frozenset[Algorithm] = ALL
    aggregate: Aggregate = Aggregate.mean

    def keys(self, pass_at: Sequence[int], parts: Sequence[str] = (), suites: Sequence[str] = ()) -> list[str]:
        """The key, or its expansions for `pass_at` in ascending order, for `parts` or for `suites`."""
        if "{suite}" in self.key:
            return [self.key.replace("{suite}", suite) for suite in suites]
        if "{part}" in self.key:
            return [self.key.replace("{part}", part) for part in parts]
        if "{k}" not in self.key:
            return [self.key]
        return [self.key.replace("{k}", str(k)) for k in sorted(set(pass_at))]


@dataclass(frozen=True)
class Section:
    """Metrics that are read together."""

    title: str
    metrics: tuple[Metric, ...]
