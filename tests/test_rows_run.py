"""Whole runs on rows: warm-up, reinforcement with a reward, samples, and going on with another batch size or other rows."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest

from megatron_vp2o.config.compose import compose
from megatron_vp2o.rl.batching import PromptSchedule
from megatron_vp2o.tasks import make_task
from megatron_vp2o.tracking.samples import read_samples
from tests.data.row_files import plain_rows, write
from tests.resume_draws import SMALL, record
from tests.resume_job import Run, run_in_one_process
from tests.tasks.chat_tokenizers import chatml_folder

REFUSED = 2


@pytest.mark.slow
def test_runs_on_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", plain_rows(Random(0), 30))
    tiny = [setting for setting in SMALL if not setting.startswith(("task.train_size", "task.test_size"))]
    rows = [
        "task=rows",
        "reward=length",
        "reward.length.zero_words=3",
        "reward.length.full_words=1",
        f"task.path={path}",
        f"task.tokenizer={chatml_folder(tmp_path / 'tokenizer')}",
        "task.test_size=0",
        "evaluation.interval=0",
        "model.max_sequence_length=160",
        "model.moe_router_topk=2",
    ]
    warm = [
        "--config-name=train",
        "algorithm=supervised",
        *tiny,
        *rows,
        "algorithm.global_batch_size=8",
        "algorithm.steps=2",
    ]
    grpo = [
        *["--config-name=train", *tiny, *rows, "algorithm.group_size=2", "algorithm.filter_uniform_groups=false"],
        *["logging.sample_interval=1", "logging.sample_prompts=50", "checkpoint.interval=1"],
    ]
    two = [*grpo, "algorithm.prompts_per_step=4", "algorithm.steps=2"]
    five = [*grpo, "algorithm.prompts_per_step=6", "algorithm.steps=5"]

    def do(name: str, *runs: tuple[str, list[str]]) -> tuple[list[int], list[str]]:
        folder = tmp_path / name
        statuses = run_in_one_process(folder, [Run(str(tmp_path / run), given) for run, given in runs])
        said = [(folder / f"output-{number}.txt").read_text() for number in range(len(runs))]
        return [status for (status,) in statuses], said

    statuses, said = do("first", ("warm", warm), ("grpo", two), ("grpo", five))
    assert statuses == [0, 0, 0], said
    assert record(tmp_path / "warm")[-1]["supervised/loss"] > 0

    # 2 steps of 4 prompts, then 3 of 6: one order of prompts, none twice, none left out.
    config = compose("train", [*(given for given in five[1:])])
    task = make_task(config.task, room=152)
    reference, _ = PromptSchedule(task, per_step=26, seed=config.seed, dp_rank=0, dp_size=1)(0)
    seen: list[Any] = read_samples(tmp_path / "grpo" / "samples.jsonl")
    assert [sample["step"] for sample in seen] == [1] * 4 + [2] * 4 + [3] * 6 + [4] * 6 + [5] * 6
    assert [sample["prompt"] for sample in seen] == [problem.prompt for problem in reference]
    lines = record(tmp_path / "grpo")
    earned = [response["reward"] for sample in seen if sample["step"] == 5 for response in sample["responses"]]
    assert len(earned) == 12 and lines[-1]["reward/mean"] == pytest.approx(sum(earned) / 12)
    report = json.loads((tmp_path / "grpo" / "rows.json").read_text())
    assert report["counts"]["training"] == 26 and report["files"][0]["rows"] == 30

    # Other rows are refused, wherever they lie; the same ones elsewhere are not.
    before = (tmp_path / "grpo" / "metrics.jsonl").read_bytes()
    other = write(tmp_path / "other.jsonl", plain_rows(Random(1), 30))
    copy = tmp_path / "elsewhere" / "copy.jsonl"
    copy.parent.mkdir()
    copy.write_bytes(path.read_bytes())
    more = [setting for setting in five if not setting.startswith(("task.path", "algorithm.steps"))] + [
        "algorithm.steps=6"
    ]
    statuses, said = do("second", ("grpo", [*more, f"task.path={other}"]))
    assert statuses == [REFUSED] and "rows" in said[0] and "Traceback" not in said[0], said
    assert (tmp_path / "grpo" / "metrics.jsonl").read_bytes() == before
    statuses, said = do("third", ("grpo", [*more, f"task.path={copy}"]))
    assert statuses == [0] and len(record(tmp_path / "grpo")) == 7, said
