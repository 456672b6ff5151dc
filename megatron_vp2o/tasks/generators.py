"""reasoning-gym's generators of problems. Importing this takes seconds, so tasks do it when they are made.

Only generators and their metadata are used: reasoning-gym's scorers evaluate what a model wrote.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from itertools import count
from random import Random
from typing import Any

from megatron_vp2o.config.schema import CountdownTaskConfig, ShortestPathTaskConfig
from megatron_vp2o.tasks.problems import stream_seed


def _skip_init(package: str) -> None:
    """Let modules of a package be imported without running its `__init__`, unless that has run already.

    reasoning-gym's imports a hundred tasks: a second and a half, matplotlib, and pycosat, which has no wheel and which
    the installer leaves out where there is no C compiler.
    """
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)
    sys.modules.setdefault(package, importlib.util.module_from_spec(spec))


_skip_init("reasoning_gym")

from reasoning_gym.games.countdown import CountdownConfig, CountdownDataset  # noqa: E402
from reasoning_gym.graphs.shortest_path import ShortestPathConfig, ShortestPathDataset  # noqa: E402


class _Total(int):
    """An intermediate result that answers to the one sympy method the generator calls."""

    def subs(self, _: object) -> _Total:
        return self


class IntegerCountdown(CountdownDataset):
    """reasoning-gym's countdown, item for item, with integers where it uses symbolic algebra: 40 times as fast.

    It makes the same draws from `rng` in the same order (a test compares the two streams).  Only the sample expression
    is left out of the metadata.  Every partial result is an integer, because it divides only where nothing remains.
    """

    def _generate_candidate_expression(self, rng: Random, num_terms: int) -> tuple[Any, list[int], tuple[()], str]:
        numbers = [rng.randint(self.config.min_value, self.config.max_value) for _ in range(num_terms)]
        total = numbers[0]
        for i in range(1, num_terms):
            match rng.choice(self.config.operators):
                case "+":
                    total += numbers[i]
                case "*":
                    total *= numbers[i]
                case "/":
                    divisors = numbers[i:]
                    rng.shuffle(divisors)
                    divisor = next((d for d in divisors if total % d == 0), None)
                    if divisor is None:
                        total -= numbers[i]
                    else:
                        numbers[i] = divisor
                        total //= divisor
                case _:
                    total -= numbers[i]
        return _Total(total), numbers, (), ""


def countdown(config: CountdownTaskConfig) -> Iterator[tuple[list[int], int] | None]:
    """Endless (numbers in the order to show, target); None where the generator found no target within its bounds."""
    dataset = IntegerCountdown(
        CountdownConfig(
            min_numbers=config.numbers,
            max_numbers=config.numbers,
            min_value=config.min_number,
            max_value=config.max_number,
            min_target=config.min_target,
            max_target=config.max_target,
            seed=stream_seed("countdown", config.seed),
        )
    )
    for i in count():
        try:
            metadata = dataset[i]["metadata"]
        except ValueError:  # reasoning-gym's: a hundred attempts missed the target's bounds
            yield None
        else:
            yield metadata["numbers"], metadata["target"]


def shortest_path(config: ShortestPathTaskConfig) -> Iterator[list[list[str]] | None]:
    """Endless grids of '*' start, '#' goal, 'O' open, 'X' blocked; None where no path leads to the goal."""
    dataset = ShortestPathDataset(
        ShortestPathConfig(
            min_rows=config.rows,
            max_rows=config.rows,
            min_cols=config.columns,
            max_cols=config.columns,
            p_blocked=config.blocked_probability,
            seed=stream_seed("shortest_path", config.seed),
        )
    )
    for i in count():
        metadata = dataset[i]["metadata"]
        yield metadata["matrix"] if metadata["solution"] else None
