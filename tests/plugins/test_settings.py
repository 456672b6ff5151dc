"""Settings of a plug-in: what cannot work is refused in one line that quotes it."""

from __future__ import annotations

import logging
import subprocess
import sys
from typing import Any

import pytest
from omegaconf import OmegaConf

from megatron_vp2o.errors import ConfigError
from megatron_vp2o.plugins import versions
from megatron_vp2o.plugins.settings import PluginConfig, read_settings


def test_a_tree_lines_and_a_hydra_node_say_the_same() -> None:
    tree = {"stein": {"enabled": True, "eta": 0.5, "repulsion_scale": "relative"}}
    lines = ["stein.enabled=true", "stein.eta=0.5", "stein.repulsion_scale=relative"]
    assert read_settings(tree, "vp2o") == read_settings(lines, "vp2o") == read_settings(OmegaConf.create(tree), "vp2o")
    assert read_settings(tree, "vp2o").stein.eta == 0.5


@pytest.mark.parametrize("given", [None, {}, [], {"stein": {"eta": 1.0}}])
def test_nothing_is_on_before_it_is_switched_on(given: Any) -> None:
    config = read_settings(given, "vp2o")
    assert not config.active and not config.observes
    assert not PluginConfig().active


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"stien": {}}, r"vp2o\.stien: no such setting; did you mean stein\?"),
        ({"stein": {"neighbors": 2}}, r"vp2o\.stein\.neighbors: no such setting; did you mean neighbours\?"),
        ({"stein": True}, r"vp2o\.stein=True: write its settings"),
        ({"stein": {"eta": "many"}}, r"vp2o\.stein\.eta.*many"),
        ({"stein": {"eta": -1.0}}, r"vp2o\.stein\.eta=-1\.0 must be 0 or at least 1e-12"),
        ({"stein": {"kernel": "round"}}, r"vp2o\.stein\.kernel"),
        (
            {"stein": {"enabled": True, "coactivation_threshold": 0.5}},
            r"vp2o\.stein\.neighbours=4 and vp2o\.stein\.coactivation_threshold=0\.5: set exactly one",
        ),
        (
            {"specialization": {"orthogonality_coef": 1e-4, "orthogonality_scale": "relative"}},
            r"vp2o\.specialization\.orthogonality_scale=relative needs vp2o\.stein\.monitor=true",
        ),
        ("stein.enabled=true", r"vp2o='stein\.enabled=true': write a tree of settings"),
        (["stein.enabled"], r"vp2o\.stein\.enabled"),
    ],
)
def test_what_cannot_work_is_quoted(given: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        read_settings(given, "vp2o")
    assert "\n" not in str(caught.value)


def test_a_release_that_was_not_tested_is_named_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(versions.TESTED, "pytest", ("0.1", "0.2"))
    versions.warn_if_untested.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            versions.warn_if_untested("pytest")
    assert [record.message for record in caplog.records] == [
        f"megatron-vp2o was tested with pytest 0.1 and 0.2, and this is {pytest.__version__}: compare a short run with the plug-in "
        "off and on before you trust it"
    ]
    monkeypatch.setitem(versions.TESTED, "pytest", (pytest.__version__,))
    versions.warn_if_untested.cache_clear()
    assert versions.warn_if_untested("pytest") is None
    versions.warn_if_untested.cache_clear()


def test_no_host_is_imported() -> None:
    """Importing the package, its settings and verl's entry point, without the environment that asks for it."""
    code = (
        "import sys, megatron_vp2o.plugins.settings, megatron_vp2o.plugins.versions, megatron_vp2o.plugins.verl\n"
        "hosts = ('verl', 'slime', 'megatron', 'torch', 'ray', 'transformers')\n"
        "print([name for name in hosts if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"
