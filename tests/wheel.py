"""This project's wheel, built without a network, and installed where nothing else of this project is."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md", "megatron_vp2o", "conf", "recipes")
"""What git tracks and a wheel is built of."""


def build_wheel(scratch: Path) -> Path:
    """From a copy, so that the checkout stays as it is."""
    source, out = scratch / "source", scratch / "dist"
    source.mkdir(parents=True)
    _run("cp", "-r", *NAMES, str(source), cwd=ROOT)
    options = ["-q", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(out)]
    _run(sys.executable, "-m", "pip", "wheel", *options, ".", cwd=source)
    (path,) = out.glob("*.whl")
    return path


def install_wheel(wheel: Path, folder: Path) -> Path:
    """A folder that holds the wheel's content as an installation would."""
    options = ["-q", "--no-deps", "--no-index", "--target", str(folder)]
    _run(sys.executable, "-m", "pip", "install", *options, str(wheel), cwd=folder.parent)
    return folder


def environment_with(wheel: Path, folder: Path) -> Path:
    """An environment with the wheel and this one's packages, without what is installed here in editable form; its python."""
    _run(sys.executable, "-m", "venv", "--without-pip", str(folder), cwd=folder.parent)
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    site = folder / "lib" / version / "site-packages"
    (site / "host.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")  # .pth files in there are not read
    install_wheel(wheel, site)
    return folder / "bin" / "python"


def _run(*command: str, cwd: Path) -> None:
    env = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
