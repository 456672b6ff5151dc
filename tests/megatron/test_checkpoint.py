"""Checkpoints of real models: what is loaded is what was saved, and what is not whole is refused by everybody."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_vp2o.errors import CheckpointError
from megatron_vp2o.parallel.groups import Groups
from tests.distributed import RanksFailed, run_distributed
from tests.megatron import checkpoint_job as job
from tests.megatron.checkpoint_job import Learner, config, different, latest, load_weights, random_numbers

JOB = "tests.megatron.checkpoint_job"
STATE = {"step": 2, "actor_age": 1, "actor_version": 1, "elapsed_s": 1.25, "extra": {"stream": {"position": 7}}}


@pytest.fixture(scope="module")
def groups() -> Iterator[Groups]:
    torch.set_num_threads(1)
    yield job.world.start(config().parallel, 1)
    job.world.stop()


@pytest.fixture(scope="module")
def saved(groups: Groups, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run's checkpoints with one in it; tests that change it take a copy."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    learner = Learner(config(), groups, folder)
    learner.train(0, 1)
    learner.saver.save(2, STATE)
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    """A copy of the one checkpoint."""
    shutil.copytree(saved, tmp_path / "checkpoints")
    return tmp_path / "checkpoints" / "step_000002"


# --- continuing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [{}, {"distributed_optimizer": True}, {"bf16": True}, {"bf16": True, "distributed_optimizer": True}]
)
def test_a_resumed_run_is_the_same_to_the_last_bit(groups: Groups, tmp_path: Path, settings: dict[str, Any]) -> None:
    first = Learner(config(**settings), groups, tmp_path)
    first.train(0)
    first.engine.refresh(1)
    first.train(1)
    path = first.saver.save(2, STATE)
    at_saving = first.snapshot()
    numbers = random_numbers()

    second = Learner(config(**settings), groups, tmp_path)
    assert second.saver.load(path) == STATE
    assert different(at_saving, second.snapshot()) == []
    assert second.engine.version == 1  # older than the learner, and still its own weights
    assert not torch.equal(second.engine.actor.output_layer.weight, second.policy.model.output_layer.weight)
    assert random_numbers() == numbers

    first.train(2, 3)
    second.train(2, 3)
    assert different(first.snapshot(), second.snapshot()) == []
    assert different(at_saving, first.snapshot()) != []


def test_saving_changes_nothing(groups: Groups, tmp_path: Path) -> None:
    learner, undisturbed = (Learner(config(), groups, tmp_path) for _ in range(2))
    for step in range(3):
        undisturbed.train(step)
        learner.train(step)
        learner.saver.save(step, STATE)
    assert different(learner.snapshot(), undisturbed.snapshot()) == []


def test_an_optimizer_without_a_step_is_saved_too(groups: Groups, tmp_path: Path) -> None:
    """The first steps of a run may all be skipped: no group of rollouts with unequal rewards."""
    first = Learner(config(bf16=True), groups, tmp_path)
    second = Learner(config(bf16=True), groups, tmp_path)
    with torch.no_grad():
        for parameter in first.policy.model.parameters():
            parameter.mul_(1.5)
    first.policy.optimizer.reload_model_params()
    second.saver.load(first.saver.save(0, {}))
    first.train(0)
    second.train(0)
    assert different(first.snapshot(), second.snapshot()) == []


@pytest.mark.parametrize("distributed", [False, True])
def test_settings_of_the_optimizer_come_from_the_configuration(
    groups: Groups, tmp_path: Path, distributed: bool
) -> None:
    first = Learner(config(distributed_optimizer=distributed), groups, tmp_path)
    first.train(0, 1)
    path = first.saver.save(2, STATE)
    changed = {"lr": 5e-3, "weight_decay": 0.2, "adam_beta2": 0.99}
    settings = config(distributed_optimizer=distributed, optimizer=changed)
    second, fresh = (Learner(settings, groups, tmp_path) for _ in range(2))
    second.saver.load(path)
    fresh.policy.scheduler.step(increment=2)
    assert second.snapshot()["settings"] == fresh.snapshot()["settings"]
    group = second.policy.optimizer.param_groups[0]
    assert group["lr"] == pytest.approx(5e-3 * 2 / 3)  # two of three warm-up steps
    assert tuple(group["betas"]) == (0.9, 0.99)
    second.train(2)


def test_a_fresh_actor_is_not_saved(groups: Groups, tmp_path: Path) -> None:
    learner = Learner(config(), groups, tmp_path)
    manifest = json.loads((learner.saver.save(0, {"actor_age": 0}) / "manifest.json").read_text())
    assert "actor" not in manifest["parts"]
    other = Learner(config(), groups, tmp_path)
    other.saver.load(tmp_path / "step_000000")
    assert other.engine.version == -1  # to be refreshed before the first rollout


def test_saving_starts_no_process(groups: Groups, tmp_path: Path) -> None:
    learner = Learner(config(), groups, tmp_path)
    children = _children()
    learner.saver.save(0, {})
    assert _children() == children


def _children() -> set[str]:
    return set(Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split())


def test_the_files_are_stock_megatron_ones(saved: Path) -> None:
    """Names of tensors without anything of ours; readable by Megatron without this project's loading code."""
    from megatron.core import dist_checkpointing

    tensors = dist_checkpointing.load_plain_tensors(str(saved / "step_000002"))
    assert tensors["embedding.word_embeddings.weight"].shape == (64, 32)
    assert "decoder.layers.self_attention.linear_qkv.weight" in tensors
    assert dist_checkpointing.load_common_state_dict(str(saved / "step_000002"))["schedule"]["num_steps"] == 2
    assert (saved / "step_000002" / "tokenizer.json").exists()


