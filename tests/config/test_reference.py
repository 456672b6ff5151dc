"""docs/configuration.md is what the dataclasses say."""

import dataclasses
from pathlib import Path

import pytest

from megatron_vp2o.config import schema
from megatron_vp2o.config.explain import setting_names
from megatron_vp2o.config.reference import field_docstrings, reference
from megatron_vp2o.config.register import GROUPS

CLASSES = [
    cls
    for cls in vars(schema).values()
    if isinstance(cls, type) and dataclasses.is_dataclass(cls) and cls.__name__.endswith("Config")
]


def test_the_document_is_current():
    document = Path(__file__).parents[2] / "docs" / "configuration.md"
    assert document.read_text(encoding="utf-8") == reference(), (
        "run: python -m megatron_vp2o.config.reference > docs/configuration.md"
    )


def test_every_setting_is_in_the_document():
    text = reference()
    for algorithm in GROUPS["algorithm"].values():
        leaves = set(setting_names(algorithm=algorithm))
        sections = {name.rpartition(".")[0] for name in leaves}
        for name in leaves - sections:
            assert f"| `{name}` |" in text


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_field_has_a_docstring(cls):
    assert cls.__doc__ and not cls.__doc__.startswith(f"{cls.__name__}(")
    documented = field_docstrings(cls)
    assert [field.name for field in dataclasses.fields(cls) if not documented.get(field.name)] == []


def test_a_subclass_may_document_a_field_anew():
    assert field_docstrings(schema.SupervisedConfig)["micro_batch_size"] == "Rows in one forward pass on one rank."
    assert field_docstrings(schema.GRPOConfig)["micro_batch_size"] == "Sequences in one forward pass on one rank."
