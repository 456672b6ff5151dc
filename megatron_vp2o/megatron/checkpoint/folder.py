"""The folder of a run's checkpoints: names, manifest, pointer, and how a new one appears in it all at once.

    checkpoints/
      latest                 name of the newest whole checkpoint, written last
      step_000050/
        manifest.json        what belongs to it, with sizes and checksums
        state.json           the trainer's state
        common.pt  metadata.json  .metadata  __0_0.distcp ...    Megatron's distributed checkpoint
        tokenizer.json ...
      .tmp-step_000100/      being written, or left behind by a run that was killed; removed by the next save

Files only: nothing here knows tensors or process groups.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_vp2o.config.names import CHECKPOINTS
from megatron_vp2o.errors import CheckpointError

logger = logging.getLogger(__name__)

FORMAT = 2
"""2 since prototypes are a part without averages, and the manifest has a checksum of its own."""
MANIFEST, STATE, POINTER = "manifest.json", "state.json", "latest"
CHECKSUM_LIMIT = 256 * 2**20
"""Bytes up to which a file of tensors gets a checksum; of a larger one the size has to do. Other files always get one."""
TENSORS = ".distcp"
"""How names of files of tensors end."""

SECTIONS: dict[str, type] = {"parts": list, "model": dict, "optimizer": dict, "layout": dict}
"""What the manifest of a training checkpoint has besides the files."""

_TEMPORARY = ".tmp-"
_STEP = re.compile(r"step_(\d+)$")


# --- finding ----------------------------------------------------------------------------------------------------------


def step_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return folder / f"step_{step:06d}"


def temporary_folder(target: Path) -> Path:
    """Where it is while it is being written."""
    return target.with_name(_TEMPORARY + target.name)


def latest(folder: Path) -> Path | None:
    """The checkpoint to resume from: what the pointer names, else the newest whole one; None where there is none.

    A checkpoint that the pointer names is returned even if it is damaged: loading it then says so. To go back to an older
    one, remove it.
    """
    named = _pointed(folder)
    if named is not None and named.is_dir():
        return named
    whole = [path for path in _steps(folder) if _is_whole(path)]
    if named is not None:
        logger.warning("%s names %s, which is gone; the newest whole checkpoint is %s", folder / POINTER, named.name,
                       whole[-1].name if whole else "none")  # fmt: skip
    return whole[-1] if whole else None


def resolve(path: Path) -> Path:
    """The checkpoint that a path means: a run's folder, its folder of checkpoints, or one checkpoint.

    Raises:
        CheckpointError: there is none.
    """
    if not path.is_dir():
        what = "is a file, not the folder of a run or of a checkpoint" if path.exists() else "does not exist"
        raise CheckpointError(f"checkpoint {path} {what}: correct the path")
    if path.name.startswith(_TEMPORARY):
        raise CheckpointError(f"checkpoint {path} was never finished: choose a whole one{beside(path)}")
    if (path / MANIFEST).exists() or _STEP.match(path.name):
        return path
    for folder in (path / CHECKPOINTS, path):
        found = latest(folder)
        if found is not None:
            return found
    raise CheckpointError(
        f"{path} holds no checkpoint: name a run's folder, its {CHECKPOINTS} folder, or one step_... folder in it"
    )


def _steps(folder: Path) -> list[Path]:
    """Folders of checkpoints, oldest first; no temporary ones."""
    found = [(int(match[1]), path) for path in folder.glob("step_*") if (match := _STEP.match(path.name))]
    return [path for _, path in sorted(found) if path.is_dir()]


def _pointed(folder: Path) -> Path | None:
    try:
        name = (folder / POINTER).read_text(encoding="utf-8").strip()
    except (FileNotFoundError, UnicodeDecodeError):
        return None
    return folder / name if _STEP.match(name) else None


def _is_whole(path: Path) -> bool:
    """Whether all files are there with their sizes; checksums are left for loading."""
    try:
        check_files(path, read_manifest(path), checksums=False)
    except CheckpointError:
        return False
    return True


# --- manifest ---------------------------------------------------------------------------------------------------------


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint.

    Raises:
        CheckpointError: it is missing, unreadable, or of a newer format than this code knows.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        version, files = int(manifest["format"]), manifest["files"]
        well_formed = all(isinstance(entry["size"], int) for entry in files.values()) and all(
            isinstance(manifest.get(name, kind()), kind) for name, kind in SECTIONS.items()
        )
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} has no {MANIFEST}: it is no checkpoint of this program, or was copied in part; "
            f"copy it again or choose another{beside(path)}"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise damaged(path, f"{MANIFEST} cannot be read ({type(error).__name__}: {error})") from error
    if version > FORMAT:
        raise CheckpointError(
            f"checkpoint {path} has format {version}, and this version of the program reads up to {FORMAT}: "
            "update the program"
        )
    if version > 1 and manifest.pop("crc32", None) != _own_crc32(manifest):
        raise damaged(path, f"the content of {MANIFEST} has changed since it was written")
    if not well_formed:
        raise damaged(path, f"{MANIFEST} does not have what belongs in it")
    return manifest


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write and flush to the disk, with the format's number and a checksum of the manifest itself. Raises OSError."""
    manifest = {"format": FORMAT, **manifest}
    write_json(folder / MANIFEST, manifest | {"crc32": _own_crc32(manifest)})


