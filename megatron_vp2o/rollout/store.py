"""Rollouts on disk: a run that was killed does not generate again what it had, and a batch can be replayed.

Each rank appends what it got to a file of its own and waits until it is on the disk. A record is found again by what was asked:
prompts, sampling, and the version and checksum of the actor's weights. So a resumed run, whose weights come out as they were,
finds the batches that it had generated after its last checkpoint, and any other run finds nothing.

A file is a row of frames: 4 bytes `VP2O`, 8 bytes length, 4 bytes CRC-32, and an .npz of arrays. What follows the last whole frame
was being written when the run was killed, and is cut off.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_vp2o.core.deferred import Deferred
from megatron_vp2o.errors import RolloutError
from megatron_vp2o.parallel.groups import Groups, any_rank, gather_objects
from megatron_vp2o.rl.interfaces import GeneratesAhead, Generating, RolloutEngine
from megatron_vp2o.rl.types import LoggedGates, Rollouts, SamplingParams

logger = logging.getLogger(__name__)

FOLDER = "rollouts"  # in the run folder
_MAGIC, _HEAD = b"VP2O", struct.Struct("<4sQI")


def file_of(folder: Path, rank: int) -> Path:
    """The file of one rank."""
    return folder / f"rank{rank:05d}.bin"


class RolloutFile:
    """Frames of one file, by their keys; the last of equal ones counts.

    Args:
        path: of the file; need not be there yet.
        writable: whether it is appended to. A torn end is cut off then, and only left out otherwise.

    Raises:
        RolloutError: a frame in the middle is damaged.
    """

    def __init__(self, path: Path, *, writable: bool) -> None:
        self.path = path
        self.places: dict[str, tuple[int, int]] = {}
        if writable:
            path.parent.mkdir(parents=True, exist_ok=True)
        end = self._scan() if path.exists() else 0
        self._file = path.open("ab") if writable else None
        if self._file is not None and self._file.tell() > end:
            logger.warning("%s: cutting off %d bytes that were not written to their end", path, self._file.tell() - end)
            self._file.truncate(end)

    def _scan(self) -> int:
        """Find the keys. Returns where the last whole frame ends."""
        size, at = self.path.stat().st_size, 0
        with self.path.open("rb") as file:
            while at + _HEAD.size <= size:
                magic, length, crc = _HEAD.unpack(file.read(_HEAD.size))
                if magic != _MAGIC:
                    raise RolloutError(f"{self.path}: no rollout begins at byte {at}; move the file away")
                if at + _HEAD.size + length > size:
                    break
                body = file.read(length)
                if zlib.crc32(body) != crc:
                    if at + _HEAD.size + length == size:
                        break
                    raise RolloutError(f"{self.path}: the rollouts at byte {at} are damaged; move the file away")
                for key in _load(body)["keys"].tolist():
                    self.places[key] = (at + _HEAD.size, length)
                at += _HEAD.size + length
        return at

    def append(self, keys: Sequence[str], arrays: dict[str, Any]) -> None:
        """Write one frame and wait until it is on the disk."""
        assert self._file is not None
        buffer = io.BytesIO()
        np.savez_compressed(buffer, keys=np.array(list(keys)), **arrays)
        body = buffer.getvalue()
        at = self._file.tell()
        self._file.write(_HEAD.pack(_MAGIC, len(body), zlib.crc32(body)) + body)
        self._file.flush()
        os.fsync(self._file.fileno())
        for key in keys:
            self.places[key] = (at + _HEAD.size, len(body))

    def read(self, key: str) -> dict[str, Any] | None:
        """The arrays of a frame; None if there is none with this key."""
        if key not in self.places:
            return None
        at, length = self.places[key]
        with self.path.open("rb") as file:
            file.seek(at)
            return _load(file.read(length))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def _load(body: bytes) -> dict[str, Any]:
    with np.load(io.BytesIO(body), allow_pickle=False) as arrays:
        return dict(arrays)


def to_arrays(rollouts: Rollouts) -> dict[str, Any]:
    """Everything of them."""
    arrays = {
        "tokens": rollouts.tokens_NS.to(torch.int32),
        "prompt_len": rollouts.prompt_len_N,
        "total_len": rollouts.total_len_N,
        "logprobs": rollouts.logprobs_NS,
        "model_logprobs": rollouts.model_logprobs_NS,
        "finished": rollouts.finished_N,
        "version": torch.tensor(rollouts.weight_version),
    }
    if rollouts.gates is not None:
        arrays |= {
            "gates": rollouts.gates.gates_LMJE.cpu(),
            "gate_row": rollouts.gates.row_N,
            "gate_stride": torch.tensor(rollouts.gates.stride),
        }
    if rollouts.routes_NSLK is not None:
        arrays["routes"] = rollouts.routes_NSLK
    if rollouts.versions_NS is not None:
        arrays["versions"] = rollouts.versions_NS
    return {name: tensor.numpy() for name, tensor in arrays.items()}


def to_rollouts(arrays: dict[str, Any], device: torch.device) -> Rollouts:
    """The same rollouts again, bit for bit."""
    t = {name: torch.from_numpy(array) for name, array in arrays.items() if name != "keys"}
    gates = None
    if "gates" in t:
        gates = LoggedGates(t["gates"].to(device), t["gate_row"], int(t["gate_stride"]))
    return Rollouts(
        t["tokens"].long(),
        t["prompt_len"],
        t["total_len"],
        t["logprobs"],
        t["model_logprobs"],
        t["finished"],
        int(t["version"]),
        gates,
        t.get("routes"),
        t.get("versions"),
    )


class StoredEngine:
    """A rollout engine whose batches are on disk before they are used.

    Args:
        engine: generates what is not there.
        groups: of the run; decisions are the same on all ranks.
        folder: where this run's batches go; None: nowhere.
        replay: folder of another run's batches to take instead of generating; None: generate.
        routes: whether the engine's rollouts carry routes. What was stored without is generated again, or cannot be replayed.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        groups: Groups,
        *,
        folder: Path | None = None,
        replay: Path | None = None,
        routes: bool = False,
    ) -> None:
        self.engine, self.groups, self.routes = engine, groups, routes
        self.store = None if folder is None else RolloutFile(file_of(folder, groups.rank), writable=True)
        self.replayed = None if replay is None else RolloutFile(file_of(replay, groups.rank), writable=False)
        if self.replayed is not None and not self.replayed.places:
            raise RolloutError(f"rollout.replay: there is no rollout in {self.replayed.path}")
        self._borrowed = False

    @property
    def version(self) -> int:
        return self.engine.version

    def generate(
        self, prompts: Sequence[Sequence[int]], uids: Sequence[int], sampling: SamplingParams, group_size: int = 1
    ) -> Rollouts:
        """See `RolloutEngine.generate`. Raises RolloutError where a replay lacks the batch."""
        if self._borrowed:
            return self.engine.generate(prompts, uids, sampling, group_size)
        keys = self._keys(prompts, uids, sampling, group_size, self._present())
        rollouts = self._found(keys, uids)
        if rollouts is None:
            rollouts = self.engine.generate(prompts, uids, sampling, group_size)
            self._keep(keys, rollouts)
        return rollouts

    def begin(
        self, prompts: Sequence[Sequence[int]], uids: Sequence[int], sampling: SamplingParams, group_size: int = 1
    ) -> StoredBatch:
        """See `rl.interfaces.GeneratesAhead`; the engine must be one, but for a replay. A batch is on disk when `wait` returns."""
        weights = self._present()
        keys = self._keys(prompts, uids, sampling, group_size, weights)
        rollouts = self._found(keys, uids)
        if rollouts is not None:
            return StoredBatch(rollouts, key=keys[0], weights=weights)
        assert isinstance(self.engine, GeneratesAhead), "rollout.ahead is refused with engines that cannot"
        begun = self.engine.begin(prompts, uids, sampling, group_size)
        return StoredBatch(None, begun, lambda got: self._keep(keys, got), keys[0], weights)

    def asked_of(self, generating: Generating) -> str:
        """See `rl.interfaces.Recalls.asked_of`."""
        assert isinstance(generating, StoredBatch)
        return generating.weights

    def recall(
        self,
        prompts: Sequence[Sequence[int]],
        uids: Sequence[int],
        sampling: SamplingParams,
        group_size: int,
        weights: str,
    ) -> tuple[StoredBatch, dict[str, Any] | None] | None:
        """See `rl.interfaces.Recalls.recall`."""
        if self.store is None:
            return None
        key = self._keys(prompts, uids, sampling, group_size, weights)[0]
        found, notes = self._routed(self.store.read(key)), self.store.read(_notes(key))
        if any_rank(found is None, self.groups.world) or found is None:
            return None
        if any_rank(notes is None, self.groups.world):
            notes = None
        return StoredBatch(to_rollouts(found, self.groups.device), key=key, weights=weights), notes

    def note(self, generating: Generating, arrays: dict[str, Any]) -> None:
        """See `rl.interfaces.Recalls.note`."""
        if self.store is not None:
            assert isinstance(generating, StoredBatch)
            self.store.append([_notes(generating.key)], arrays)

    def _keys(
        self,
        prompts: Sequence[Sequence[int]],
        uids: Sequence[int],
        sampling: SamplingParams,
        group_size: int,
        weights: str,
    ) -> list[str]:
        """Of a batch of the weights of this name, and last of what is asked, whatever weights answer."""
        asked = _digest([list(map(list, prompts)), list(uids), asdict(sampling), group_size])
        return [asked] if self.store is None else [_digest([asked, weights]), asked]

    def _present(self) -> str:
        """Name of the present weights; empty where nothing is stored. Collective."""
        if self.store is None:
            return ""
        return _digest([self.version, gather_objects(self.engine.checksum().read(), self.groups.world)])

    def _found(self, keys: Sequence[str], uids: Sequence[int]) -> Rollouts | None:
        """What need not be generated; None on all ranks or on none. Collective."""
        if self.replayed is not None:
            return self._replay(keys[-1], uids)
        if self.store is None:
            return None
        found = self._routed(self.store.read(keys[0]))
        if any_rank(found is None, self.groups.world) or found is None:
            return None
        logger.info("rollouts of version %d are taken from %s", self.version, self.store.path)
        return to_rollouts(found, self.groups.device)

    def _keep(self, keys: Sequence[str], rollouts: Rollouts) -> None:
        if self.store is not None:
            self.store.append(keys, to_arrays(rollouts))

    def _routed(self, found: dict[str, Any] | None) -> dict[str, Any] | None:
        """What was stored as the engine's own rollouts would be, with routes or without; None where routes are missing."""
        if found is None or (self.routes and "routes" not in found):
            return None
        return found if self.routes else {name: array for name, array in found.items() if name != "routes"}

    def _replay(self, asked: str, uids: Sequence[int]) -> Rollouts:
        assert self.replayed is not None
        found = self.replayed.read(asked)
        if any_rank(found is None, self.groups.world) or found is None:
            raise RolloutError(
                f"rollout.replay: {self.replayed.path} has no rollouts of prompts {list(uids[:3])}... with these settings: replay "
                "needs the task, algorithm.prompts_per_step, algorithm.group_size, rollout.sampling, seed, number of processes and "
                "steps of the run that stored them"
            )
        found = self._routed(found)
        if found is None:
            raise RolloutError(
                f"rollout.replay: the rollouts in {self.replayed.path} have no routes, which rollout.router_replay=R3 needs: "
                "replay those of a run that had it, or choose rollout.router_replay=R2 or off"
            )
        rollouts = to_rollouts(found, self.groups.device)
        if rollouts.weight_version != self.version:
            logger.warning(
                "replayed rollouts are of version %d, and the run is at %d", rollouts.weight_version, self.version
            )
        return rollouts

    def refresh(self, version: int) -> None:
        self.engine.refresh(version)

    def checksum(self) -> Deferred[int]:
        return self.engine.checksum()

    def log_probs(self, rollouts: Rollouts, temperature: float) -> Tensor:
        return self.engine.log_probs(rollouts, temperature)

    def log_probs_and_routes(self, rollouts: Rollouts, temperature: float) -> tuple[Tensor, Tensor]:
        return self.engine.log_probs_and_routes(rollouts, temperature)

    @contextmanager
    def at_learner_weights(self) -> Iterator[None]:
        """What is generated for evaluation is not stored."""
        with self.engine.at_learner_weights():
            self._borrowed = True
            try:
                yield
            finally:
                self._borrowed = False

    def close(self) -> None:
        for file in (self.store, self.replayed):
            if file is not None:
                file.close()
        self.engine.close()


