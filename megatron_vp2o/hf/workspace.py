"""Where a conversion writes until it is whole, and how one that was killed goes on.

Everything is made in `.converting-NAME` beside the target, under a lock. A journal there says which batches are complete; a
conversion of the same source with the same options takes them over. The target gets its name in one step at the end. After
an error the folder is removed; after a kill it stays, to be resumed.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from megatron_vp2o.errors import CheckpointError

MANIFEST = "conversion.json"
_TEMPORARY, _JOURNAL, _LOCK = ".converting-", "journal.jsonl", "lock"


class Workspace:
    """A folder that becomes `target`; see the module. Use `working`.

    Attributes:
        folder: where to write.
        done: batch number -> where the journal has it, for the batches that need not be done again.
    """

    def __init__(self, target: Path, fingerprint: dict[str, Any]) -> None:
        self.target = target
        self.folder = temporary_folder(target)
        self.done: dict[int, int] = {}
        self._guard = threading.Lock()
        self._fingerprint = hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()
        self._lock: int | None = None

    def open(self) -> Self:
        """Take over what a killed conversion of the same left, or start anew.

        Raises:
            CheckpointError: another process is at it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.folder / _LOCK, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise CheckpointError(
                f"{self.target} is being written by another process: wait for it, or stop it"
            ) from None
        self.done = self._journal()
        if not self.done:
            for path in self.folder.iterdir():
                if path.name != _LOCK:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            self._append({"fingerprint": self._fingerprint})
        return self

    def _journal(self) -> dict[int, int]:
        """The batches that a conversion of the same completed; none if it was another's."""
        found: dict[int, int] = {}
        path = self.folder / _JOURNAL
        if not path.exists():
            return found
        end = 0
        with path.open("rb") as stream:
            for number, line in enumerate(stream):
                try:
                    content = json.loads(line)
                except ValueError:  # the last one, cut short by a kill
                    break
                if number == 0 and content != {"fingerprint": self._fingerprint}:
                    return found
                if number > 0:
                    found[content["batch"]] = end
                end += len(line)
        os.truncate(path, end)
        return found

    def record(self, batch: int, record: Any) -> None:
        """Note that a batch is complete and on the disk. Any thread may call it."""
        with self._guard:
            self.done[batch] = self._append({"batch": batch, "record": record})

    def recorded(self, batch: int) -> Any:
        """What was noted of a batch. It is kept on the disk only: a large model has many."""
        with (self.folder / _JOURNAL).open("rb") as stream:
            stream.seek(self.done[batch])
            return json.loads(stream.readline())["record"]

    def _append(self, line: dict[str, Any]) -> int:
        with (self.folder / _JOURNAL).open("ab") as stream:
            start = stream.tell()
            stream.write(json.dumps(line, separators=(",", ":")).encode() + b"\n")
            stream.flush()
            os.fsync(stream.fileno())
        return start

    def publish(self) -> None:
        """Give the folder its name; what had it before is removed afterwards."""
        for name in (_JOURNAL, _LOCK):
            (self.folder / name).unlink()
        _sync(self.folder)
        old = self.target.with_name(f"{_TEMPORARY}old-{self.target.name}")
        if old.exists():
            shutil.rmtree(old)
        if self.target.exists():
            self.target.rename(old)
        self.folder.rename(self.target)
        _sync(self.target.parent)
        if old.exists():
            shutil.rmtree(old)

    def close(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


@contextmanager
def working(target: Path, fingerprint: dict[str, Any], *, overwrite: bool, needed: int) -> Iterator[Workspace]:
    """A workspace that is published when the body ends, and removed when it raises an error.

    Args:
        fingerprint: what must be equal for a killed conversion to be resumed.
        overwrite: replace an earlier conversion at `target`.
        needed: bytes that will be written.

    Raises:
        CheckpointError: the target is taken, or the disk has no room.
    """
    check_target(target, overwrite=overwrite)
    workspace = Workspace(target, fingerprint).open()
    try:
        free = shutil.disk_usage(workspace.folder).free
        there = sum(path.stat().st_size for path in workspace.folder.rglob("*") if path.is_file())
        if needed > free + there:
            raise CheckpointError(f"{target} needs {needed:,} bytes, and its disk has {free:,} free: make room there")
        yield workspace
        workspace.publish()
    except (Exception, GeneratorExit):  # an interrupt is no error: the work stays to be resumed
        shutil.rmtree(workspace.folder, ignore_errors=True)
        raise
    finally:
        workspace.close()


def temporary_folder(target: Path) -> Path:
    """Where a conversion works before the target has its name."""
    return target.with_name(_TEMPORARY + target.name)


def check_target(target: Path, *, overwrite: bool) -> None:
    """Raises CheckpointError where the target is taken: by anything without `overwrite`, with it by anything but a
    conversion's result."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not overwrite:
        raise CheckpointError(f"{target} is not empty: choose another folder, or replace it with --overwrite")
    if not (target / MANIFEST).is_file():
        raise CheckpointError(
            f"{target} holds no {MANIFEST}, so no conversion made it, and it is not overwritten: remove it yourself"
        )


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
