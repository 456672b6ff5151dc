"""A run that was ended, however and whenever, goes on as if nothing had happened: whole runs of the command line."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests import small_run
from tests.resume_draws import last_checkpoint, movement, record
from tests.resume_job import Run, outputs
from tests.resume_job import run_in_one_process as do

PREEMPTED, REFUSED, KILLED = 75, 2, -9
STEPS = 7

SMALL = [*small_run.SMALL, "evaluation.interval=3", f"algorithm.steps={STEPS}"]
RECIPES = {
    "supervised": [
        "--config-name=countdown_tiny_supervised",
        *SMALL,
        "algorithm.global_batch_size=8",
        "algorithm.micro_batch_size=4",
    ],
    # A model that knows nothing earns no reward; entropy and the distance from the reference give it gradients.
    "grpo": [
        "--config-name=countdown_tiny_grpo",
        *SMALL,
        "init_from=null",
        "algorithm.prompts_per_step=4",
        "algorithm.group_size=4",
        "algorithm.minibatches=2",
        "algorithm.filter_uniform_groups=false",
        "algorithm.entropy_coef=0.1",
        "algorithm.kl_coef=0.1",
        "algorithm.kl_reference=initial",
        "rollout.refresh_interval=3",
        "rollout.router_replay=R3",
    ],
}
EP = ["parallel.expert_parallel=2"]


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", RECIPES)
def test_an_ended_run_goes_on_as_if_nothing_had_happened(tmp_path: Path, algorithm: str) -> None:
    arguments = RECIPES[algorithm]
    whole, killed, asked = (tmp_path / name for name in ("whole", "killed", "asked"))
    runs = [
        Run(str(whole), arguments),
        Run(str(killed), arguments, end="SIGKILL", after_step=0),  # before there is a checkpoint
        Run(str(killed), arguments, end="SIGKILL", after_step=3),
        Run(str(killed), arguments, end="SIGKILL", saving_step=4),
        Run(str(killed), arguments, end="SIGKILL", after_step=4),
        Run(str(killed), arguments, end="SIGKILL", saving_step=6),
        Run(str(killed), arguments),
        Run(str(asked), arguments, end="SIGTERM", after_step=1),
        Run(str(asked), arguments, end="SIGUSR1", after_step=4),
        Run(str(asked), arguments),
        Run(str(asked), arguments),  # nothing is left to do
    ]
    statuses = [status for (status,) in do(tmp_path, runs)]
    assert statuses == [0, *[KILLED] * 5, 0, PREEMPTED, PREEMPTED, 0, 0], outputs(tmp_path)
    expected = record(whole)
    assert [line["step"] for line in expected] == list(range(STEPS + 1))
    assert last_checkpoint(whole)["name"] == f"step_{STEPS:06d}"
    for other in (killed, asked):
        assert record(other) == expected
        assert last_checkpoint(other) == last_checkpoint(whole)
    norms = [line["optimizer/grad_norm"] for line in expected[1:]]
    assert all(norm > 1e-3 for norm in norms)  # it did train
    assert movement(whole)["moved"] > 1e-6
    if algorithm == "grpo":  # with actors of other weights than the learner's: the router would have chosen others
        assert all(0.5 < line["replay/tokens"] < 1 for line in expected[1:])
        assert min(line["replay/agreement"] for line in expected[1:]) < 1


@pytest.mark.slow
@pytest.mark.distributed
def test_killing_one_rank_of_two(tmp_path: Path) -> None:
    arguments = RECIPES["grpo"] + EP
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    runs = [
        Run(str(whole), arguments, ranks=2),
        Run(str(killed), arguments, ranks=2, end="SIGKILL", rank=1, after_step=3),
        Run(str(killed), arguments, ranks=2, end="SIGKILL", rank=0, saving_step=4),
        Run(str(killed), arguments, ranks=2, end="SIGTERM", rank=1, after_step=5),  # the others stop with it
        Run(str(killed), arguments, ranks=2),
    ]
    first, second, third, fourth, last = do(tmp_path, runs)
    assert first == last == [0, 0], outputs(tmp_path)
    assert second[1] == KILLED and second[0] != 0
    assert third[0] == KILLED and third[1] != 0
    assert fourth == [PREEMPTED, PREEMPTED]
    assert record(killed) == record(whole)
    assert last_checkpoint(killed) == last_checkpoint(whole)


@pytest.mark.slow
@pytest.mark.distributed
def test_another_layout_evaluates_alike_and_damage_is_refused(tmp_path: Path) -> None:
    arguments = RECIPES["supervised"]
    source, damaged = tmp_path / "source", tmp_path / "damaged"
    layouts = {
        "one": (1, []),
        "ep2": (2, EP),
        "pp2": (2, ["parallel.pipeline_parallel=2"]),
        "tp2_ep2": (4, ["parallel.tensor_parallel=2", *EP]),
    }
    evaluate = [*arguments, f"init_from={source}", "algorithm.steps=1", "optimizer.lr_warmup_steps=0"]
    runs = [Run(str(source), arguments)] + [
        Run(str(tmp_path / name), evaluate + extra, ranks=ranks) for name, (ranks, extra) in layouts.items()
    ]
    assert do(tmp_path, runs) == [[0] * run.ranks for run in runs], outputs(tmp_path)
    expected = {k: v for k, v in record(source)[-1].items() if k.startswith("eval/")}
    assert expected["eval/response_length"] > 0
    for name in layouts:
        found = record(tmp_path / name)[0]
        assert {k: v for k, v in found.items() if k.startswith("eval/")} == pytest.approx(expected), name
        loss = record(source)[-1]["supervised/validation_loss"]
        assert found["supervised/validation_loss"] == pytest.approx(loss, rel=1e-5), name

    subprocess.run(["cp", "-r", str(source), str(damaged)], check=True)
    newest = damaged / "checkpoints" / f"step_{STEPS:06d}"
    os.truncate(newest / "__0_0.distcp", 5000)
    before = {file: file.read_bytes() for file in damaged.rglob("*") if file.is_file()}
    refused = tmp_path / "refused"
    more = [argument.replace(f"steps={STEPS}", f"steps={STEPS + 2}") for argument in arguments]
    statuses = do(refused, [Run(str(damaged), more), Run(str(damaged), more + EP, ranks=2)])
    assert statuses[0] == [REFUSED] and statuses[1][0] == REFUSED, outputs(refused)
    said = outputs(refused)
    assert f"error: checkpoint {newest} is damaged: __0_0.distcp has 5000 bytes where" in said
    assert "Traceback" not in said
    assert {file: file.read_bytes() for file in damaged.rglob("*") if file.is_file()} == before
