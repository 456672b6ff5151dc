"""The embedded engine passes the contract of engines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from megatron_vp2o.megatron.platform.cpu import enable_cpu

enable_cpu()

from megatron_vp2o.config.schema import ModelConfig, TrainConfig  # noqa: E402
from megatron_vp2o.megatron.actor.generation import MegatronEngine  # noqa: E402
from megatron_vp2o.megatron.learner.policy import MegatronPolicy  # noqa: E402
from megatron_vp2o.megatron.model.build import named_weight_tensors, weight_tensors  # noqa: E402
from megatron_vp2o.megatron.platform import world  # noqa: E402
from megatron_vp2o.rollout.contract import ClosingContract, EngineContract  # noqa: E402

VOCABULARY = 24


class EmbeddedHarness:
    """Model 0 is the one that the policy was made with, model 1 the same with other weights; both are kept as tensors."""

    vocabulary, end, tolerance = VOCABULARY, 1, 1e-5

    def __init__(self) -> None:
        config = TrainConfig(
            model=ModelConfig(
                num_layers=2,
                hidden_size=32,
                num_attention_heads=4,
                kv_channels=8,
                num_moe_experts=4,
                moe_router_topk=2,
                init_method_std=0.2,
            )
        )
        groups = world.start(config.parallel, config.seed)
        self.policy = MegatronPolicy(config, groups, vocab_size=VOCABULARY, optimizer_steps=10)
        self.engine = MegatronEngine(config, self.policy, eos_ids=[self.end], pad_id=0)
        self.engine.record_routes()
        generator = torch.Generator().manual_seed(7)
        named = named_weight_tensors(self.policy.model)
        self.sets = [
            [(name, tensor.detach().clone()) for name, tensor in named],
            [(name, tensor.detach() + 0.05 * torch.randn(tensor.shape, generator=generator)) for name, tensor in named],
        ]

    def weights(self, model: int) -> Iterator[tuple[str, Tensor]]:
        yield from self.sets[model]

    @torch.no_grad()
    def log_probs(self, model: int, tokens: Sequence[int], temperature: float) -> list[float]:
        """By the learner's model, without a cache."""
        for mine, (_, given) in zip(weight_tensors(self.policy.model), self.sets[model], strict=True):
            mine.copy_(given)
        gpt = self.policy.model.eval()
        logits = gpt(torch.tensor([list(tokens)]), torch.arange(len(tokens))[None], None)[0, :, :VOCABULARY]
        gpt.train()
        logp_SV = (logits.float() / temperature).log_softmax(-1)
        return [float(logp_SV[s, token]) for s, token in enumerate(tokens[1:])]


@pytest.fixture(scope="module")
def made() -> Iterator[EmbeddedHarness]:
    yield EmbeddedHarness()
    world.stop()


class TestEmbedded(EngineContract):
    @pytest.fixture
    def harness(self, made: EmbeddedHarness) -> EmbeddedHarness:
        return made


class TestEmbeddedEnd(ClosingContract):
    @pytest.fixture
    def harness(self, made: EmbeddedHarness) -> EmbeddedHarness:
        return made


def test_a_refresh_is_an_update_with_the_learners_tensors(made: EmbeddedHarness) -> None:
    made.engine._closed = False  # the class above closed it
    with torch.no_grad():
        for tensor in weight_tensors(made.policy.model):
            tensor.add_(0.01)
    made.engine.refresh(8)
    assert made.engine.checksum().read() == made.policy.checksum().read() and made.engine.version == 8
