"""`model.implementation=torch` on a CUDA device, against `local` with each expert computed by itself. Run by `make gpu-check`."""

from __future__ import annotations

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


@pytest.mark.parametrize("draw", [0, 1, 2])
def test_values_and_gradients_are_those_of_local(draw: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_vp2o.config.schema import Implementation
    from megatron_vp2o.megatron.model.experts import GroupedSequentialMLP
    from megatron_vp2o.megatron.platform import world
    from tests.megatron.test_torch_implementation import close, trained

    monkeypatch.setattr(GroupedSequentialMLP, "grouped", False)
    try:
        local = trained(Implementation.local, draw)
        world.stop_model_parallel()
        found = trained(Implementation.torch, draw)
    finally:
        world.stop_model_parallel()
        world.stop()
    assert found["losses"] == pytest.approx(local["losses"], rel=1e-4)
    close(found["gradients"][0], local["gradients"][0], 1e-3)
