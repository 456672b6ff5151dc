"""What the documentation names is there: files, functions in them, pages, commands."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.distributed import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
NAMED = re.compile(r"`((?:[\w.]+/)+[\w.*-]*|\w+\.py)(?::([A-Za-z_]\w*))?(?:\(.*?\))?`")


def found(name: str) -> list[Path]:
    """Files or folders of that name, below the repository, the package or its Megatron part."""
    roots = (
        ROOT,
        ROOT / "megatron_vp2o",
        ROOT / "megatron_vp2o" / "megatron",
        ROOT / "megatron_vp2o" / "megatron" / "stein",
    )
    pattern = name.rstrip("/")
    return [
        path for root in roots for path in (root.glob(pattern) if "*" in pattern else [root / pattern]) if path.exists()
    ]


def names_in(path: Path) -> set[str]:
    """Everything that a module defines at any level."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    defined = {node.name for node in ast.walk(tree) if isinstance(node, definitions)}
    targets = [t for node in ast.walk(tree) if isinstance(node, ast.Assign) for t in node.targets]
    annotated = [node.target for node in ast.walk(tree) if isinstance(node, ast.AnnAssign)]
    return defined | {t.id for t in [*targets, *annotated] if isinstance(t, ast.Name)}


@pytest.mark.parametrize("page", ["docs/tour.md", "docs/glossary.md", "CONTRIBUTING.md"])
def test_files_and_functions_that_a_page_names_are_there(page: str) -> None:
    wrong, seen = [], 0
    for name, member in NAMED.findall((ROOT / page).read_text(encoding="utf-8")):
        if name.startswith(("my_", "path/")) or "NAME" in name or ("/" not in name and not found(name)):
            continue  # the reader's own file, or one whose folder the sentence has named
        seen += 1
        files = found(name)
        if not files:
            wrong.append(name)
        elif member and not any(path.is_file() and member in names_in(path) for path in files):
            wrong.append(f"{name}:{member}")
    assert wrong == []
    assert seen > 10


def test_readme_links_every_page() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [page.name for page in (ROOT / "docs").glob("*.md") if f"docs/{page.name}" not in readme] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8"))
    broken = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert broken == []


def test_make_targets_that_pages_name_are_there() -> None:
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    named = {
        (page.name, target)
        for page in PAGES
        for target in re.findall(
            r"(?:`|^ {4})make ([a-z][a-z-]*)", page.read_text(encoding="utf-8"), flags=re.MULTILINE
        )
    }
    assert len(named) > 20
    assert {pair for pair in named if pair[1] not in targets} == set()
