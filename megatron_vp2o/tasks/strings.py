"""What tasks share whose answer is one short string of characters."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

from megatron_vp2o.config.schema import (
    AnswerFormat,
    BracketsTaskConfig,
    ChangeTaskConfig,
    ColoringTaskConfig,
    LinearOrderTaskConfig,
)
from megatron_vp2o.config.validate_task import check_task
from megatron_vp2o.rl.types import Problem, Verdict
from megatron_vp2o.tasks.answers import Unfinished, extract
from megatron_vp2o.tasks.problems import Draw, PooledTask, collect

StringTaskConfig = BracketsTaskConfig | ChangeTaskConfig | ColoringTaskConfig | LinearOrderTaskConfig


class StringTask(PooledTask):
    """A task of such answers. A subclass draws the problems, judges a string, counts and demonstrates right ones."""

    between: ClassVar[str] = r"[\s,]+"
    """What a lenient answer may have between its characters, as a regular expression."""

    def __init__(self, config: StringTaskConfig, draws: Iterator[Draw | None], *, progress: bool) -> None:
        """
        Args:
            draws: not begun.

        Raises:
            ConfigError: settings that contradict each other, or give no problem or too few.
        """
        check_task(config)
        super().__init__(config.name, collect(draws, config, progress=progress), config.tokenizer)
        self.form = config.answer_format

    def verify(self, problem: Problem, response: str) -> Verdict:
        """Exact, in bounded time, for any text."""
        try:
            answer = extract(response, self.form)
        except Unfinished:
            return Verdict(False, None, "unfinished")
        if self.form is AnswerFormat.lenient:
            answer = re.sub(self.between, "", answer)
        return self._judge(problem.data, answer)

    @abstractmethod
    def _judge(self, data: Any, answer: str) -> Verdict:
        """Is this string right?"""
