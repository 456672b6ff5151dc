"""A function or class of the user's, named by a setting: `package.module:name` or `file.py:name`."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

from megatron_vp2o.errors import UserError


def load(setting: str, path: str, kind: str, error: type[UserError]) -> Any:
    """The callable that `setting` names as `path`.

    Args:
        kind: what it is, "function" or "class", for messages.
        error: what to raise.

    Raises:
        UserError: there is no such file, module or name, or its import raises; says which.
    """
    place, _, name = path.rpartition(":")
    said = f"{setting}={path}"
    module = _from_file(said, place, error) if place.endswith(".py") else _from_name(said, place, error)
    found = getattr(module, name, None)
    if not callable(found):
        names = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise error(f"{said}: {place} has no {kind} {name}; it has {', '.join(names[:8]) or 'none'}")
    return found


def _from_file(said: str, file: str, error: type[UserError]) -> Any:
    if not Path(file).is_file():
        raise error(f"{said}: there is no file {Path(file).absolute()}")
    name = f"vp2o_own_{Path(file).stem}"
    specification = importlib.util.spec_from_file_location(name, file)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module  # dataclasses and pickle look a class's module up
    try:
        specification.loader.exec_module(module)
    except Exception as raised:
        raise error(f"{said}: importing it raises {type(raised).__name__}: {raised}") from raised
    return module


def _from_name(said: str, name: str, error: type[UserError]) -> Any:
    try:
        return importlib.import_module(name)
    except Exception as raised:
        raise error(f"{said}: importing {name} raises {type(raised).__name__}: {raised}") from raised
