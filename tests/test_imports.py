"""Imports go down only: the direction between the packages, and what each may take from outside."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "megatron_vp2o"

# What each part of the package may import of the others. `rl.types` and `rl.interfaces` are the vocabulary that they share.
BELOW: dict[str, set[str]] = {
    "errors": set(),
    "atomic": set(),
    "cores": set(),
    "own_code": {"errors"},
    "core": set(),
    "config": {"atomic", "errors", "core.choices"},  # names only
    "cli": {"config", "errors"},
    "parallel": {"core", "config", "errors"},
    "data": {"core", "config", "errors", "rl.types", "rl.interfaces"},
    "tracking": {"atomic", "core", "config", "errors", "rl.types", "rl.interfaces"},
    "report": {"atomic", "tracking", "config", "errors"},
    # of hf: names and shapes; of tracking: how metrics aggregate
    "megatron": {
        "cores",
        "hf",
        "parallel",
        "core",
        "config",
        "errors",
        "data",
        "rl.types",
        "rl.interfaces",
        "tracking.schema",
        "rollout.protocol",
    },
    "rollout": {"parallel", "core", "config", "errors", "rl.types", "rl.interfaces"},
    "hf": {"parallel", "core", "config", "errors", "rl.types", "rl.interfaces"},
    "rewards": {"own_code", "cores", "config", "errors", "rl.types", "rl.interfaces"},
    "tasks": {"own_code", "data", "core", "config", "errors", "rl.types", "rl.interfaces"},
    "rl": {"parallel", "core", "config", "errors", "data", "tracking"},
    "launch": {"config", "errors", "hf.reader"},
    "study": {
        "atomic",
        "cores",
        "core",
        "tracking",
        "config",
        "errors",
        "megatron",
    },  # starts runs by their command line, as a person would
    "diagnostics": {"core", "errors"},  # for any loop: without Megatron and without the project's settings
    "evaluation": {
        "rollout.launch",
        "megatron",
        "hf",
        "parallel",
        "core",
        "config",
        "errors",
        "data",
        "rewards",
        "rl.types",
        "rl.interfaces",
        "rl.grading",
        "tasks.tokenizer",
        "study.statistics",
        "report",
        "tracking",
    },
    "plugins": {"megatron", "core", "config", "errors", "__version__"},
    "planning": {"rl", "tasks", "hf", "megatron", "parallel", "core", "config", "errors", "data"},
}
# The rooms inside `megatron/`, and which of the others each may use.
ROOMS: dict[str, set[str]] = {
    "platform": set(),
    "model": {"platform"},
    "stein": {"model", "platform"},
    "learner": {"model", "platform"},
    "actor": {"learner", "model", "platform"},
    "control": {"learner", "stein", "model", "platform"},
    "checkpoint": {"control", "actor", "learner", "stein", "model", "platform"},
    "hf": {"checkpoint", "control", "actor", "learner", "stein", "model", "platform"},
    "stored": {"hf", "checkpoint", "actor", "model", "platform"},
    "indexed": set(),
}
COMPOSITION = {
    "session",
    "serve",
    "serving",
    "train",
    "evaluate",
    "nemo_train",
    "__init__",
}  # may import everything, and nothing imports them
STANDARD = set(sys.stdlib_module_names)
WITHOUT_TORCH = {"errors", "atomic", "config", "cli"}  # what `--help` imports


@dataclass(frozen=True)
class Import:
    """One import: which module of ours does it, of what, on which line, and whether it runs when the module is imported."""

    part: str  # first name below the package
    file: str
    line: int
    name: str
    at_import: bool

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.name}"


def _imports() -> Iterator[Import]:
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        relative = path.relative_to(ROOT)
        part = relative.parts[1].removesuffix(".py")
        tree = ast.parse(path.read_text(encoding="utf-8"))
        inside = {
            id(node)
            for function in ast.walk(tree)
            if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) or _is_type_checking(function)
            for node in ast.walk(function)
        }
        for node in ast.walk(tree):
            for name in _names(node):
                yield Import(part, str(relative), node.lineno, name, id(node) not in inside)  # type: ignore[attr-defined]


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def _names(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        module = "." * node.level + (node.module or "")
        return [f"{module}.{alias.name}" for alias in node.names] if module.startswith(PACKAGE) else [module]
    if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
        return [node.args[0].value] if isinstance(node.args[0], ast.Constant) else []  # type: ignore[list-item]
    return []


IMPORTS = list(_imports())


def _report(wrong: list[Import]) -> None:
    assert not wrong, "\n".join(map(str, wrong))


def test_the_walk_sees_the_package() -> None:
    assert {"core", "megatron", "rl", "config"} <= {found.part for found in IMPORTS}
    assert any(found.name == "megatron.core.models.gpt" for found in IMPORTS)


def test_every_part_has_a_rule() -> None:
    parts = {
        path.stem for path in (ROOT / PACKAGE).iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert parts <= BELOW.keys() | COMPOSITION, parts - BELOW.keys() - COMPOSITION


def test_no_relative_imports() -> None:
    _report([found for found in IMPORTS if found.name.startswith(".")])


def test_imports_go_down_only() -> None:
    def allowed(found: Import) -> bool:
        target = found.name.removeprefix(f"{PACKAGE}.")
        permitted = BELOW[found.part] | {found.part}
        return any(target == part or target.startswith(f"{part}.") for part in permitted)

    internal = [found for found in IMPORTS if found.name.startswith(f"{PACKAGE}.")]
    _report([found for found in internal if found.part not in COMPOSITION and not allowed(found)])


def test_every_room_has_a_rule() -> None:
    folder = ROOT / PACKAGE / "megatron"
    rooms = {path.stem for path in folder.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert rooms - {"__init__"} == ROOMS.keys()


def test_imports_between_rooms_go_down_only() -> None:
    prefix = f"{PACKAGE}.megatron."

    def allowed(found: Import) -> bool:
        room = Path(found.file).relative_to(f"{PACKAGE}/megatron").parts[0].removesuffix(".py")
        return found.name.removeprefix(prefix).split(".")[0] in ROOMS[room] | {room}

    _report(
        [
            found
            for found in IMPORTS
            if found.part == "megatron" and found.name.startswith(prefix) and not allowed(found)
        ]
    )


def test_nothing_imports_the_composition_root() -> None:
    roots = tuple(f"{PACKAGE}.{name}" for name in ("session", "train"))
    _report([found for found in IMPORTS if found.name.startswith(roots) and found.part not in COMPOSITION])


def test_core_is_torch_only() -> None:
    outside = [found for found in IMPORTS if found.part == "core" and not found.name.startswith(PACKAGE)]
    _report([found for found in outside if found.name.split(".")[0] not in STANDARD | {"torch"}])
    _report([found for found in outside if found.name.startswith("torch.distributed")])


def test_parallel_does_not_know_megatron() -> None:
    outside = [found for found in IMPORTS if found.part == "parallel" and not found.name.startswith(PACKAGE)]
    _report([found for found in outside if found.name.split(".")[0] not in STANDARD | {"torch", "triton"}])
    _report([found for found in outside if found.name.startswith("triton") and "/triton_" not in found.file])


def test_only_the_megatron_package_imports_megatron() -> None:
    found = [found for found in IMPORTS if found.name.split(".")[0] == "megatron"]
    _report([one for one in found if one.part not in {"megatron", "plugins"}])


def test_diagnostics_need_torch_and_transformers_only() -> None:
    outside = [found for found in IMPORTS if found.part == "diagnostics" and not found.name.startswith(PACKAGE)]
    allowed = STANDARD | {"torch", "transformers", "safetensors", "huggingface_hub"}  # transformers brings the last two
    _report([found for found in outside if found.name.split(".")[0] not in allowed])


def test_a_host_is_imported_by_its_own_plug_in_only() -> None:
    hosts = {"verl": "plugins/verl/", "slime": "plugins/slime.py"}
    found = [found for found in IMPORTS if found.name.split(".")[0] in hosts]
    _report([one for one in found if hosts[one.name.split(".")[0]] not in one.file])
    _report([one for one in found if one.name.startswith("slime") and one.at_import])
    _report([one for one in IMPORTS if one.name.startswith("megatron.training") and one.at_import])


def test_torch_stays_out_of_what_help_imports() -> None:
    heavy = ("torch", "transformers", "megatron.")
    _report([found for found in IMPORTS if found.part in WITHOUT_TORCH and found.name.startswith(heavy)])
    _report([found for found in IMPORTS if found.part == "train" and found.at_import and "session" in found.name])


@pytest.mark.smoke
def test_importing_the_command_line_loads_no_torch() -> None:
    """What the rules are for, seen at run time."""
    code = (
        "import sys, megatron_vp2o.train, megatron_vp2o.cli, megatron_vp2o.config.validate, megatron_vp2o.config.store\n"
        "print([name for name in ('torch', 'megatron.core', 'transformers', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.strip() == "[]"
