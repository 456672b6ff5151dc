"""Tasks of rows in files, as the tests beside this make them."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_vp2o.config.rows import RowsTaskConfig
from megatron_vp2o.rl.types import Split
from megatron_vp2o.tasks import make_task
from megatron_vp2o.tasks.rows import RowsTask
from tests.data.row_files import Row
from tests.tasks.chat_tokenizers import chatml_folder
from tests.tasks.exact_reward import Exact

FORMATS = ("jsonl", "jsonl.gz", "parquet")
NONE_HELD_OUT: dict[str, Any] = {"validation_size": 1, "test_size": 0}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(chatml_folder(tmp_path_factory.mktemp("tokenizer")))


def make(path: Any, tokenizer: str, **settings: Any) -> RowsTask:
    task = make_task(RowsTaskConfig(path=path, tokenizer=tokenizer, **(NONE_HELD_OUT | settings)), reward=Exact())
    assert isinstance(task, RowsTask)
    return task


def of_task(task: RowsTask, split: Split, epoch: int = 0) -> list[Row]:
    return [task.problem(split, i, variant=epoch).data for i in range(task.size(split))]
