"""From source text to a program that can be run many times: what a language needs inside the sandbox."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_vp2o.rewards.sandbox.protocol import Finished, Limits, Sandbox

COMPILING = Limits(wall_s=60.0, cpu_s=30.0, memory_mib=2048, processes=32, output_mib=64)
"""Limits of a compiler; its output is the program."""
PYTHON, CPP = "python", "cpp"
LANGUAGES = {
    **dict.fromkeys(("python", "python3", "py", "py3", "pypy", "pypy3"), PYTHON),
    **dict.fromkeys(("cpp", "c++", "cc", "cxx", "c++17", "c++20", "cpp17", "cpp20"), CPP),
}
"""Names under which languages go, in lower case."""


class CompileError(Exception):
    """A program that the compiler refused; the message is the compiler's."""


@dataclass(frozen=True)
class Program:
    """A program ready to be run."""

    sandbox: Sandbox
    command: tuple[str, ...]
    files: Mapping[str, bytes]
    executable: frozenset[str] = frozenset()

    def run(
        self, stdin: bytes, limits: Limits, *, arguments: Sequence[str] = (), files: Mapping[str, bytes] | None = None
    ) -> Finished:
        """Run it in a fresh sandbox, with further arguments and files."""
        return self.sandbox.run(
            [*self.command, *arguments],
            files={**self.files, **(files or {})},
            stdin=stdin,
            limits=limits,
            executable=self.executable,
        )


def prepare(sandbox: Sandbox, language: str, source: str) -> Program:
    """Compile where the language is compiled. `language` is one of LANGUAGES' values.

    Raises:
        CompileError: the source is not a program of that language.
        SandboxUnavailable: the language is not installed below /usr.
    """
    text = source.encode("utf-8", errors="replace")
    if language == PYTHON:
        return Program(sandbox, (sandbox.program("python3"), "-I", "-S", "solution.py"), {"solution.py": text})
    # The compiler writes into the sandbox's own /tmp and the program comes out as output: no folder is shared.
    compiler = sandbox.program("g++")
    script = f"{compiler} -O2 -std=gnu++20 -w -o /tmp/program solution.cpp && cat /tmp/program"
    done = sandbox.run(["/bin/sh", "-c", script], files={"solution.cpp": text}, limits=COMPILING)
    if done.status != 0 or not done.stdout:
        raise CompileError(done.stderr.decode(errors="replace")[:500] or "the compiler ran out of its limits")
    return Program(sandbox, ("/box/program",), {"program": done.stdout}, frozenset({"program"}))