# --- weights only -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"distributed_optimizer": True}, {"bf16": True}])
def test_weights_only(groups: Groups, saved: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    """Into any precision and kind of optimizer; the optimizer starts anew, from these weights."""
    source = Learner(config(), groups, saved)
    source.saver.load(saved / "step_000002")
    learner = Learner(config(optimizer={"lr_warmup_steps": 0}, **settings), groups, tmp_path)
    load_weights(saved / "step_000002", learner.policy)
    for mine, theirs in zip(learner.policy.model.parameters(), source.policy.model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs.to(mine.dtype), rtol=0, atol=0)
    before = learner.policy.model.output_layer.weight.detach().clone()
    learner.train(0)
    assert learner.policy.scheduler.num_steps == 1
    change = (learner.policy.model.output_layer.weight - before).abs().max().item()
    assert 0.005 < change < 0.02  # a step from the loaded weights, not from the initial ones


# --- refusing ---------------------------------------------------------------------------------------------------------


def _edit_manifest(path: Path, **changes: Any) -> None:
    file = path / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def _flip_a_byte(path: Path) -> None:
    with (path / "__0_0.distcp").open("r+b") as file:
        file.seek(5000)
        byte = file.read(1)[0]
        file.seek(5000)
        file.write(bytes([byte ^ 1]))


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut": (lambda path: os.truncate(path / "__0_0.distcp", 1000), r"__0_0\.distcp has 1000 bytes where \d+ were"),
    "missing": (lambda path: (path / "common.pt").unlink(), r"common\.pt is missing"),
    "flipped": (_flip_a_byte, r"the content of __0_0\.distcp has changed"),
    "garbage": (lambda path: (path / "manifest.json").write_bytes(b"\x00\xff{"), r"manifest\.json cannot be read"),
    "list": (lambda path: (path / "manifest.json").write_text("[1]"), r"manifest\.json cannot be read"),
    "without manifest": (lambda path: (path / "manifest.json").unlink(), r"has no manifest\.json"),
    "newer": (lambda path: _edit_manifest(path, format=3), r"has format 3, .* reads up to 2: update"),
}


