"""The folder of checkpoints: what is found in it, what is kept, and that a kill at any moment costs at most the new one."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest

from megatron_vp2o.errors import CheckpointError
from megatron_vp2o.megatron.checkpoint import folder


def write(checkpoints: Path, step: int, keep: int = 2, content: str = "data", tensors: str = "tensors") -> Path:
    """A checkpoint of two files."""
    target = folder.step_folder(checkpoints, step)
    temporary = folder.begin(target)
    folder.write_bytes(temporary / tensors, content.encode() * 100)
    folder.write_json(temporary / folder.STATE, {"step": step})
    entries = {name: folder.describe(temporary / name) for name in folder.files_of(temporary)}
    folder.write_manifest(temporary, {"step": step, "files": entries})
    folder.publish(temporary, target, keep)
    return target


def is_whole(path: Path) -> bool:
    try:
        folder.check_files(path, folder.read_manifest(path))
    except CheckpointError:
        return False
    return True


# --- keeping ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_are_kept(tmp_path: Path, keep: int) -> None:
    for step in (5, 10, 100, 1_000_000):
        write(tmp_path, step, keep)
    names = ["step_000005", "step_000010", "step_000100", "step_1000000"][-keep:]
    assert sorted(os.listdir(tmp_path)) == ["latest", *names]
    assert (tmp_path / "latest").read_text() == "step_1000000\n"


def test_what_killed_runs_left_is_cleared_away(tmp_path: Path) -> None:
    write(tmp_path, 1)
    (tmp_path / ".tmp-step_000002").mkdir()
    (tmp_path / ".tmp-step_000002" / "tensors").write_text("half")
    (tmp_path / ".tmp-latest").write_text("step_0000")
    write(tmp_path, 3)
    assert sorted(os.listdir(tmp_path)) == ["latest", "step_000001", "step_000003"]


def test_a_step_can_be_saved_again(tmp_path: Path) -> None:
    """As after a kill between a checkpoint's renaming and its pointer's."""
    write(tmp_path, 1)
    write(tmp_path, 2, content="old")
    (tmp_path / "latest").write_text("step_000001\n")
    assert folder.latest(tmp_path) == tmp_path / "step_000001"
    write(tmp_path, 2, content="new")
    assert (tmp_path / "step_000002" / "tensors").read_text().startswith("new")
    assert sorted(os.listdir(tmp_path)) == ["latest", "step_000001", "step_000002"]


def test_later_steps_of_another_course_are_not_counted(tmp_path: Path) -> None:
    """Someone went back to step 1: the pointer says so, and the next save must not delete what it goes on from."""
    write(tmp_path, 1, keep=9)
    write(tmp_path, 20, keep=9)
    (tmp_path / "latest").write_text("step_000001\n")
    write(tmp_path, 2, keep=2)
    assert sorted(os.listdir(tmp_path)) == ["latest", "step_000001", "step_000002", "step_000020"]
    assert folder.latest(tmp_path) == tmp_path / "step_000002"


# --- finding ----------------------------------------------------------------------------------------------------------


def test_nothing_to_resume_from(tmp_path: Path) -> None:
    assert folder.latest(tmp_path) is None
    assert folder.latest(tmp_path / "absent") is None
    folder.begin(tmp_path / "step_000001")
    assert folder.latest(tmp_path) is None


@pytest.mark.parametrize("pointer", [None, "", "../elsewhere\n", "step_000009\n", b"\xff\xfe"])
def test_without_a_good_pointer_it_is_the_newest_whole_one(
    tmp_path: Path, pointer: str | bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (1, 2, 10, 11):
        write(tmp_path, step, keep=9)
    os.truncate(tmp_path / "step_000011" / "tensors", 3)
    (tmp_path / ".tmp-step_000012").mkdir()
    (tmp_path / "step_000013").write_text("a file")
    if pointer is None:
        (tmp_path / "latest").unlink()
    else:
        (tmp_path / "latest").write_bytes(pointer if isinstance(pointer, bytes) else pointer.encode())
    with caplog.at_level(logging.WARNING):
        assert folder.latest(tmp_path) == tmp_path / "step_000010"
    assert ("which is gone" in caplog.text) == (pointer == "step_000009\n")


def test_a_damaged_checkpoint_is_not_passed_over_in_silence(tmp_path: Path) -> None:
    write(tmp_path, 1)
    newest = write(tmp_path, 2)
    (newest / "tensors").unlink()
    assert folder.latest(tmp_path) == newest
    with pytest.raises(CheckpointError, match=r"tensors is missing; .*remove that folder.*\(beside it: step_000001\)"):
        folder.check_files(newest, folder.read_manifest(newest))
    shutil.rmtree(newest)
    assert folder.latest(tmp_path) == tmp_path / "step_000001"


def test_resolve(tmp_path: Path) -> None:
    run = tmp_path / "run"
    newest = write(run / "checkpoints", 7)
    copied = tmp_path / "copied"
    shutil.copytree(newest, copied)
    assert folder.resolve(run) == folder.resolve(run / "checkpoints") == folder.resolve(newest) == newest
    assert folder.resolve(copied) == copied


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent", r"absent does not exist: correct the path"),
        ("file", r"file is a file, not the folder"),
        ("empty", r"empty holds no checkpoint: name a run's folder"),
        (".tmp-step_000003", r"\.tmp-step_000003 was never finished: choose a whole one \(beside it: step_000001\)"),
    ],
)
def test_resolve_says_what_is_wrong(tmp_path: Path, name: str, message: str) -> None:
    write(tmp_path, 1)
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / ".tmp-step_000003").mkdir()
    with pytest.raises(CheckpointError, match=message):
        folder.resolve(tmp_path / name)


@pytest.mark.parametrize(
    "manifest", ['{"format": 1}', '{"format": 1, "files": {"tensors": {}}}', '{"format": "x", "files": {}}', "null", ""]
)
def test_a_manifest_of_another_shape_is_refused(tmp_path: Path, manifest: str) -> None:
    path = write(tmp_path, 1)
    (path / folder.MANIFEST).write_text(manifest)
    with pytest.raises(CheckpointError, match=r"step_000001 is damaged: manifest\.json cannot be read"):
        folder.read_manifest(path)


def test_large_files_are_told_by_their_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "CHECKSUM_LIMIT", 5)
    path = write(tmp_path, 1, tensors="tensors.distcp")
    entries = json.loads((path / folder.MANIFEST).read_text())["files"]
    assert entries["tensors.distcp"] == {"size": 400} and "crc32" in entries["state.json"]


# --- kills ------------------------------------------------------------------------------------------------------------


def killed_at(moment: int, checkpoints: Path, step: int) -> bool:
    """Save in a process that is killed before its n-th operation on files. Returns whether it was."""
    child = os.fork()
    if child == 0:
        _kill_at(moment, str(checkpoints))
        write(checkpoints, step)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL)
    return status != 0


def _kill_at(moment: int, checkpoints: str) -> None:
    seen = 0

    def hook(event: str, args: tuple[object, ...]) -> None:
        nonlocal seen
        inside = event in ("open", "os.mkdir", "os.rename", "os.listdir", "os.scandir") and checkpoints in str(args[0])
        if inside or event in ("os.remove", "os.rmdir"):  # these name their file relative to a folder
            seen += 1
            if seen == moment:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # forking where other tests started threads
def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    """Before every operation on files that a save does: first on a folder like new, then on what the kills left."""
    checkpoints = tmp_path / "checkpoints"
    for step in (1, 2):
        write(checkpoints, step)
    original = tmp_path / "original"
    shutil.copytree(checkpoints, original)
    for fresh in (True, False):
        ends = []
        for moment in range(1, 100):
            if fresh:
                shutil.rmtree(checkpoints)
                shutil.copytree(original, checkpoints)
            killed = killed_at(moment, checkpoints, 3)
            found = folder.latest(checkpoints)
            assert found is not None and is_whole(found), moment
            assert found.name in ("step_000002", "step_000003"), moment
            assert all(is_whole(path) for path in checkpoints.glob("step_*")), moment
            ends.append(found.name)
            if not killed:
                break
        assert not killed and found is not None and found.name == "step_000003"
        assert len(ends) > 15  # there were that many moments
        assert not fresh or (ends == sorted(ends) and ends[0] == "step_000002")
        assert sorted(os.listdir(checkpoints)) == ["latest", "step_000002", "step_000003"]
