"""What a run finds on the disk before it starts: its own folder, and the files and folders that its settings name."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from megatron_vp2o.config.continuity import changes
from megatron_vp2o.config.names import CHECKPOINTS, RECORD_FILE
from megatron_vp2o.config.register import recipe_names
from megatron_vp2o.config.schema import DataSource, Resume, SupervisedConfig, TrainConfig

LONGEST_COMPONENT = 255
"""Bytes of a file's or folder's name, on every common Linux file system."""


def folder_problems(config: TrainConfig) -> Iterator[str]:
    """One line for each; only looks, and creates nothing."""
    yield from _run_folder(config)
    yield from _named_folders(config)
    if isinstance(config.algorithm, SupervisedConfig):
        yield from _data_files(config.algorithm)


def _run_folder(config: TrainConfig) -> Iterator[str]:
    run_dir = Path(config.run_dir)
    if problem := _bad_name(config.name) or (not config.run_dir and "is empty: name a folder"):
        yield f"{'run_dir' if not config.run_dir else 'name'}={_shown(config.run_dir and config.name)} {problem}"
        return
    if problem := _bad_path(config.run_dir):
        yield f"run_dir={_shown(config.run_dir)} {problem}; choose another run_dir or name"
        return
    if run_dir.is_symlink() and not run_dir.exists():
        yield (
            f"run_dir={config.run_dir} is a link to {os.readlink(run_dir)}, which does not exist: "
            "make that folder, remove the link, or choose another run_dir or name"
        )
        return
    if run_dir.exists() and not run_dir.is_dir():
        yield f"run_dir={config.run_dir} is a file: choose another run_dir or name"
        return
    here = Path.cwd()
    if run_dir.resolve() in (here, *here.parents):
        yield (
            f"run_dir={config.run_dir} is the working folder or one above it, and a run has a folder of its own: name one inside, "
            "such as runs/NAME"
        )
        return
    nearest = next(folder for folder in (run_dir, *run_dir.absolute().parents) if folder.exists())
    if not nearest.is_dir():
        yield f"run_dir={config.run_dir} lies below {nearest}, which is a file: choose another run_dir or name"
        return
    if not os.access(nearest, os.W_OK | os.X_OK):
        yield f"run_dir={config.run_dir}: no permission to write in {nearest}: choose another run_dir or name"
        return
    yield from _earlier_run(config, run_dir)


def _bad_name(name: str) -> str:
    """What is wrong with a run's name; empty where nothing is. It is part of a path, and shown by trackers."""
    if not name.strip():
        return "is empty: give the run a name, for its folder and its plots"
    if ".." in Path(name).parts or name.strip() == ".":
        return "would put the run's folder elsewhere: choose a name without ..; run_dir says where the folder is"
    if not name.isprintable():
        return "has characters that cannot be shown: choose letters, digits and signs"
    return ""


def _bad_path(path: str) -> str:
    """Why no file or folder can have this path; empty where one can."""
    if not path:
        return "is empty: name a folder, or set null"
    if "\0" in path:
        return "holds a null character, which no path can"
    if any(0xD800 <= ord(character) <= 0xDFFF for character in path):
        return "holds half a surrogate pair, which no path can"
    for part in Path(path).parts:
        if (size := len(os.fsencode(part))) > LONGEST_COMPONENT:
            return (
                f"has a component of {size} bytes ({part[:20]}...), and a file's name has at most {LONGEST_COMPONENT}"
            )
    return ""


def _shown(text: str) -> str:
    """A text that may be empty or hold anything, short and on one line."""
    quoted = text if text and text.isprintable() and text == text.strip() else repr(text)
    return quoted if len(quoted) <= 80 else f"{quoted[:80]}..."


def _named_folders(config: TrainConfig) -> Iterator[str]:
    if config.init_from is not None:
        if problem := _bad_path(config.init_from):
            yield f"init_from={_shown(config.init_from)} {problem}"
        elif not _is_there(Path(config.init_from)):
            made_by = Path(config.init_from).name
            hint = f" (`--config-name {made_by}` makes it)" if made_by in recipe_names() else ""
            yield f"init_from={config.init_from} does not exist: run what makes it first{hint}, correct the path, or set null"
    data = getattr(config.algorithm, "data", None)
    tokenizers = {"task": config.task.tokenizer, "algorithm.data": None if data is None else data.tokenizer}
    for section, folder in tokenizers.items():
        if folder is not None and (_bad_path(folder) or not _is_there(Path(folder)) or not Path(folder).is_dir()):
            yield (
                f"{section}.tokenizer={_shown(folder)} is not a folder: "
                "name one with a Hugging Face tokenizer in it, or null for the task's own"
            )


def _is_there(path: Path) -> bool:
    """Whether there is something that may be looked at."""
    try:
        return path.exists()
    except OSError:  # no permission to enter one of its folders
        return False


def _data_files(algorithm: SupervisedConfig) -> Iterator[str]:
    data = algorithm.data
    if data.source is DataSource.task or data.path is None:
        return
    for suffix in ("",) if data.source is DataSource.jsonl else (".bin", ".idx"):
        path = data.path + suffix
        if _bad_path(path) or not _is_there(Path(path)) or not Path(path).is_file():
            yield (
                f"algorithm.data.path={_shown(data.path)}: there is no file {_shown(path)}; "
                "correct the path or use algorithm.data.source=task"
            )
        elif not os.access(path, os.R_OK):
            yield f"algorithm.data.path={data.path}: no permission to read {path}; change that, or name another file"


def _earlier_run(config: TrainConfig, run_dir: Path) -> Iterator[str]:
    """What is wrong with going on with, or starting over, the run that the folder holds, if it holds one."""
    has_checkpoint = any(path.is_dir() for path in (run_dir / CHECKPOINTS).glob("[!.]*"))
    record = run_dir / RECORD_FILE
    has_run = has_checkpoint or (record.exists() and record.stat().st_size > 0)
    if config.resume is Resume.never and has_run:
        yield (
            f"resume=never, but run_dir={config.run_dir} already holds a run: "
            "choose another name or run_dir, remove that folder, or use resume=auto"
        )
    if config.resume is Resume.must and not has_checkpoint:
        yield (
            f"resume=must, but run_dir={config.run_dir} has no checkpoint: correct run_dir, or use resume=auto to start"
        )
    if config.resume is not Resume.never and has_run:
        yield from _other_settings(config, run_dir, has_checkpoint)


def _other_settings(config: TrainConfig, run_dir: Path, has_checkpoint: bool) -> Iterator[str]:
    """A run of another task, algorithm or model cannot be continued, and must not be overwritten by starting anew; nor can
    one be continued whose data would be out of place."""
    found = changes(config, run_dir)
    if found.another_run:
        yield (
            f"run_dir={config.run_dir} holds another run ({_some(found.another_run)}): "
            "choose another name or run_dir, or remove that folder"
        )
    elif found.misplaced and has_checkpoint:
        yield (
            f"run_dir={config.run_dir} holds a run whose data would be repeated or skipped from here on "
            f"({_some(found.misplaced)}): keep its settings, or start a new run from its weights "
            f"(init_from={config.run_dir} and another name)"
        )


def _some(changes: list[str]) -> str:
    return "; ".join(changes[:4]) + ("; ..." if len(changes) > 4 else "")