def _own_crc32(manifest: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(manifest, sort_keys=True).encode())


def describe(file: Path) -> dict[str, int]:
    """Size, and checksum unless it is a large file of tensors."""
    size = file.stat().st_size
    return {"size": size} if size > CHECKSUM_LIMIT and file.suffix == TENSORS else {"size": size, "crc32": _crc32(file)}


def files_of(path: Path) -> list[str]:
    """Names of a checkpoint's files, manifest excluded, in order."""
    names = (file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
    return sorted(name for name in names if name != MANIFEST)


def check_files(path: Path, manifest: dict[str, Any], *, checksums: bool = True, part: int = 0, parts: int = 1) -> None:
    """Compare the files with the manifest; of the checksums only those of one part, where ranks share them out.

    Raises:
        CheckpointError: a file is missing, cut short or changed.
    """
    for number, (name, expected) in enumerate(sorted(manifest["files"].items())):
        file = path / name
        if not file.is_file():
            raise damaged(path, f"{name} is missing")
        size = file.stat().st_size
        if size != expected["size"]:
            raise damaged(path, f"{name} has {size} bytes where {expected['size']} were written")
        if checksums and number % parts == part and "crc32" in expected and _crc32(file) != expected["crc32"]:
            raise damaged(path, f"the content of {name} has changed since it was written")


def _crc32(file: Path) -> int:
    checksum = 0
    with file.open("rb") as stream:
        while block := stream.read(2**20):
            checksum = zlib.crc32(block, checksum)
    return checksum


def damaged(path: Path, what: str) -> CheckpointError:
    """The error for a checkpoint that is not as it was written; `what` says in which way."""
    return CheckpointError(
        f"checkpoint {path} is damaged: {what}; restore it from a copy, or remove that folder to use an older "
        f"one{beside(path)}"
    )


def beside(path: Path) -> str:
    """Names of the other checkpoints in the folder of this one, for the end of a message."""
    others = [other.name for other in _steps(path.parent) if other != path]
    return f" (beside it: {', '.join(others)})" if others else " (there is no other beside it)"


# --- writing ----------------------------------------------------------------------------------------------------------


def begin(target: Path) -> Path:
    """Clear away what killed runs left, and make an empty temporary folder for `target`. Raises OSError."""
    target.parent.mkdir(parents=True, exist_ok=True)
    for left in target.parent.glob(f"{_TEMPORARY}*"):
        discard(left)
    temporary = temporary_folder(target)
    temporary.mkdir()
    return temporary


def discard(path: Path) -> None:
    """Remove a file or folder, if it is there. Raises OSError."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_json(file: Path, content: Any) -> None:
    """Write and flush to the disk. Raises OSError."""
    write_bytes(file, (json.dumps(content, indent=1) + "\n").encode())


def write_bytes(file: Path, content: bytes) -> None:
    """Write and flush to the disk. Raises OSError."""
    with file.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def publish(temporary: Path, target: Path, keep: int) -> None:
    """Make a complete temporary folder the newest checkpoint, in one step; then delete all but the `keep` newest.

    Raises OSError as long as the new checkpoint is not the newest; trouble with deleting is only warned of.
    """
    folder = target.parent
    with _synced(temporary):
        pass
    if target.exists():  # of a run that was killed before its pointer was written
        target.rename(folder / f"{_TEMPORARY}old-{target.name}")
    with _synced(folder):
        temporary.rename(target)
    pointer = folder / f"{_TEMPORARY}{POINTER}"
    write_bytes(pointer, f"{target.name}\n".encode())
    with _synced(folder):
        pointer.rename(folder / POINTER)
    _delete_old(target, keep)


def _delete_old(newest: Path, keep: int) -> None:
    """Older checkpoints beyond `keep`. Renamed first, so that what carries a checkpoint's name is always whole."""
    older = _steps(newest.parent)
    older = older[: older.index(newest)]
    try:
        for path in older[: max(0, len(older) + 1 - keep)]:
            doomed = path.rename(path.with_name(f"{_TEMPORARY}old-{path.name}"))
            discard(doomed)
        discard(newest.with_name(f"{_TEMPORARY}old-{newest.name}"))
    except OSError as error:
        logger.warning("an old checkpoint could not be deleted: %s", error)


@contextmanager
def _synced(folder: Path) -> Iterator[None]:
    """Flush a folder's names to the disk after the body."""
    yield
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
