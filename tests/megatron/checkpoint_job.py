"""What the tests of checkpoints share: a small learner with its actor, training steps, and what the ranks of a world do."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vp2o.config.schema import ModelConfig, OptimizerConfig, ParallelConfig, Precision, TrainConfig
from megatron_vp2o.core.objective import GRPOObjective
from megatron_vp2o.errors import CheckpointError
from megatron_vp2o.parallel.groups import Groups
from megatron_vp2o.rl.batching import policy_batch
from megatron_vp2o.rl.objectives import OnRollouts
from megatron_vp2o.rl.types import Rollouts

from tests.megatron.policy_job import MegatronEngine, MegatronPolicy, fixed_batch, world  # isort: skip  (enables the CPU)
from megatron_vp2o.megatron.checkpoint import folder as checkpoint_folder  # isort: skip
from megatron_vp2o.megatron.checkpoint.identity import weights_identity  # isort: skip
from megatron_vp2o.megatron.checkpoint.checkpointer import MegatronCheckpointer, latest, load_weights  # isort: skip

VOCAB, ROWS = 24, 8
OBJECTIVE = OnRollouts(GRPOObjective(clip_epsilon_low=0.2, clip_epsilon_high=0.2, kl_coef=0.0, entropy_coef=0.01))


def config(
    *, model: dict[str, Any] | None = None, optimizer: dict[str, Any] | None = None, bf16: bool = False, **parallel: Any
) -> TrainConfig:
    """Two layers, four experts."""
    shape = {
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "kv_channels": 8,
        "num_moe_experts": 4,
        "moe_router_topk": 2,
        "moe_ffn_hidden_size": 16,
        "init_method_std": 0.2,
        "moe_aux_loss_coeff": 0.0,  # it is a product of micro-batch means, which depend on how data is dealt to ranks
        "precision": Precision.bf16 if bf16 else Precision.fp32,
    }
    settings = {"lr": 1e-2, "lr_warmup_steps": 3, "clip_grad": 0.5}
    return TrainConfig(
        model=ModelConfig(**{**shape, **(model or {})}),
        optimizer=OptimizerConfig(**{**settings, **(optimizer or {})}),
        parallel=ParallelConfig(**parallel),
    )


class Learner:
    """A policy with an actor and a checkpointer, in an existing world."""

    def __init__(self, settings: TrainConfig, groups: Groups, folder: Path, keep: int = 2) -> None:
        self.groups = groups
        self.policy = MegatronPolicy(settings, groups, vocab_size=VOCAB, optimizer_steps=10)
        self.engine = MegatronEngine(settings, self.policy, eos_ids=[1], pad_id=0)
        self.engine.refresh(-1)  # defined weights, to compare
        self.saver = MegatronCheckpointer(folder, self.policy, self.engine, keep=keep, tokenizer_save=_save_tokenizer)

    def train(self, *steps: int) -> None:
        """An optimizer step on each of these batches; data-parallel ranks share a batch out."""
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            tokens_NS = torch.randint(2, VOCAB, (ROWS, 9), generator=generator)
            advantages_N = torch.randn(ROWS, generator=generator)
            mine = slice(self.groups.dp_rank, None, self.groups.dp_size)
            tokens_NS = tokens_NS[mine]
            zeros_NS = torch.zeros(tokens_NS.shape)
            ones_N = torch.ones(len(tokens_NS)).long()
            rollouts = Rollouts(tokens_NS, ones_N, 9 * ones_N, zeros_NS, zeros_NS, ones_N.bool(), 0)
            batch = policy_batch(rollouts, advantages_N[mine], ones_N.bool(), 1.0)
            self.policy.forward_backward(batch, OBJECTIVE, micro_batch_size=4)
            assert not self.policy.optimizer_step(1).skipped

    def log_probs(self) -> Tensor:
        """Log-probabilities of a fixed batch, the same on every rank."""
        return self.policy.log_probs(policy_batch(fixed_batch(), torch.zeros(4), torch.ones(4).bool(), 1.0), 4)

    def snapshot(self) -> dict[str, Any]:
        """Everything on this rank that training depends on."""
        found: dict[str, Any] = {
            f"model.{name}": p.detach().clone() for name, p in self.policy.model.named_parameters()
        }
        found |= {f"actor.{name}": p.detach().clone() for name, p in self.engine.actor.named_parameters()}
        for number, optimizer in enumerate(self.policy.optimizers()):
            parameters = [p for group in optimizer.optimizer.param_groups for p in group["params"]]
            for index, parameter in enumerate(parameters):
                found[f"main.{number}.{index}"] = parameter.detach().clone()
                for key, value in optimizer.optimizer.state[parameter].items():
                    found[f"{key}.{number}.{index}"] = value.clone()
        groups = self.policy.optimizer.param_groups
        found["settings"] = [{k: v for k, v in group.items() if k not in ("params", "step")} for group in groups]
        found["schedule"] = self.policy.scheduler.num_steps
        return found


def different(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Keys whose values are not the same, to the last bit."""

    def same(x: Any, y: Any) -> bool:
        return torch.equal(x, y) if isinstance(x, Tensor) else x == y

    return sorted(a.keys() ^ b.keys()) + [key for key in a.keys() & b.keys() if not same(a[key], b[key])]