@pytest.mark.parametrize("weights_only", [False, True], ids=["resume", "weights"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_refused(groups: Groups, copy: Path, damage: str, weights_only: bool) -> None:
    spoil, message = DAMAGE[damage]
    spoil(copy)
    _assert_refused(groups, copy, message, weights_only)


@pytest.mark.parametrize("weights_only", [False, True], ids=["resume", "weights"])
@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"hidden_size": 64}, r"of another model \(hidden_size is 32 there and 64 here\)"),
        ({"num_moe_experts": 8}, r"num_moe_experts is 4 there and 8 here"),
        ({"moe_router_topk": 3}, r"moe_router_topk is 2 there and 3 here"),
        ({"rotary_base": 5e5}, r"rotary_base is 10000\.0 there and 500000\.0 here"),
    ],
)
def test_another_model_is_refused(
    groups: Groups, copy: Path, model: dict[str, Any], message: str, weights_only: bool
) -> None:
    _assert_refused(groups, copy, message, weights_only, model=model)


@pytest.mark.parametrize("settings", [{"bf16": True}, {"distributed_optimizer": True}])
def test_resuming_with_another_kind_of_optimizer_is_refused(
    groups: Groups, copy: Path, settings: dict[str, Any]
) -> None:
    _assert_refused(groups, copy, "of another optimizer .*take only its weights", weights_only=False, **settings)


def _assert_refused(groups: Groups, path: Path, message: str, weights_only: bool, **settings: Any) -> None:
    learner = Learner(config(**settings), groups, path.parent)
    learner.train(5)
    before, files = learner.snapshot(), _content(path.parent)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_weights(path, learner.policy) if weights_only else learner.saver.load(path)
    assert str(path) in str(caught.value)
    assert different(before, learner.snapshot()) == []
    assert _content(path.parent) == files


