"""What a study is: variants, tasks and seeds, read from one YAML file, and the runs that follow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from megatron_vp2o.errors import ConfigError

FOLDER = Path("study")
WARM_UP = "warm_up"
NAME_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyz0123456789_")


@dataclass(frozen=True)
class TaskSpec:
    """A task of a study: the recipe that warms a model up, and the one that reinforces it."""

    warm_up: str
    recipe: str
    overrides: tuple[str, ...] = ()  # of both
    warm_up_overrides: tuple[str, ...] = ()
    recipe_overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Study:
    """One study. `baseline` is the variant that all others are compared with."""

    name: str
    tasks: dict[str, TaskSpec]
    variants: dict[str, tuple[str, ...]]
    seeds: tuple[int, ...]
    baseline: str
    description: str = ""
    overrides: tuple[str, ...] = ()  # of every run
    preload: bool = False  # many small runs: fork them from one process that has imported everything (CPU only)
    first: tuple[str, ...] = ()  # variants whose runs, of all seeds and tasks, come before those of the others


@dataclass(frozen=True)
class Job:
    """One run of a study."""

    task: str
    variant: str
    seed: int
    arguments: tuple[str, ...]  # of `python -m megatron_vp2o.train`
    after: str | None = None  # name of the job whose weights it starts from
    folder: str = field(default="")

    @property
    def name(self) -> str:
        return f"{self.task}/{self.variant}/seed_{self.seed}"


def load_study(name: str) -> Study:
    """The study `study/NAME.yaml`, or the file that `name` is the path of.

    Raises:
        ConfigError: no such file, or one that is no study.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    if not path.is_file():
        there = ", ".join(sorted(p.stem for p in FOLDER.glob("*.yaml")))
        raise ConfigError(f"STUDY={name}: there is no {path}; choose one of {there}, or name a YAML file")
    try:
        body = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is no YAML: {error}") from error
    return parse_study(path.stem, body, str(path))


def parse_study(name: str, body: Any, source: str) -> Study:
    """A study from what YAML read. Raises ConfigError with everything that is wrong, one line each."""
    problems = [f"{source}: {problem}" for problem in _problems(body)]
    if problems:
        raise ConfigError("\n".join(problems))
    tasks = {
        key: TaskSpec(
            value["warm_up"],
            value["recipe"],
            *(tuple(value.get(name) or ()) for name in ("overrides", "warm_up_overrides", "recipe_overrides")),
        )
        for key, value in body["tasks"].items()
    }
    variants = {key: tuple(value or ()) for key, value in body["variants"].items()}
    return Study(
        name,
        tasks,
        variants,
        tuple(body["seeds"]),
        body["baseline"],
        body.get("description", ""),
        tuple(body.get("overrides") or ()),
        bool(body.get("preload", False)),
        tuple(body.get("first") or ()),
    )


def _problems(body: Any) -> Iterator[str]:
    known = {"description", "tasks", "variants", "seeds", "baseline", "overrides", "preload", "first"}
    needed = {"tasks": dict, "variants": dict, "seeds": list, "baseline": str}
    if not isinstance(body, dict):
        yield "a study is a mapping with tasks, variants, seeds and baseline"
        return
    for key in sorted(body.keys() - known):
        yield f"{key} is unknown: choose from {', '.join(sorted(known))}"
    for key, kind in needed.items():
        if not isinstance(body.get(key), kind) or not body[key]:
            yield f"{key}={body.get(key)!r} must be a {kind.__name__} with something in it"
            return
    if body["baseline"] not in body["variants"]:
        yield f"baseline={body['baseline']} is no variant: choose one of {', '.join(body['variants'])}"
    first = body.get("first") or []
    if not isinstance(first, list) or not set(map(str, first)) <= body["variants"].keys():
        yield f"first={first!r} must be a list of variants: choose from {', '.join(body['variants'])}"
    for group in ("tasks", "variants"):
        for name in body[group]:
            if not set(str(name)) <= NAME_CHARACTERS or name == WARM_UP:
                yield f"{group}: {name!r} is no name: use small letters, digits and _, and not {WARM_UP}"
    for seed in body["seeds"]:
        if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
            yield f"seeds: {seed!r} is no whole number from 0 on"
    if len(set(map(str, body["seeds"]))) < len(body["seeds"]):
        yield f"seeds={body['seeds']} has one twice"
    for name, task in body["tasks"].items():
        settings = set(TaskSpec.__dataclass_fields__)
        if not isinstance(task, dict) or not {"warm_up", "recipe"} <= task.keys() <= settings:
            yield f"tasks.{name}: needs warm_up and recipe (recipe names), and may have {', '.join(sorted(settings))}"


def jobs(study: Study, folder: Path) -> list[Job]:
    """Every run of a study in the order in which they are worth having: warm-ups, then seed by seed those of the variants named
    in `first`, then seed by seed the others'."""
    found = []
    for task, spec in study.tasks.items():
        place = folder / task / WARM_UP
        found.append(
            _job(study, spec, task, WARM_UP, 0, place, ["--config-name", spec.warm_up], [*spec.warm_up_overrides])
        )
    early = [variant for variant in study.variants if variant in study.first]
    late = [variant for variant in study.variants if variant not in study.first]
    for variants, seed, task in product((early, late), study.seeds, study.tasks):
        spec = study.tasks[task]
        for variant in variants:
            place = folder / task / variant / f"seed_{seed}"
            own = [
                f"seed={seed}",
                f"init_from={folder / task / WARM_UP}",
                *spec.recipe_overrides,
                *study.variants[variant],
            ]
            found.append(_job(study, spec, task, variant, seed, place, ["--config-name", spec.recipe], own))
    return found


def _job(
    study: Study, spec: TaskSpec, task: str, variant: str, seed: int, place: Path, first: list[str], own: list[str]
) -> Job:
    arguments = [*first, f"run_dir={place}", f"name={task}_{variant}_{seed}", *study.overrides, *spec.overrides, *own]
    after = None if variant == WARM_UP else f"{task}/{WARM_UP}/seed_0"
    return Job(task, variant, seed, tuple(arguments), after, str(place))


def portable(arguments: Sequence[str]) -> list[str]:
    """A run's arguments without those that say where it lies."""
    return [argument for argument in arguments if not argument.startswith(("run_dir=", "init_from=", "name="))]
