"""Make the virtual environment and install into it: `make install` (standard library only; runs on the bare Python).

A stamp in the environment records what it was made from, so a second call returns at once.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
INPUTS = ("setup.py", "pyproject.toml", "tools/install.py", "megatron_vp2o/__init__.py")  # a change installs again
# Needs a C compiler (pycosat has no wheel) and serves one reasoning-gym task that is not used here.
NEEDS_COMPILER = "pycosat"


class InstallError(Exception):
    """Shown as one message; `log` is where the details are."""


class Stages:
    """Prints `[2/3] torch==2.13.0 ... 37 s`, on a terminal with the seconds running."""

    def __init__(self, total: int, log: Path) -> None:
        self.total = total
        self.log = log
        self.number = 0
        self.begin = time.monotonic()

    def run(self, label: str, *commands: list[str]) -> None:
        """Run the commands of one stage, their output into the log. Raises InstallError if one fails."""
        self.number += 1
        prefix = f"[{self.number}/{self.total}] {label} ..."
        again = "\r" if sys.stdout.isatty() else ""  # rewrite the line on a terminal only
        start = time.monotonic()
        done = threading.Event()
        print(prefix, end="" if again else "\n", flush=True)

        def tick() -> None:
            while not done.wait(1.0):
                print(f"\r{prefix} {time.monotonic() - start:.0f} s", end="", flush=True)

        ticker = threading.Thread(target=tick, daemon=True)
        if again:
            ticker.start()
        try:
            for command in commands:
                self._call(command)
        finally:
            done.set()
            if ticker.is_alive():
                ticker.join()
            print(f"{again}{prefix} {time.monotonic() - start:.0f} s", flush=True)

    def _call(self, command: list[str]) -> None:
        with self.log.open("a") as log:
            log.write("$ " + " ".join(command) + "\n")
            log.flush()
            result = subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        if result.returncode != 0:
            lines = [line for line in self.log.read_text(errors="replace").splitlines() if "WARNING" not in line]
            raise InstallError("\n".join([*lines[-15:], f"failed: {' '.join(command)}", f"whole log: {self.log}"]))


def fingerprint(*extra: str) -> str:
    """Hash of everything that decides what gets installed."""
    digest = hashlib.sha256("\0".join([sys.version, str(ROOT), *extra]).encode())
    for name in INPUTS:
        digest.update((ROOT / name).read_bytes())
    return digest.hexdigest()


def can_compile() -> bool:
    """Whether C extensions can be built: a compiler and this Python's headers."""
    compiler = (sysconfig.get_config_var("CC") or "cc").split()[0]
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    return any(shutil.which(name) for name in (compiler, "cc", "gcc", "clang")) and headers.exists()


def requirements(python: Path, distribution: str, extras: str) -> list[str]:
    """What an installed distribution asks for in that environment, markers evaluated. Needs `packaging` there."""
    code = (
        "import sys\n"
        "from importlib.metadata import requires\n"
        "from packaging.requirements import Requirement\n"
        "for line in requires(sys.argv[1]) or []:\n"
        "    r = Requirement(line)\n"
        "    if r.marker is None or any(r.marker.evaluate({'extra': e}) for e in ['', *sys.argv[2].split(',')]):\n"
        "        r.marker = None; print(r)\n"
    )
    command = [str(python), "-c", code, distribution, extras]
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT / "docs").stdout.splitlines()


def install(venv: Path, extras: str, torch: str, torch_index: str, requirements_file: str) -> None:
    """Create or complete the environment: the project's, or one for a requirements file alone. Raises InstallError."""
    python = venv / "bin" / "python"
    log = venv / "install.log"
    pip = [str(python), "-m", "pip", "install", "-qq", "--disable-pip-version-check", "--no-input"]
    target = f".[{extras}]" if extras else "."
    compiler = can_compile()
    stages = Stages(3 if compiler or requirements_file else 5, log)

    venv.mkdir(exist_ok=True)
    log.write_text("")
    make_venv = [sys.executable, "-m", "venv", str(venv)]
    try:
        stages.run(f"environment {venv.name} (Python {sys.version.split()[0]})", make_venv)
    except InstallError as error:
        hint = "if the venv module is missing (Debian, Ubuntu): apt-get install python3-venv"
        raise InstallError(f"{error}\n{hint}") from None
    # First and alone, so that a CPU build is kept: later requirements are satisfied by whatever is there.
    index = ["--index-url", torch_index] if torch_index else []
    stages.run(torch, [*pip, *index, torch])
    if requirements_file:
        stages.run(requirements_file, [*pip, "-r", requirements_file])
    elif compiler:
        stages.run(f"megatron-vp2o{target[1:]} and what it needs", [*pip, "-e", target])
    else:
        print(f"no C compiler or no Python.h: leaving out {NEEDS_COMPILER} (for a task of reasoning-gym not used here)")
        stages.run("megatron-vp2o", [*pip, "packaging"], [*pip, "--no-deps", "-e", "."])
        needed = requirements(python, "megatron-vp2o", extras)
        generators = [line for line in needed if line.startswith("reasoning-gym")]
        stages.run("what it needs", [*pip, *(set(needed) - set(generators))], [*pip, "--no-deps", *generators])
        rest = [r for r in requirements(python, "reasoning-gym", "") if not r.startswith(NEEDS_COMPILER)]
        stages.run("what reasoning-gym needs", [*pip, *rest])
    print(f"installed in {time.monotonic() - stages.begin:.0f} s: {venv}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--venv", type=Path, required=True)
    parser.add_argument("--extras", default="", help="comma-separated extras, such as dev")
    parser.add_argument("--torch", default="torch==2.13.0", help="requirement that is installed first, alone")
    parser.add_argument("--torch-index", default="", help="package index to take it from")
    parser.add_argument("--requirements", default="", help="install this file instead of the project")
    arguments = parser.parse_args()

    venv = arguments.venv.resolve()
    stamp = venv / ".installed"
    have = stamp.read_text().split("\n") if stamp.exists() else ["", ""]
    listed = (ROOT / arguments.requirements).read_text() if arguments.requirements else ""
    want = fingerprint(arguments.torch, arguments.torch_index, listed)
    extras = {e for e in arguments.extras.split(",") if e}
    if have[0] == want:
        extras |= {e for e in have[1].split(",") if e}  # never take away what an earlier call added
        if extras == {e for e in have[1].split(",") if e}:
            return 0
    stamp.unlink(missing_ok=True)
    os.environ.pop("PYTHONPATH", None)
    try:
        install(venv, ",".join(sorted(extras)), arguments.torch, arguments.torch_index, arguments.requirements)
    except InstallError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    stamp.write_text(f"{want}\n{','.join(sorted(extras))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