def _content(folder: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


# --- failing to save --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [100, 1_000, 20_000, 300_000], ids=lambda size: f"{size} bytes")
def test_a_failed_save_leaves_the_old_checkpoint(groups: Groups, tmp_path: Path, size: int) -> None:
    """Whichever file it is that cannot be written."""
    learner = Learner(config(), groups, tmp_path)
    learner.train(0)
    first = learner.saver.save(1, STATE)
    before = _content(tmp_path)
    with (
        job.file_size_limit(size),
        pytest.raises(CheckpointError, match=r"step_000002 was not saved: .*File too large"),
    ):
        learner.saver.save(2, STATE)
    assert _content(tmp_path) == before
    assert latest(tmp_path) == first and sorted(os.listdir(tmp_path)) == ["latest", "step_000001"]
    learner.saver.save(2, STATE)
    assert latest(tmp_path) == tmp_path / "step_000002"


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="mounts a small file system, which needs root")
def test_disk_full(groups: Groups, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=900k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("may not mount a file system here")
    try:
        learner = Learner(config(), groups, disk / "checkpoints")
        learner.train(0)
        first = learner.saver.save(1, {})
        with pytest.raises(CheckpointError, match=r"No space left on device.*can go on from .*step_000001"):
            learner.saver.save(2, {})
        assert sorted(os.listdir(disk / "checkpoints")) == ["latest", "step_000001"]
        assert latest(disk / "checkpoints") == first
        other = Learner(config(), groups, disk / "checkpoints")
        other.saver.load(first)
        assert different(learner.snapshot(), other.snapshot()) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.distributed
def test_killed_while_saving(groups: Groups, tmp_path: Path) -> None:
    with pytest.raises(RanksFailed, match="status -9"):
        run_distributed(f"{JOB}:killed_while_saving", 1, str(tmp_path))
    assert sorted(os.listdir(tmp_path)) == [".tmp-step_000002", "latest", "step_000001"]
    assert latest(tmp_path) == tmp_path / "step_000001"
    learner = Learner(config(), groups, tmp_path)
    learner.saver.load(tmp_path / "step_000001")
    learner.train(1)
    learner.saver.save(2, {})
    assert sorted(os.listdir(tmp_path)) == ["latest", "step_000001", "step_000002"]


# --- several ranks ----------------------------------------------------------------------------------------------------


@pytest.mark.distributed
def test_resumed_runs_on_two_ranks(tmp_path: Path) -> None:
    layouts = {
        "EP=2": {"expert_parallel": 2},
        "DP=2": {"distributed_optimizer": True},
        "DP=2, overlapping": {
            "distributed_optimizer": True,
            "overlap_grad_reduce": True,
            "overlap_param_gather": True,
        },
        "TP=2, bf16": {"tensor_parallel": 2, "bf16": True},
        "PP=2": {"pipeline_parallel": 2},
        "CP=2": {"context_parallel": 2, "distributed_optimizer": True},
    }
    by_rank = run_distributed(f"{JOB}:continuations", 2, str(tmp_path), layouts, timeout=200)
    assert by_rank == [{name: [] for name in layouts}] * 2


@pytest.mark.distributed
def test_checkpoints_of_four_ranks_load_on_one(groups: Groups, tmp_path: Path) -> None:
    layout = {"tensor_parallel": 2, "expert_parallel": 2}
    layouts = {"plain": layout, "sharded": {**layout, "distributed_optimizer": True}}
    results = run_distributed(f"{JOB}:trained", 4, str(tmp_path), layouts, timeout=200)[0]
    sharding: dict[str, dict[str, Any]] = {"plain": {}, "sharded": {"distributed_optimizer": True}}
    for name, optimizer in sharding.items():
        expected, expected_next = map(torch.tensor, results[name])
        learner = Learner(config(**optimizer), groups, tmp_path / name)
        assert (learner.log_probs() - expected).abs().max() > 0.01
        learner.saver.load(tmp_path / name / "step_000002")
        torch.testing.assert_close(learner.log_probs(), expected, rtol=0, atol=1e-5)
        learner.train(2)  # the optimizer's moments came along
        torch.testing.assert_close(learner.log_probs(), expected_next, rtol=0, atol=1e-3)
        assert (learner.log_probs() - expected).abs().max() > 0.01


@pytest.mark.distributed
def test_a_checkpoint_of_one_rank_loads_on_two_stages_and_on_two_halves(
    groups: Groups, saved: Path, tmp_path: Path
) -> None:
    learner = Learner(config(), groups, saved)
    learner.saver.load(saved / "step_000002")
    expected = learner.log_probs()
    learner.train(2)
    path = str(saved / "step_000002")
    layouts: list[dict[str, Any]] = [{"pipeline_parallel": 2}, {"context_parallel": 2}]
    for found in [one for layout in layouts for one in run_distributed(f"{JOB}:loaded", 2, path, layout, timeout=200)]:
        resumed, started, resumed_next = map(torch.tensor, found)
        torch.testing.assert_close(resumed, expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(started, expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(resumed_next, learner.log_probs(), rtol=0, atol=1e-3)


@pytest.mark.distributed
def test_all_ranks_get_the_error(saved: Path, tmp_path: Path) -> None:
    """Where one rank alone can see it: a changed file that it had to check, a file that it had to write."""
    for name, (spoil, _) in DAMAGE.items():
        shutil.copytree(saved / "step_000002", tmp_path / name)
        spoil(tmp_path / name)
    folder = tmp_path / "checkpoints"
    by_rank = run_distributed(f"{JOB}:failures", 2, str(folder), [str(tmp_path / name) for name in DAMAGE], timeout=100)
    assert by_rank[0] == by_rank[1]
    errors = by_rank[0]
    for name, (_, message) in DAMAGE.items():
        assert _matches(message, errors[name]), errors[name]
    for case in ("rank 0, 100", "rank 0, 20000", "rank 1, 20000"):
        assert _matches(r"step_000002 was not saved: .*File too large", errors[case]), errors[case]
    assert json.loads(errors["left"]) == ["latest", "step_000001", "step_000003"]


def _matches(pattern: str, text: str) -> bool:
    import re

    return re.search(pattern, text) is not None


def test_a_script_without_a_main_guard_can_save(tmp_path: Path) -> None:
    script = tmp_path / "unguarded.py"
    script.write_text(
        "from pathlib import Path\n"
        "from tests.megatron.checkpoint_job import Learner, config, world\n"
        f"learner = Learner(config(), world.start(config().parallel, 1), Path({str(tmp_path / 'checkpoints')!r}))\n"
        "learner.saver.save(1, {})\n"
        "print('saved once')\n"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, str(script)], env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True
    )
    assert done.stdout.count("saved once") == 1, done.stderr
