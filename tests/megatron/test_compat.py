"""What differs between megatron-core versions, and the checks of the installation."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from packaging.version import Version

from megatron_vp2o.errors import ConfigError
from megatron_vp2o.megatron.platform import compat, cpu, repairs

cpu.enable_cpu()

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec  # noqa: E402
from megatron.core.transformer.moe.moe_layer import MoELayer  # noqa: E402
from megatron.core.transformer.moe.router import TopKRouter  # noqa: E402
from megatron.core.transformer.torch_norm import WrappedTorchNorm  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

pytestmark = pytest.mark.smoke  # they are about the installed megatron-core


def test_this_installation_is_accepted() -> None:
    assert Version("0.16.1") <= compat.megatron_version() < Version("0.20")
    compat.check_installation()


@pytest.mark.parametrize("version", ["0.15.3", "0.16.0", "0.20.0", "0.20.0rc1", "1.0"])
def test_other_versions_are_refused(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(compat, "megatron_version", lambda: Version(version))
    with pytest.raises(ConfigError, match=rf"{version} .*0\.16\.1 <= version < 0\.20.*pip install"):
        compat.check_installation()


@pytest.mark.parametrize(
    ("package", "version", "needed"),
    [("psutil", "0.16.1", True), ("tqdm", "0.19.2", True), ("triton", "0.19.2", True), ("triton", "0.16.1", False)],
)
def test_undeclared_dependencies(monkeypatch: pytest.MonkeyPatch, package: str, version: str, needed: bool) -> None:
    find_spec = importlib.util.find_spec
    present = SimpleNamespace(submodule_search_locations=None)

    def without(name: str) -> Any:
        if name in ("psutil", "tqdm", "triton"):
            return None if name == package else present
        return find_spec(name)

    monkeypatch.setattr(compat, "megatron_version", lambda: Version(version))
    monkeypatch.setattr(importlib.util, "find_spec", without)
    if not needed:
        compat.check_installation()
        return
    with pytest.raises(ConfigError, match=rf"{version} needs {package} .*pip install {package}"):
        compat.check_installation()


def test_pypis_apex_is_told_from_nvidias(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "apex"
    package.mkdir()
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert compat.foreign_apex() == package
    with pytest.warns(UserWarning, match=r"not NVIDIA's Apex .*Pyramid.*pip uninstall apex"):
        compat.check_installation()
    (package / "multi_tensor_apply").mkdir()
    assert compat.foreign_apex() is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compat.check_installation()


def _config() -> TransformerConfig:
    return TransformerConfig(
        num_layers=2, hidden_size=32, num_attention_heads=2, num_moe_experts=4, moe_ffn_hidden_size=32
    )


class OtherNorm:
    """Takes the place of a norm in a spec."""


class OtherLayer:
    """Takes the place of a layer in a spec."""


def test_replace_in_spec_copies_and_reaches_every_depth() -> None:
    spec = get_gpt_decoder_block_spec(_config(), use_transformer_engine=False, pp_rank=0)
    copy = compat.replace_in_spec(spec, {WrappedTorchNorm: OtherNorm, MoELayer: OtherLayer})
    text = str(copy)
    assert "OtherNorm" in text and "OtherLayer" in text and "WrappedTorchNorm" not in text and "MoELayer" not in text
    assert "WrappedTorchNorm" in str(spec) and "OtherNorm" not in str(spec)
    assert text.replace("OtherNorm", "").count("layernorm") == str(spec).replace("WrappedTorchNorm", "").count(
        "layernorm"
    )


def test_replace_in_spec_says_what_it_did_not_find() -> None:
    spec = get_gpt_decoder_block_spec(_config(), use_transformer_engine=False, pp_rank=0)
    with pytest.raises(ValueError, match="OtherLayer"):
        compat.replace_in_spec(spec, {OtherLayer: OtherNorm})


def test_only_routed_experts_are_marked() -> None:
    def linear() -> torch.nn.Module:
        return torch.nn.ModuleDict({"linear_fc1": torch.nn.Linear(2, 2)})

    mlp = torch.nn.ModuleDict({"experts": linear(), "shared_experts": linear(), "router": torch.nn.Linear(2, 2)})
    model = torch.nn.ModuleDict({"mlp": mlp})
    compat.mark_expert_parameters(model)
    marked = {name for name, parameter in model.named_parameters() if not getattr(parameter, "allreduce", True)}
    assert marked == {"mlp.experts.linear_fc1.weight", "mlp.experts.linear_fc1.bias"}


def test_inference_mode_is_left() -> None:
    import megatron.core.inference.utils as utils

    if hasattr(utils, "InferenceMode"):
        utils.InferenceMode.set_active()
    compat.leave_inference_mode()
    assert not (hasattr(utils, "InferenceMode") and utils.InferenceMode.is_active())


def test_a_repair_that_is_not_needed_is_not_applied() -> None:
    needed = {patch.name for patch in repairs.REPAIRS if patch.name in compat.prepare()}
    fixed_in_0_19 = {"undefined-gemm", "router-losses-per-token"}
    assert needed & fixed_in_0_19 == (fixed_in_0_19 if compat.megatron_version() < Version("0.17") else set())
    assert not repairs._undefined_gemm()  # repaired


@pytest.mark.parametrize("per_token", [False, True])
def test_the_z_loss_coefficient_is_left_as_it_was(per_token: bool) -> None:
    """0.16.1: the repair scales the coefficient for the time of the call."""
    group = SimpleNamespace(size=lambda: 2)
    config = SimpleNamespace(moe_z_loss_coeff=0.5, num_layers=1, mtp_num_layers=None, mtp_use_repeated_layer=False)
    router = SimpleNamespace(
        config=config,
        tp_cp_group=group,
        tp_dp_cp_group=group,
        training=True,
        calculate_per_token_loss=per_token,
        layer_number=None,
        is_mtp_layer=False,
    )
    logits = torch.zeros(3, 4, requires_grad=True)
    TopKRouter.apply_z_loss(router, logits).sum().backward()
    assert config.moe_z_loss_coeff == 0.5
    # d/dlogit of 0.5 / 2 * mean over 3 tokens of (log 4)^2; per token: times 3 tokens on each of 2 ranks
    expected = 0.25 / 3 * 2 * torch.tensor(4.0).log() / 4 * (6 if per_token else 1)
    assert logits.grad is not None
    assert (logits.grad - 1).flatten().tolist() == pytest.approx([expected.item()] * 12)
