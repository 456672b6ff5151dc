"""The wheel, the installer, the Makefile and the scripts, as a newcomer meets them."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import torch
from packaging.requirements import Requirement

from tests.wheel import build_wheel, install_wheel

ROOT = Path(__file__).resolve().parent.parent


def run(*command: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))} | environment
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install_wheel(wheel, tmp_path_factory.mktemp("site"))


@pytest.mark.smoke
def test_wheel_holds_every_module_and_every_configuration_file(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "megatron_vp2o").rglob("*.py")}
    configuration = {f"megatron_vp2o/_{path.relative_to(ROOT)}" for path in (ROOT / "conf").rglob("*.yaml")}
    recipes = {f"megatron_vp2o/_{path.relative_to(ROOT)}" for path in (ROOT / "recipes").rglob("*.yaml")}
    assert configuration and recipes
    assert modules | configuration | recipes | {"megatron_vp2o/py.typed"} <= names
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"megatron_vp2o"}, "nothing beside the package"
    assert any(name.endswith("LICENSE") for name in names)


@pytest.mark.smoke
def test_an_installed_wheel_composes_a_recipe_far_from_the_checkout(installed: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "megatron_vp2o.train", "--config-name", "countdown_tiny_grpo", "--cfg", "job"]
    done = run(*command, cwd=tmp_path, PYTHONPATH=str(installed))
    assert done.returncode == 0, done.stderr
    assert "group_size:" in done.stdout
    where = "from megatron_vp2o.config.register import resource_dir as r; print(r('conf'), r('recipes'))"
    folders = run(sys.executable, "-c", where, cwd=tmp_path, PYTHONPATH=str(installed)).stdout.split()
    assert folders == [str(installed / "megatron_vp2o" / "_conf"), str(installed / "megatron_vp2o" / "_recipes")]


def metadata(wheel: Path) -> str:
    archive = zipfile.ZipFile(wheel)
    (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    return archive.read(name).decode()


def test_metadata_says_licence_pythons_and_extras(wheel: Path) -> None:
    text = metadata(wheel)
    assert "License-Expression: Apache-2.0" in text
    assert re.search(r"Requires-Python: (>=3\.11,<3\.13|<3\.13,>=3\.11)", text)
    assert set(re.findall(r"Provides-Extra: (\S+)", text)) == {
        "dev",
        "rows",
        "rewards",
        "gpu",
        "nemo",
        "nemo-toolkit",
        "eval",
        "verl",
        "vllm",
    }


@pytest.mark.parametrize(
    ("python", "accepted", "refused"),
    [("3.11", "0.16.1", "0.19.2"), ("3.12", "0.19.2", "0.16.1")],
)
def test_each_python_has_its_megatron_core(wheel: Path, python: str, accepted: str, refused: str) -> None:
    lines = [line.removeprefix("Requires-Dist: ") for line in metadata(wheel).splitlines() if "Requires-Dist" in line]
    wanted = [r for r in map(Requirement, lines) if r.name == "megatron-core"]
    (one,) = [r for r in wanted if r.marker is not None and r.marker.evaluate({"python_version": python, "extra": ""})]
    assert one.specifier.contains(accepted)
    assert not one.specifier.contains(refused)


def test_every_requirement_without_an_extra_has_a_lower_bound(wheel: Path) -> None:
    lines = [line.removeprefix("Requires-Dist: ") for line in metadata(wheel).splitlines() if "Requires-Dist" in line]
    free = [line for line in lines if "extra ==" not in line and ">=" not in line]
    assert free == []


def test_what_a_run_with_a_tokenizer_folder_imports_is_no_extra(wheel: Path) -> None:
    lines = [line.removeprefix("Requires-Dist: ") for line in metadata(wheel).splitlines() if "Requires-Dist" in line]
    plain = {Requirement(line).name for line in lines if "extra ==" not in line}
    assert {"transformers", "tokenizers", "safetensors"} <= plain


def test_apex_of_pypi_is_asked_for_nowhere(wheel: Path) -> None:
    assert not re.search(r"^Requires-Dist: apex\b", metadata(wheel), re.MULTILINE)


def test_finder_names_a_supported_interpreter_by_path() -> None:
    done = run("sh", "tools/find_python.sh", sys.executable)
    assert done.returncode == 0
    assert Path(done.stdout.strip()).samefile(sys.executable)


def test_an_unsupported_python_is_refused_in_one_line_with_the_fix(tmp_path: Path) -> None:
    old = tmp_path / "python3.10"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.10.13 && exit 0\nexit 1\n')
    old.chmod(0o755)
    done = run("make", "install", f"PYTHON={old}", PYENV_ROOT=str(tmp_path))
    assert done.returncode != 0
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert "3.11 or 3.12" in line and "Python 3.10.13" in line and "PYTHON=" in line


def test_help_lists_every_phony_target_that_a_user_may_want() -> None:
    shown = run("make", "help").stdout
    for target in (
        "install",
        "run",
        "test",
        "lint",
        "bench",
        "bench-peers",
        "gpu-check",
        "gpu-rehearsal",
        "docs",
        "clean",
    ):
        assert f"make {target} " in shown


def test_a_rehearsal_without_wheels_or_with_too_many_ends_before_anything_is_made(tmp_path: Path) -> None:
    def rehearse() -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "BASE": sys.executable, "WHEELS": str(tmp_path), "REHEARSAL_ENV": str(tmp_path / "env")}
        return subprocess.run(
            ["bash", "tools/gpu_rehearsal.sh"], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60
        )

    done = rehearse()
    assert done.returncode == 1 and done.stderr == f"gpu-rehearsal: no wheels in {tmp_path}; make wheels fetches them\n"
    (tmp_path / "large.whl").write_bytes(bytes(41 * 2**20))
    done = rehearse()
    assert done.returncode == 1 and "take 41 MiB; at most 40 can be carried" in done.stderr
    assert not (tmp_path / "env").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine with CUDA runs the real thing")
def test_gpu_check_says_in_one_line_why_it_does_nothing() -> None:
    done = run("make", "gpu-check", f"PYTHON={sys.executable}")
    assert done.returncode == 0
    assert done.stdout.startswith("gpu-check: nothing to do: ")
    assert "torch" in done.stdout and done.stdout.count("\n") == 1 and done.stderr == ""


@pytest.fixture
def installer() -> ModuleType:
    spec = importlib.util.spec_from_file_location("installer", ROOT / "tools" / "install.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_installer_returns_at_once_when_nothing_changed(
    installer: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(installer, "install", lambda venv, extras, *rest: calls.append(extras))

    def call(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["install.py", "--venv", str(tmp_path), *arguments])
        assert installer.main() == 0

    call()
    call()
    assert calls == [""]
    call("--extras", "dev")
    call()  # what was added stays, so there is nothing to do
    assert calls == ["", "dev"]
    call("--torch", "torch==2.12.0")
    assert calls == ["", "dev", ""]


def test_installer_shows_the_end_of_the_log_when_a_stage_fails(installer: ModuleType, tmp_path: Path) -> None:
    stages = installer.Stages(1, tmp_path / "log")
    with pytest.raises(installer.InstallError, match=r"no such package(.|\n)*whole log"):
        stages.run("x", [sys.executable, "-c", "print('no such package'); raise SystemExit(1)"])


def test_a_run_imports_nothing_that_an_extra_brings() -> None:
    """`pip install megatron-vp2o` alone can train; graders and readers import what they need when they are made."""
    extras = (
        "math_verify",
        "latex2sympy2_extended",
        "if_verifiable",
        "datasets",
        "pyarrow",
        "nemo_run",
        "hypothesis",
        "pyro",
    )
    done = run(
        sys.executable,
        "-c",
        f"import sys\nsys.modules.update(dict.fromkeys({extras}))\nimport megatron_vp2o.session\n"
        "assert 'megatron_vp2o.rl.trainer' in sys.modules",
    )
    assert done.returncode == 0, done.stderr[-2000:]
