"""The configuration reference, made from the dataclasses.

`python -m megatron_vp2o.config.reference > docs/configuration.md` renews it.
"""

from __future__ import annotations

import ast
import dataclasses
import enum
import inspect
import itertools
import types
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml

from megatron_vp2o.config import schema
from megatron_vp2o.config.ranges import range_of
from megatron_vp2o.config.register import GROUPS, recipe_files, resource_dir

INTRODUCTION = """\
# Configuration

Made from `megatron_vp2o/config/schema.py` and the files beside it from which it takes parts; edit those, then run
`python -m megatron_vp2o.config.reference > docs/configuration.md`.

A run is a recipe plus overrides:

    python -m megatron_vp2o.train --config-name countdown_tiny_grpo algorithm.group_size=16 parallel=expert2

- `GROUP=CHOICE` takes a file of `conf/GROUP/`, `KEY=VALUE` sets one setting, and later ones win over earlier ones.
- Recipes of your own: a YAML file that begins with `defaults: [train, _self_]` (and `override /GROUP: CHOICE` between
  the two for other choices), and `--config-dir FOLDER --config-name FILE`. Write differences only. Yours win over ours
  of the same name.
- `--cfg job` prints the composed configuration and ends. `--multirun KEY=A,B` makes one run of each value, each in a
  folder of its own below `run_dir`. `hydra.verbose=true` logs everything.
- Texts stay as they are written (`name=2026_11_26` is no number); switches take true or false, numbers take no quotes.
- A misspelt setting, a value that cannot be, a layout that does not fit: the run ends at once with status 2 and one
  line for each mistake, causes only: numbers out of range first; combinations where those hold; missing files and
  packages where combinations do. `HYDRA_FULL_ERROR=1` in the environment shows where they come from.
- The resolved configuration and the versions it ran with are in `config.yaml` of the run folder.
"""


def field_docstrings(cls: type) -> dict[str, str]:
    """The string under each field of a dataclass, its bases' included (its own win)."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        body = ast.parse(inspect.getsource(base)).body[0].body  # type: ignore[attr-defined]
        for field, text in itertools.pairwise(body):
            is_text = isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and is_text:
                found[field.target.id] = inspect.cleandoc(text.value.value)
    return found


def type_name(hint: Any) -> str:
    """A field's type as a user would say it: an enumeration is its names, Optional adds null."""
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(type_name(part) for part in get_args(hint))
    if hint is type(None):
        return "null"
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return ", ".join(f"`{member.name}`" for member in hint)
    if get_origin(hint) is list:
        return f"list of {type_name(get_args(hint)[0])}"
    if get_origin(hint) is dict:
        return " to ".join(type_name(part) for part in get_args(hint))
    return {int: "integer", float: "number", bool: "true or false", str: "text", Any: "anything"}[hint]


def section(title: str, prefix: str, cls: type, level: int = 2) -> str:
    """A heading and a table for `cls`, then the same for the sections inside it."""
    hints, texts = get_type_hints(cls), field_docstrings(cls)
    ranges = get_type_hints(cls, include_extras=True)
    example = cls()
    rows, inner = [], []
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        name, hint = f"{prefix}{field.name}", hints[field.name]
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            if cls is not schema.TrainConfig:  # a run's own sections are listed group by group
                inner.append(section(f"`{name}`", f"{name}.", hint, level + 1))
            continue
        allowed = range_of(ranges[field.name])
        cells = (
            f"`{name}`",
            type_name(hint) + (f", {allowed}" if allowed is not None else ""),
            f"`{_yaml(getattr(example, field.name))}`",
            " ".join(texts[field.name].split()),
        )
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    table = "\n".join(["| setting | type | default | meaning |", "| --- | --- | --- | --- |", *rows])
    introduction = " ".join(inspect.cleandoc(cls.__doc__ or "").split())
    return "\n\n".join([f"{'#' * level} {title}", introduction, table, *inner])


def _yaml(value: Any) -> str:
    if isinstance(value, enum.Enum):
        return value.name
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("\n...\n").strip()


def choices(group: str) -> str:
    """The choices of a group: its dataclasses, and the files of conf/ with the comment at their head."""
    lines = [f"- `{group}={name}`: the defaults below" for name in GROUPS[group]]
    for path in sorted((resource_dir("conf") / group).glob("*.yaml")):
        if path.stem not in GROUPS[group]:
            lines.append(f"- `{group}={path.stem}`" + _head_comment(path.read_text(encoding="utf-8")))
    return "\n".join(lines)


def _head_comment(text: str) -> str:
    comment = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        comment.append(line.lstrip("# ").rstrip())
    return f": {' '.join(comment)}" if comment else ""


def reference() -> str:
    """The whole of docs/configuration.md."""
    recipes = [f"- `{name}`" + _head_comment(path.read_text(encoding="utf-8")) for name, path in recipe_files().items()]
    parts = [INTRODUCTION.rstrip(), "## Recipes", "\n".join(recipes), section("The run", "", schema.TrainConfig)]
    for group, classes in GROUPS.items():
        parts += [f"## `{group}`", choices(group)]
        for name, cls in classes.items():
            parts.append(section(f"`{group}={name}`", f"{group}.", cls, level=3))
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    print(reference(), end="")
