"""A function of the user's, named by `reward.path`: `package.module:function` or `file.py:function`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megatron_vp2o import own_code
from megatron_vp2o.errors import RewardError
from megatron_vp2o.rewards.grade import Grade, RowError, as_grade
from megatron_vp2o.rewards.graders.base import BatchGrader


class Own(BatchGrader):
    """Calls the function as `function(prompts=[...], responses=[...], rows=[...])`."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._function: Callable[..., Any] | None = None

    def prepare(self) -> None:
        self._function = load_function(self._path)
        prepare = getattr(self._function, "prepare", None)
        if callable(prepare):  # what it needs and is missing ends the run before anything is graded
            prepare()

    def grade_all(
        self, prompts: Sequence[str], responses: Sequence[str], rows: Sequence[Mapping[str, Any]]
    ) -> list[Grade | str]:
        assert self._function is not None
        returned = self._function(prompts=list(prompts), responses=list(responses), rows=list(rows))
        try:
            values = list(returned)
        except TypeError:
            raise RowError(f"{self._path} returned {returned!r:.60}, not a list with one result a response") from None
        if len(values) != len(responses):
            raise RowError(f"{self._path} returned {len(values)} results for {len(responses)} responses")
        return [_grade(value) for value in values]


def _grade(value: Any) -> Grade | str:
    try:
        return as_grade(value)
    except RowError as error:
        return str(error)


def load_function(path: str) -> Callable[..., Any]:
    """The function that `reward.path` names.

    Raises:
        RewardError: there is no such file, module or function, or its import raises; says which.
    """
    found: Callable[..., Any] = own_code.load("reward.path", path, "function", RewardError)
    return found
