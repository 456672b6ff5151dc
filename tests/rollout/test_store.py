"""Rollouts on disk: torn and damaged files, a killed run that does not generate again, a replay that updates bit for bit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_vp2o.core.deferred import Deferred, known
from megatron_vp2o.errors import RolloutError
from megatron_vp2o.rl.types import LoggedGates, Rollouts, SamplingParams
from megatron_vp2o.rollout.store import RolloutFile, StoredEngine, file_of, to_arrays, to_rollouts
from megatron_vp2o.tracking.record import read
from tests.test_end_to_end import without_times

ROOT = Path(__file__).resolve().parents[2]


def draw(seed: int, gates: bool = False) -> Rollouts:
    generator = torch.Generator().manual_seed(seed)
    prompt_len_N = torch.randint(1, 5, (6,), generator=generator)
    total_len_N = prompt_len_N + torch.randint(1, 8, (6,), generator=generator)
    logprobs_NS = -torch.rand(6, 12, generator=generator)
    logged = LoggedGates(torch.rand(2, 6, 3, 4, generator=generator), torch.arange(6), 2) if gates else None
    tokens_NS = torch.randint(0, 200_000, (6, 12), generator=generator)
    finished_N = torch.rand(6, generator=generator) < 0.5
    routes_NSLK = torch.randint(0, 256, (6, 12, 2, 3), generator=generator).to(torch.uint8 if seed % 3 else torch.int16)
    return Rollouts(
        tokens_NS,
        prompt_len_N,
        total_len_N,
        logprobs_NS,
        2 * logprobs_NS,
        finished_N,
        seed,
        logged,
        routes_NSLK if gates else None,
        torch.randint(-1, 9, (6, 12), generator=generator) if seed % 2 else None,
    )


def equal(one: Rollouts, other: Rollouts) -> bool:
    pairs = [(getattr(one, name), getattr(other, name)) for name in vars(one) if name.endswith(("_N", "_NS"))]
    same = (
        all(a is b if a is None or b is None else a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)
        and one.weight_version == other.weight_version
    )
    if one.gates is None or other.gates is None or one.routes_NSLK is None or other.routes_NSLK is None:
        return same and one.gates is other.gates and one.routes_NSLK is other.routes_NSLK
    return (
        same
        and torch.equal(one.gates.gates_LMJE, other.gates.gates_LMJE)
        and torch.equal(one.gates.row_N, other.gates.row_N)
        and one.gates.stride == other.gates.stride
        and one.routes_NSLK.dtype == other.routes_NSLK.dtype
        and torch.equal(one.routes_NSLK, other.routes_NSLK)
    )


def back(file: RolloutFile, key: str) -> Rollouts:
    found = file.read(key)
    assert found is not None
    return to_rollouts(found, torch.device("cpu"))


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    path = file_of(tmp_path / "rollouts", 3)
    file = RolloutFile(path, writable=True)
    for seed in range(4):
        file.append([f"key{seed}", "again"], to_arrays(draw(seed, gates=seed % 2 == 1)))
    for opened in (file, RolloutFile(path, writable=False)):
        assert all(equal(back(opened, f"key{seed}"), draw(seed, gates=seed % 2 == 1)) for seed in range(4))
        assert equal(back(opened, "again"), draw(3, gates=True)) and opened.read("other") is None


def test_every_torn_end_is_cut_off(tmp_path: Path) -> None:
    """Whatever byte the kill came at, whole frames before it stay and the next ones can be appended."""
    path = tmp_path / "whole.bin"
    file = RolloutFile(path, writable=True)
    ends = [0]
    for seed in range(3):
        file.append([f"key{seed}"], to_arrays(draw(seed)))
        ends.append(path.stat().st_size)
    whole = path.read_bytes()
    for cut in [*range(0, len(whole), 97), *(end + more for end in ends[1:-1] for more in (-1, 0, 1, 15, 16, 17))]:
        torn = tmp_path / "torn.bin"
        torn.write_bytes(whole[:cut])
        kept = sum(end <= cut for end in ends[1:])
        again = RolloutFile(torn, writable=True)
        assert set(again.places) == {f"key{seed}" for seed in range(kept)}
        again.append(["new"], to_arrays(draw(9)))
        assert equal(back(RolloutFile(torn, writable=False), "new"), draw(9))


def test_damage_in_the_middle_is_said(tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    file = RolloutFile(path, writable=True)
    for seed in range(2):
        file.append([f"key{seed}"], to_arrays(draw(seed)))
    body = bytearray(path.read_bytes())
    body[100] ^= 1
    path.write_bytes(body)
    with pytest.raises(RolloutError, match="damaged"):
        RolloutFile(path, writable=True)
    path.write_bytes(b"something else entirely, longer than a head")
    with pytest.raises(RolloutError, match="no rollout begins at byte 0"):
        RolloutFile(path, writable=True)


RUN = [
    *("--config-name", "train", "algorithm=vp2o", "model=micro", "task.train_size=60", "task.validation_size=4"),
    *("evaluation.problems=4", "evaluation.samples=2", "evaluation.pass_at=[1]", "evaluation.interval=0"),
    *("evaluation.final_split=false", "logging.tensorboard=false", "threads=1", "algorithm.prompts_per_step=4"),
    *("algorithm.group_size=2", "algorithm.filter_uniform_groups=false", "algorithm.entropy_coef=0.1"),
    *("rollout.sampling.max_new_tokens=8", "algorithm.budget.max_age=2", "algorithm.trust_region.delta=0.5"),
    *("checkpoint.interval=2", "rollout.router_replay=R3"),
]


class Counting:
    """An engine whose rollouts have routes, or not."""

    version = 3

    def __init__(self, routes: bool) -> None:
        self.routes, self.calls = routes, 0

    def checksum(self) -> Deferred[int]:
        return known(7)

    def generate(self, prompts: Any, uids: Any, sampling: Any, group_size: int = 1) -> Rollouts:
        self.calls += 1
        return draw(1, gates=self.routes)

    def close(self) -> None:
        pass


def test_rollouts_without_routes_are_not_replayed_as_if_they_had_some(tmp_path: Path) -> None:
    """A run that turns router_replay on, or off, between a kill and its resumption."""
    groups: Any = SimpleNamespace(rank=0, world=SimpleNamespace(size=lambda: 1), device=torch.device("cpu"))
    asked = [[5, 6]], [0], SamplingParams(1.0, 1.0, 4, seed=0), 6
    for first, then in ((False, True), (True, False), (True, True)):
        folder = tmp_path / f"{first}{then}"
        for routes, calls in ((first, 1), (then, int(then and not first))):
            engine: Any = Counting(routes)
            stored = StoredEngine(engine, groups, folder=folder, routes=routes)
            for _ in range(2):
                assert (stored.generate(*asked).routes_NSLK is not None) == routes
            assert engine.calls == calls
            stored.close()
    plain = StoredEngine(Counting(False), groups, folder=tmp_path / "plain")  # type: ignore[arg-type]
    plain.generate(*asked)
    replayed = StoredEngine(Counting(True), groups, replay=tmp_path / "plain", routes=True)  # type: ignore[arg-type]
    with pytest.raises(RolloutError, match=r"have no routes, which rollout\.router_replay=R3 needs"):
        replayed.generate(*asked)


class Ahead(Counting):
    """It generates while nobody waits, with weights that are a number."""

    weights = 7

    def checksum(self) -> Deferred[int]:
        return known(self.weights)

    def begin(self, prompts: Any, uids: Any, sampling: Any, group_size: int = 1) -> Any:
        self.calls += 1
        rollouts = draw(100 * self.weights + uids[0])
        return SimpleNamespace(wait=lambda: rollouts, span=lambda: None, cancel=lambda: None)


def test_batches_of_weights_that_are_gone_come_back_by_name(tmp_path: Path) -> None:
    """In another process, with what was noted of them; those of other weights, prompts or settings do not."""
    groups: Any = SimpleNamespace(rank=0, world=SimpleNamespace(size=lambda: 1), device=torch.device("cpu"))
    sampling = SamplingParams(1.0, 1.0, 4, seed=0)
    engine: Any = Ahead(False)
    first, names = StoredEngine(engine, groups, folder=tmp_path), []
    for weights in (7, 8):
        engine.weights = weights
        for uid in (0, 1):
            batch = first.begin([[5, 6]], [uid], sampling, 6)
            if (weights, uid) != (8, 1):  # the process is killed before that one is waited for
                batch.wait()
            if weights == 7:
                first.note(batch, {"said": np.array([uid, 0.5]), "text": np.array("a text")})
            names.append(first.asked_of(batch))
    assert names[0] == names[1] != names[2] == names[3]
    first.close()
    again: Any = StoredEngine(engine, groups, folder=tmp_path)
    for uid in (0, 1):
        batch, said = again.recall([[5, 6]], [uid], sampling, 6, names[0])
        assert equal(batch.wait(), draw(700 + uid)) and again.asked_of(batch) == names[0]
        assert said["said"].tolist() == [uid, 0.5] and str(said["text"]) == "a text"
    batch, said = again.recall([[5, 6]], [0], sampling, 6, names[2])
    assert said is None and equal(batch.wait(), draw(800))
    assert again.recall([[5, 6]], [1], sampling, 6, names[2]) is None
    assert again.recall([[5, 7]], [0], sampling, 6, names[0]) is None
    assert again.recall([[5, 6]], [0], sampling, 5, names[0]) is None and engine.calls == 4
    assert equal(again.begin([[5, 6]], [0], sampling, 6).wait(), draw(800)) and engine.calls == 4


def train(run_dir: Path, *more: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "megatron_vp2o.train", *RUN, f"run_dir={run_dir}", *more],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout + done.stderr


def test_a_replay_and_a_resumed_run_update_bit_for_bit(tmp_path: Path) -> None:
    """Stored by one run; replayed by another; and taken by the same run when it goes back to its last checkpoint."""
    stored = tmp_path / "stored"
    train(stored, "algorithm.steps=3", "rollout.store=true", "checkpoint.save_at_end=false")
    lines = without_times(stored)
    assert all(0.8 < float(line["replay/tokens"] or 0) < 1 for line in lines[1:])
    kept = RolloutFile(file_of(stored / "rollouts", 0), writable=False)
    assert all({"routes", "gates"} <= (kept.read(key) or {}).keys() for key in kept.places)
    assert len(read(stored)["step"]) == 4
    frames = RolloutFile(file_of(stored / "rollouts", 0), writable=False).places
    assert len(frames) == 6  # two keys a batch
    replayed = tmp_path / "replayed"
    train(replayed, "algorithm.steps=3", f"rollout.replay={stored}/rollouts", "checkpoint.save_at_end=false")
    assert without_times(replayed) == lines
    # What is trained on comes from the file: other log-probabilities there are found in the run.
    changed = RolloutFile(file_of(tmp_path / "changed", 0), writable=True)
    original = RolloutFile(file_of(stored / "rollouts", 0), writable=False)
    for key in original.places:
        arrays = dict(original.read(key) or {})
        arrays["model_logprobs"] = arrays["model_logprobs"] - 0.01
        del arrays["keys"]
        changed.append([key], arrays)
    other = tmp_path / "other"
    train(other, "algorithm.steps=1", f"rollout.replay={tmp_path}/changed", "checkpoint.save_at_end=false")
    found = [value for value in read(other)["policy/logprob_mismatch"] if value is not None]
    assert float(found[0]) == pytest.approx(0.01, rel=1e-3)
    # Its last checkpoint is of step 2; the third batch is there.
    said = train(stored, "algorithm.steps=3", "rollout.store=true", "checkpoint.save_at_end=false", "resume=must")
    assert "rollouts of version" in said and "are taken from" in said
    assert without_times(stored)[-1] == lines[-1]
    assert RolloutFile(file_of(stored / "rollouts", 0), writable=False).places == frames
