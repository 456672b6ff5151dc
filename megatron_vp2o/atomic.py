"""Files that a reader, or a run killed meanwhile, sees whole: the old one or the new one, never a part."""

from __future__ import annotations

import os
from pathlib import Path


def write_text(path: Path, text: str) -> Path:
    """Write a UTF-8 file and flush it to the disk, then put it in the place of an older one. Returns its path.

    One process calls this for a path. The folder is made where it is missing.

    Raises:
        OSError: the disk is full, say; what was there before is untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