class StoredBatch:
    """Implements `rl.interfaces.Generating`.

    Args:
        rollouts: those that were found; None: `generating` brings them, and `keep` writes them.
        key: in the store.
        weights: name of those that it was asked of.
    """

    def __init__(
        self,
        rollouts: Rollouts | None,
        generating: Generating | None = None,
        keep: Callable[[Rollouts], None] | None = None,
        key: str = "",
        weights: str = "",
    ) -> None:
        self.rollouts, self.generating, self.keep = rollouts, generating, keep
        self.key, self.weights = key, weights

    def done(self) -> bool:
        """See `Generating.done`."""
        return self.generating is None or self.generating.done()

    def span(self) -> tuple[float, float] | None:
        return None if self.generating is None else self.generating.span()

    def wait(self) -> Rollouts:
        """See `Generating.wait`; they are on disk then."""
        if self.rollouts is not None:
            return self.rollouts
        assert self.generating is not None and self.keep is not None
        rollouts = self.generating.wait()
        self.keep(rollouts)
        return rollouts

    def cancel(self) -> None:
        """See `Generating.cancel`."""
        if self.generating is not None:
            self.generating.cancel()


def _notes(key: str) -> str:
    """Key of what was noted of a batch."""
    return f"notes of {key}"


def _digest(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=16).hexdigest()
