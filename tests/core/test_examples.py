"""The examples in the docstrings of `megatron_vp2o/core/` are run, and every public name there has one."""

from __future__ import annotations

import doctest
import enum
import importlib
import inspect
from pathlib import Path
from types import ModuleType

import pytest

import megatron_vp2o.core

MODULES = sorted(path.stem for path in Path(megatron_vp2o.core.__file__).parent.glob("[!_]*.py"))


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"{megatron_vp2o.core.__name__}.{name}")


def _public(module: ModuleType) -> dict[str, object]:
    """Public functions and classes that a module defines. Enumerations are left out: their members' comments say it all."""
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isfunction(value) or inspect.isclass(value))
        and value.__module__ == module.__name__
        and not (inspect.isclass(value) and issubclass(value, enum.Enum))
    }


@pytest.mark.parametrize("name", MODULES)
def test_every_example_gives_what_it_says(name: str) -> None:
    module = _module(name)
    said: list[str] = []
    runner = doctest.DocTestRunner(verbose=False)
    for example in doctest.DocTestFinder().find(module):
        runner.run(example, out=said.append)
    assert not runner.summarize(verbose=False).failed, "".join(said)


@pytest.mark.parametrize("name", MODULES)
def test_every_public_name_has_an_example(name: str) -> None:
    module = _module(name)
    examples = {test.name.split(".")[-1]: test.examples for test in doctest.DocTestFinder().find(module)}
    without = [name for name in _public(module) if not examples.get(name)]
    assert not without, f"no example (>>> ...) in the docstring of {', '.join(without)} in {module.__name__}"
    silent = [name for name, lines in examples.items() if lines and not lines[-1].want]
    assert not silent, f"an example ends in its result; those of {', '.join(silent)} in {module.__name__} have none"


def test_a_wrong_example_fails() -> None:
    """The runner sees a wrong number: a test that ran nothing would pass everything."""
    module = ModuleType("wrong")
    exec('def f():\n    """\n    >>> 1 + 1\n    3\n    """', vars(module))
    module.f.__module__ = "wrong"
    runner = doctest.DocTestRunner(verbose=False)
    for example in doctest.DocTestFinder().find(module):
        runner.run(example, out=lambda _: None)
    assert runner.failures == 1
