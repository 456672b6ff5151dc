"""Benchmarks that a run evaluates while it trains: implements `rl.interfaces.HeldOutSuites`.

Samples go to a results folder inside the run's, with one folder for each step, so that `python -m megatron_vp2o.evaluate
--report-only --out RUN/suites` makes the paper's tables and figures of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

from megatron_vp2o.config.names import SUITES_FOLDER
from megatron_vp2o.config.schema import TrainConfig
from megatron_vp2o.evaluation.benchmarks import chosen
from megatron_vp2o.evaluation.data import Questions, load
from megatron_vp2o.evaluation.engine_model import EngineModel
from megatron_vp2o.evaluation.grading import Grading
from megatron_vp2o.evaluation.model import named
from megatron_vp2o.evaluation.results import EXPECTED, Sample, path_of, read
from megatron_vp2o.evaluation.run import Part, Settings, evaluate, parts_of, samples_of
from megatron_vp2o.parallel.groups import Groups, first_rank_says
from megatron_vp2o.rl.interfaces import RolloutEngine, Tokenizer


def asked_during(config: TrainConfig) -> list[Questions]:
    """The questions of `evaluation.suites`. Call before anything is started.

    Raises:
        ConfigError: a name that is no benchmark.
        DataError: rows that are missing or damaged.
    """
    settings = config.evaluation.suite
    return [load(benchmark, settings.data, config.seed) for benchmark in chosen(config.evaluation.suites)]


@contextmanager
def opened(config: TrainConfig, asked: Sequence[Questions], rank: int) -> Iterator[Grading]:
    """Worker processes of all graders, on the first rank, which grades; they end with the context.

    Raises:
        RewardError: a sandbox or a library that a grader needs is missing.
    """
    with Grading(config.evaluation.suite.workers) as grading:
        for questions in asked if rank == 0 else ():
            grading.open(questions.benchmark.grader)
        yield grading


class _Together:
    """The ranks of a run, as `run.evaluate` takes them."""

    def __init__(self, groups: Groups) -> None:
        self.rank, self._groups = groups.rank, groups

    def first_says(self, value: Any) -> Any:
        return first_rank_says(value, self._groups.world)


class Suites:
    """See the module."""

    def __init__(
        self,
        config: TrainConfig,
        asked: Sequence[Questions],
        grading: Grading,
        *,
        engine: RolloutEngine,
        tokenizer: Tokenizer,
        groups: Groups,
    ) -> None:
        """
        Args:
            asked: what `asked_during` gave.
            grading: what `opened` gave.
            engine: generates with the learner's weights.

        Raises:
            ConfigError: a prompt that the tokenizer refuses or that leaves no room for its answer.
        """
        settings = config.evaluation.suite
        self._config, self._grading, self._groups = config, grading, groups
        self._engine, self._tokenizer = engine, tokenizer
        self._folder = Path(config.run_dir) / SUITES_FOLDER
        self._label = named(config.run_dir).label
        longest = settings.max_new_tokens or config.rollout.sampling.max_new_tokens
        self._settings = Settings(
            (longest,),
            settings.temperature,
            settings.top_p,
            config.seed,
            settings.samples,
            settings.limit,
            settings.batch,
        )
        self._parts = parts_of(asked, (longest,))
        for part in self._parts:
            self._model(0).check([question.prompt for question in self._settings.chosen(part.questions)], part.length)

    def due(self, step: int, *, final: bool) -> bool:
        """See `HeldOutSuites`."""
        evaluation = self._config.evaluation
        interval = evaluation.interval if evaluation.suite.interval is None else evaluation.suite.interval
        return step == 0 or final or (interval > 0 and step % interval == 0)

    def evaluate(self, step: int) -> dict[str, float]:
        """See `HeldOutSuites`. A step that a resumed run repeats is evaluated again: its weights may be others."""
        if self._groups.rank == 0:
            for part in self._parts:
                self._path(step, part).unlink(missing_ok=True)
                self._path(step, part).with_suffix(EXPECTED).unlink(missing_ok=True)
        with self._engine.at_learner_weights():
            total = samples_of(self._parts, self._settings)
            ranks = _Together(self._groups)
            evaluate([(self._model(step), self._parts)], total, self._settings, self._folder, self._grading, ranks)
        found = self._read(step) if self._groups.rank == 0 else None
        metrics: dict[str, float] = ranks.first_says(found)
        return metrics

    def _model(self, step: int) -> EngineModel:
        config = self._config
        return EngineModel(
            self._label,
            step,
            {"kind": "run", "precision": config.model.precision.value},
            engine=self._engine,
            groups=self._groups,
            tokenizer=self._tokenizer,
            room=config.model.max_sequence_length,
            thinking=config.evaluation.suite.thinking,
            where="evaluation.suites",
        )

    def _path(self, step: int, part: Part) -> Path:
        return path_of(self._folder, self._label, step, part.questions.benchmark.name, part.length)

    def _read(self, step: int) -> dict[str, float]:
        found: dict[str, float] = {}
        for part in self._parts:
            _, samples = read(self._path(step, part))
            found |= {f"suite/{part.questions.benchmark.name}/{key}": value for key, value in summary(samples).items()}
        return found


def summary(samples: Sequence[Sample]) -> dict[str, float]:
    """Share of right samples, tokens of solutions and share of truncated answers. Every problem has as many samples, so means
    over samples are means over problems."""
    return {
        "correct": fmean(sample.values["correct"] > 0 for sample in samples),
        "solution_tokens": fmean(sample.solution_tokens for sample in samples),
        "truncated": fmean(sample.truncated for sample in samples),
    }
