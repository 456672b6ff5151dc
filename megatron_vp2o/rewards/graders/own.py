"""A function of the user's, named by `reward.path`: `package.module:function` or `file.py:function`."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

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
    place, _, name = path.rpartition(":")
    module = _from_file(path, place) if place.endswith(".py") else _from_name(path, place)
    found = getattr(module, name, None)
    if not callable(found):
        names = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise RewardError(
            f"reward.path={path}: {place} has no function {name}; it has {', '.join(names[:8]) or 'none'}"
        )
    return found


def _from_file(path: str, file: str) -> Any:
    if not Path(file).is_file():
        raise RewardError(f"reward.path={path}: there is no file {Path(file).absolute()}")
    name = f"vp2o_reward_{Path(file).stem}"
    specification = importlib.util.spec_from_file_location(name, file)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module  # dataclasses and pickle look a class's module up
    try:
        specification.loader.exec_module(module)
    except Exception as error:
        raise RewardError(f"reward.path={path}: importing it raises {type(error).__name__}: {error}") from error
    return module


def _from_name(path: str, name: str) -> Any:
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise RewardError(f"reward.path={path}: importing {name} raises {type(error).__name__}: {error}") from error
