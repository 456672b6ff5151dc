"""Checkpoints that something happened to: a hundred mutations drawn at random, weights that are not finite, other weights.

CHECKPOINT_MUTATIONS=N draws another number of them.
"""

from __future__ import annotations

import json
import math
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_vp2o.errors import CheckpointError, DeadRunError
from megatron_vp2o.megatron.checkpoint import checkpointer, folder
from megatron_vp2o.parallel.groups import Groups
from tests.distributed import run_distributed
from tests.megatron import checkpoint_job as job
from tests.megatron.checkpoint_job import Learner, config, different, load_weights

MUTATIONS = int(os.environ.get("CHECKPOINT_MUTATIONS", "100"))


@pytest.fixture(scope="module")
def groups() -> Iterator[Groups]:
    torch.set_num_threads(1)
    yield job.world.start(config().parallel, 1)
    job.world.stop()


@pytest.fixture(scope="module")
def saved(groups: Groups, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of checkpoints with two in it."""
    path = tmp_path_factory.mktemp("saved") / "checkpoints"
    learner = Learner(config(), groups, path)
    learner.train(0)
    learner.saver.save(1, {"actor_age": 0})
    learner.engine.refresh(1)
    learner.train(1)
    learner.saver.save(2, {"actor_age": 1, "actor_version": 1})
    return path


# --- mutations --------------------------------------------------------------------------------------------------------

Dice = random.Random


def _files(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file())


def truncate(path: Path, dice: Dice) -> None:
    file = dice.choice(_files(path))
    os.truncate(file, dice.randrange(file.stat().st_size))


def flip_bits(path: Path, dice: Dice) -> None:
    file = dice.choice(_files(path))
    content = bytearray(file.read_bytes())
    for _ in range(dice.randint(1, 8)):
        content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
    file.write_bytes(content)


def remove(path: Path, dice: Dice) -> None:
    dice.choice(_files(path)).unlink()


def rename(path: Path, dice: Dice) -> None:
    file = dice.choice(_files(path))
    file.rename(file.with_name(dice.choice(["moved", f"{file.name}.bak", f"_{file.name}", file.name.upper() + "2"])))


def exchange(path: Path, dice: Dice) -> None:
    a, b = dice.sample(_files(path), 2)
    a_content, b_content = a.read_bytes(), b.read_bytes()
    a.write_bytes(b_content)
    b.write_bytes(a_content)


def append(path: Path, dice: Dice) -> None:
    with dice.choice(_files(path)).open("ab") as file:
        file.write(dice.randbytes(dice.randint(1, 100)))


def overwrite(path: Path, dice: Dice) -> None:
    file = dice.choice(_files(path))
    file.write_bytes(dice.choice([b"", b"\x00" * file.stat().st_size, dice.randbytes(file.stat().st_size)]))


def replace_by_folder(path: Path, dice: Dice) -> None:
    file = dice.choice(_files(path))
    file.unlink()
    file.mkdir()


def dangling_link(path: Path, dice: Dice) -> None:
    file = dice.choice(_files(path))
    file.unlink()
    file.symlink_to("nowhere")


def wrong_json(path: Path, dice: Dice) -> None:
    """A value anywhere in a JSON file becomes another type, or goes."""
    file = path / dice.choice(["manifest.json", "manifest.json", "manifest.json", "state.json", "metadata.json"])
    content = json.loads(file.read_text())
    places: list[tuple[Any, Any]] = []

    def collect(node: Any) -> None:
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], (dict, list)):
                collect(node[key])

    collect(content)
    node, key = dice.choice(places)
    if dice.random() < 0.3:
        del node[key]
    else:
        values = [None, "text", -1, 1.5, True, [], {}, [[0]], {"a": 1}, 10**30, math.nan]
        node[key] = dice.choice([value for value in values if value != node[key]])
    file.write_text(json.dumps(content))


KINDS: list[Callable[[Path, Dice], None]] = [
    truncate,
    flip_bits,
    flip_bits,
    remove,
    rename,
    exchange,
    append,
    overwrite,
    replace_by_folder,
    dangling_link,
    wrong_json,
    wrong_json,
]


def _content(path: Path) -> dict[str, bytes | str]:
    def of(file: Path) -> bytes | str:
        return os.readlink(file) if file.is_symlink() else file.read_bytes() if file.is_file() else "folder"

    return {str(file.relative_to(path)): of(file) for file in sorted(path.rglob("*"))}


def test_mutated_checkpoints_are_refused(groups: Groups, saved: Path, tmp_path: Path) -> None:
    """One clear error each, for resuming and for init_from; files and memory stay as they are."""
    learner = Learner(config(), groups, tmp_path / "other")
    learner.train(5)
    before = learner.snapshot()
    run = tmp_path / "checkpoints"
    for seed in range(MUTATIONS):
        dice = random.Random(seed)
        shutil.copytree(saved, run)
        path, kind = run / "step_000002", dice.choice(KINDS)
        kind(path, dice)
        mutated = _content(run)
        found = folder.latest(run)
        assert found in (path, run / "step_000001"), seed
        for load in (learner.saver.load, lambda path: load_weights(path, learner.policy)):
            try:
                load(path)
            except CheckpointError as error:
                message = str(error)
                assert str(path) in message and "\n" not in message and len(message) < 600, (seed, kind, message)
            else:
                raise AssertionError(f"seed {seed}: {kind.__name__} was not noticed")
        assert _content(run) == mutated, seed
        assert different(before, learner.snapshot()) == [], seed
        shutil.rmtree(run)


@pytest.mark.parametrize("seed", range(8))
def test_bits_that_flip_where_no_checksum_looks(
    groups: Groups, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Files of tensors beyond CHECKSUM_LIMIT are compared by size: what reading then finds is an error of ours or nothing."""
    monkeypatch.setattr(folder, "CHECKSUM_LIMIT", 0)
    learner = Learner(config(), groups, tmp_path / "checkpoints")
    learner.train(0)
    path = learner.saver.save(1, {"actor_age": 0})
    file = next(path.glob("*.distcp"))
    content, dice = bytearray(file.read_bytes()), random.Random(seed)
    for _ in range(2000):
        content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_weights(path, learner.policy)


# --- weights that are not finite --------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_dead_weights_are_neither_saved_nor_loaded(
    groups: Groups, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    run = tmp_path / "checkpoints"
    shutil.copytree(saved, run)
    before = _content(run)
    learner = Learner(config(), groups, run, keep=1)
    parameters = list(learner.policy.model.parameters())
    for parameter in parameters[:: len(parameters) // 3]:
        kept = parameter.detach().clone()
        parameter.data.view(-1)[-1] = value
        with pytest.raises(
            DeadRunError, match=r"step 3 are not finite.*newest checkpoint is .*step_000002; lower optim"
        ):
            learner.saver.save(3, {"actor_age": 0})
        assert _content(run) == before
        parameter.data.copy_(kept)

    parameters[0].data.view(-1)[0] = value
    monkeypatch.setattr(checkpointer, "refuse_dead_weights", lambda *_: None)  # as versions without the check
    path = learner.saver.save(3, {"actor_age": 0})
    fresh = Learner(config(), groups, run)
    for load in (fresh.saver.load, lambda path: load_weights(path, fresh.policy)):
        with pytest.raises(CheckpointError, match=r"step_000003 has weights that are not finite.*choose an older one"):
            load(path)


# --- other weights ----------------------------------------------------------------------------------------------------


@pytest.mark.distributed
def test_weights_have_one_identity_under_every_layout(groups: Groups, saved: Path, tmp_path: Path) -> None:
    learner = Learner(config(), groups, tmp_path)
    load_weights(saved / "step_000002", learner.policy)

    def identity() -> str:
        return job.weights_identity(learner.policy.model, groups, learner.policy.model_vocab)

    expected = identity()
    layouts = [
        {"tensor_parallel": 2},
        {"expert_parallel": 2},
        {"pipeline_parallel": 2},
        {"distributed_optimizer": True},
    ]
    found = run_distributed(
        "tests.megatron.checkpoint_job:identities", 2, str(saved / "step_000002"), layouts, timeout=200
    )
    assert found == [[expected] * len(layouts)] * 2
    dice = random.Random(0)
    for parameter in learner.policy.model.parameters():
        # of the embedding's rows only those with a token: padding depends on the layout
        words = parameter.data.view(torch.int32).view(-1)[: job.VOCAB * 32]
        place = dice.randrange(len(words))
        words[place] ^= 1 << dice.randrange(31)
        assert identity() != expected
        load_weights(saved / "step_000002", learner.policy)
        assert identity() == expected
    load_weights(saved / "step_000001", learner.policy)
    assert identity() != expected
