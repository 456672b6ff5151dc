"""Open path: a shortest way from the top left to the bottom right corner of a grid with few blocked cells.

Prompts and answers are those of `shortest_path`; only grids with many right answers are taken. In an open grid of r rows and c
columns there are (r + c - 2)! / (r - 1)! / (c - 1)! of them: 70 in a 5x5 grid.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from megatron_vp2o.config.schema import OpenPathTaskConfig
from megatron_vp2o.config.validate_task import check_task
from megatron_vp2o.tasks.problems import Draw, PooledTask, collect, stream_seed
from megatron_vp2o.tasks.shortest_path import ShortestPathTask, ways_to_goal


class OpenPathTask(ShortestPathTask):
    """`ShortestPathTask` with another generator of grids."""

    def __init__(self, config: OpenPathTaskConfig, *, progress: bool = False) -> None:
        check_task(config)
        PooledTask.__init__(self, "open_path", collect(_draws(config), config, progress=progress), config.tokenizer)
        self.form = config.answer_format


def _draws(config: OpenPathTaskConfig) -> Iterator[Draw | None]:
    random = Random(stream_seed("open_path", config.seed))
    while True:
        cells = [
            "#" if random.random() < config.blocked_probability else "." for _ in range(config.rows * config.columns)
        ]
        cells[0], cells[-1] = "S", "G"
        grid = tuple("".join(cells[r * config.columns : (r + 1) * config.columns]) for r in range(config.rows))
        ways = ways_to_goal(grid)
        text = "|".join(grid)
        many = (0, 0) in ways and ways[0, 0][1] >= config.min_answers
        yield Draw(f"shortest_path {text}", f"{text}:", grid) if many else None