def random_numbers() -> list[float]:
    """One from each generator that a checkpoint keeps."""
    return [random.random(), float(np.random.rand()), float(torch.rand(()))]


def _save_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Writing beyond `size` bytes into a file fails with an OSError, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# --- what ranks do ----------------------------------------------------------------------------------------------------


def continuations(folder: str, layouts: dict[str, dict[str, Any]]) -> dict[str, list[str]]:
    """For each layout, what differs on this rank between a run and one resumed from its checkpoint."""
    torch.set_num_threads(1)
    results = {}
    for name, layout in layouts.items():
        settings = config(**layout)
        groups = world.start(settings.parallel, settings.seed)
        first = Learner(settings, groups, Path(folder, name))
        first.train(0)
        first.engine.refresh(1)
        first.log_probs()  # a forward pass: whatever was on its way has arrived
        for mine, learned in zip(first.engine.actor.parameters(), first.policy.model.parameters(), strict=True):
            assert torch.equal(mine, learned)
        first.train(1)
        path = first.saver.save(2, {"actor_age": 1, "actor_version": 1})
        numbers = random_numbers()
        first.train(2, 3)

        second = Learner(settings, groups, Path(folder, name))
        state = second.saver.load(path)
        assert state == {"actor_age": 1, "actor_version": 1} and second.engine.version == 1
        resumed = random_numbers()
        second.train(2, 3)
        results[name] = different(first.snapshot(), second.snapshot())
        if numbers != resumed:
            results[name].append(f"random numbers {numbers} {resumed}")
        world.stop_model_parallel()
    world.stop()
    return results


def trained(folder: str, layouts: dict[str, dict[str, Any]]) -> dict[str, list[Any]]:
    """For each layout, a checkpoint, and log-probabilities of the fixed batch there and a step later."""
    torch.set_num_threads(1)
    results = {}
    for name, layout in layouts.items():
        settings = config(**layout)
        groups = world.start(settings.parallel, settings.seed)
        learner = Learner(settings, groups, Path(folder, name))
        learner.train(0, 1)
        learner.saver.save(2, {"actor_age": 0})
        results[name] = [learner.log_probs().tolist()]
        learner.train(2)
        results[name].append(learner.log_probs().tolist())
        world.stop_model_parallel()
    world.stop()
    return results


def loaded(path: str, layout: dict[str, Any]) -> list[Any]:
    """Log-probabilities of the fixed batch after resuming from a checkpoint, after a further step, and with its weights."""
    torch.set_num_threads(1)
    settings = config(**layout)
    groups = world.start(settings.parallel, settings.seed)
    resumed, started = (Learner(settings, groups, Path(path).parent) for _ in range(2))
    resumed.saver.load(Path(path))
    load_weights(Path(path), started.policy)
    results = [resumed.log_probs().tolist(), started.log_probs().tolist()]
    resumed.train(2)
    results.append(resumed.log_probs().tolist())
    world.stop()
    return results


def identities(path: str, layouts: list[dict[str, Any]]) -> list[str]:
    """Identity of a checkpoint's weights, as each layout computes it."""
    torch.set_num_threads(1)
    found = []
    for layout in layouts:
        settings = config(**layout)
        groups = world.start(settings.parallel, settings.seed)
        policy = MegatronPolicy(settings, groups, vocab_size=VOCAB, optimizer_steps=10)
        load_weights(Path(path), policy)
        found.append(weights_identity(policy.model, groups, policy.model_vocab))
        world.stop_model_parallel()
    world.stop()
    return found


def failures(folder: str, damaged: list[str]) -> dict[str, str]:
    """The error of each damaged checkpoint, and of saves that fail on rank 1 or rank 0 only; then one good save."""
    torch.set_num_threads(1)
    settings = config(expert_parallel=2)
    groups = world.start(settings.parallel, settings.seed)
    learner = Learner(settings, groups, Path(folder))
    learner.train(0)
    before = learner.snapshot()
    errors = {}
    for path in damaged:
        try:
            learner.saver.load(Path(path))
        except CheckpointError as error:
            errors[Path(path).name] = str(error)
    learner.saver.save(1, {"actor_age": 0})
    for rank in (0, 1):
        for size in (100, 20_000):
            try:
                with file_size_limit(size if groups.rank == rank else resource.RLIM_INFINITY):
                    learner.saver.save(2, {"actor_age": 0})
            except CheckpointError as error:
                errors[f"rank {rank}, {size}"] = str(error)
            assert latest(Path(folder)) == Path(folder, "step_000001")
    assert not different(before, learner.snapshot())
    learner.saver.save(3, {"actor_age": 0})
    dist.barrier()
    errors["left"] = json.dumps(sorted(os.listdir(folder)))
    world.stop()
    return errors


def killed_while_saving(folder: str) -> None:
    """Save once, and be killed in the middle of the second time: the data is written, the new name is not given."""
    torch.set_num_threads(1)
    groups = world.start(config().parallel, 1)
    learner = Learner(config(), groups, Path(folder))
    learner.train(0)
    learner.saver.save(1, {"actor_age": 0})
    checkpoint_folder.publish = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
    learner.saver.save(2, {"actor_age": 0})
