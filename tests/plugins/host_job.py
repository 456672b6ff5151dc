"""What the ranks of test_hosts.py do: a training loop that does to Megatron's model what slime's and `pretrain()`'s do, with the
plug-ins in it, beside this project's own trainer on the same weights and batches.
"""

from __future__ import annotations

import logging
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_vp2o.megatron.platform.cpu import enable_cpu

enable_cpu()

from megatron.core import dist_checkpointing  # noqa: E402
from megatron.core.distributed import finalize_model_grads  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from torch import Tensor  # noqa: E402

from megatron_vp2o.config.schema import (  # noqa: E402
    OptimizerConfig,
    ParallelConfig,
    RepulsionScale,
    SteinConfig,
    TrainConfig,
)
from megatron_vp2o.core.objective import supervised_objective  # noqa: E402
from megatron_vp2o.errors import ConfigError  # noqa: E402
from megatron_vp2o.megatron.learner.policy import MegatronPolicy  # noqa: E402
from megatron_vp2o.megatron.platform import world  # noqa: E402
from megatron_vp2o.megatron.stein.prototypes import ExpertPrototypes  # noqa: E402
from megatron_vp2o.megatron.stein.transform import SteinTransform  # noqa: E402
from megatron_vp2o.plugins import megatron as pretrain_plugin  # noqa: E402
from megatron_vp2o.plugins import slime as slime_plugin  # noqa: E402
from megatron_vp2o.plugins import versions  # noqa: E402
from megatron_vp2o.rl.types import TrainBatch  # noqa: E402
from tests.megatron.policy_job import small_config  # noqa: E402

VOCAB, ROWS, WIDTH, ROLLOUTS, PER_ROLLOUT = 24, 8, 12, 3, 2
STEPS = ROLLOUTS * PER_ROLLOUT
STEIN = {"enabled": True, "neighbours": 2, "eta": 0.01, "repulsion_scale": "relative"}
ON = {"stein": STEIN}
LOSSES = {"specialization": {"orthogonality_coef": 0.05, "variance_coef": 0.05}}


def config(layout: dict[str, Any]) -> TrainConfig:
    found = small_config(**layout)
    found.optimizer = OptimizerConfig(lr=3e-3, clip_grad=1.0)
    return found


def micro_batches(step: int, policy: MegatronPolicy) -> list[Tensor]:
    """This rank's two micro-batches of the step."""
    generator = torch.Generator().manual_seed(100 + step)
    tokens_NS = torch.randint(VOCAB, (ROWS, WIDTH), generator=generator)
    share = ROWS // policy.groups.dp_size
    part = tokens_NS[policy.groups.dp_rank * share : (policy.groups.dp_rank + 1) * share]
    return list(part.chunk(2))


def host_step(policy: MegatronPolicy, step: int, before: Callable[[], None]) -> None:
    """One step as Megatron's loops take it: schedule, finalize function, optimizer."""
    policy.ddp.zero_grad_buffer()
    policy.optimizer.zero_grad()
    before()

    def forward_step(batches: Iterator[Tensor], model: Any) -> Any:
        tokens_NS = next(batches)
        position_S = torch.arange(WIDTH)
        logits_NSV = model(tokens_NS, position_S.expand_as(tokens_NS), None)

        def loss(logits_NSV: Tensor) -> Any:
            logprobs = logits_NSV[:, :-1, :VOCAB].float().log_softmax(-1)
            total = -logprobs.gather(2, tokens_NS[:, 1:, None]).sum()
            return total, torch.tensor(tokens_NS[:, 1:].numel(), dtype=torch.int), {"loss": total.detach()}

        return logits_NSV, loss

    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(micro_batches(step, policy)),
        model=[policy.ddp],
        num_microbatches=2,
        seq_length=WIDTH,
        micro_batch_size=ROWS // 2 // policy.groups.dp_size,
        forward_only=False,
    )
    policy.optimizer.step()
    policy.scheduler.step(1)
    policy.ddp.zero_grad_buffer()
    policy.optimizer.zero_grad()


def fresh(layout: dict[str, Any], groups: Any) -> MegatronPolicy:
    policy = MegatronPolicy(config(layout), groups, vocab_size=VOCAB, optimizer_steps=100)
    policy.ddp.train()
    policy.model.config.finalize_model_grads_func = finalize_model_grads
    return policy


def own(layout: dict[str, Any], groups: Any) -> tuple[MegatronPolicy, SteinTransform]:
    """Six steps of this project's learner."""
    policy = fresh(layout, groups)
    settings = SteinConfig(enabled=True, neighbours=2, eta=0.01, repulsion_scale=RepulsionScale.relative)
    transform = SteinTransform(ExpertPrototypes([policy.ddp], settings), optimizer=policy.optimizer)
    for step in range(STEPS):
        tokens_NS = torch.cat(micro_batches(step, policy))
        mask_NS = torch.ones_like(tokens_NS, dtype=torch.bool)
        mask_NS[:, 0] = False
        batch = TrainBatch(tokens_NS, torch.full((len(tokens_NS),), WIDTH), mask_NS)
        counted = policy.forward_backward(
            batch,
            lambda logprobs, _, part: supervised_objective(logprobs, part.loss_mask_NS),
            micro_batch_size=len(tokens_NS) // 2,
        )
        transform.apply()
        policy.optimizer_step(int(counted["tokens"]))
    return policy, transform


def slime_loop(
    policy: MegatronPolicy,
    args: Any,
    first: int = 0,
    last: int = ROLLOUTS,
    after: Callable[[int], None] = lambda rollout: None,
) -> None:
    """slime's order of things: the model's configuration is assigned anew at every rollout."""
    for rollout in range(first, last):
        policy.model.config.grad_scale_func = policy.optimizer.scale_loss
        policy.model.config.timers = None
        policy.model.config.finalize_model_grads_func = finalize_model_grads
        for inner in range(PER_ROLLOUT):
            host_step(
                policy,
                rollout * PER_ROLLOUT + inner,
                lambda rollout=rollout, inner=inner: slime_plugin.before_train_step(  # type: ignore[misc]
                    args, rollout, inner, [policy.ddp], policy.optimizer, policy.scheduler
                ),
            )
        after(rollout)


def weights(policy: MegatronPolicy) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in policy.model.named_parameters()}


def worst(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    return max((left[name] - right[name]).abs().max().item() for name in left)


def logged(kept: list[dict[str, float]]) -> None:
    """A stand-in for slime's logging module, which its hook writes to."""
    names = ("slime", "slime.observability", "slime.observability.logging_utils")
    modules = {name: types.ModuleType(name) for name in names}
    modules[names[-1]].log = lambda args, values, step_key: kept.append(dict(values))  # type: ignore[attr-defined]
    sys.modules.update(modules)


def hosts(layout: dict[str, Any], folder: str) -> dict[str, Any]:
    """Everything of one layout; keys say what was compared."""
    torch.set_num_threads(1)
    kept: list[dict[str, float]] = []
    logged(kept)
    groups = world.start(ParallelConfig(**layout), 1)
    found: dict[str, Any] = {}
    plain = fresh(layout, groups)
    start = weights(plain)
    for step in range(STEPS):
        host_step(plain, step, lambda: None)
        if step + 1 == PER_ROLLOUT:
            plain_early = weights(plain)
    plain_end = weights(plain)
    found["plain moved"] = min(worst(start, plain_early), worst(plain_early, plain_end))

    off = fresh(layout, groups)
    slime_loop(off, types.SimpleNamespace(vp2o={"stein": {"enabled": False}}), last=1)
    found["slime off"] = worst(weights(off), plain_early)
    hooked = pretrain_plugin.post_wrap_hook(None)
    off = fresh(layout, groups)
    chunks = hooked([off.ddp])
    for step in range(PER_ROLLOUT):
        host_step(off, step, lambda: None)
    found["pretrain off"] = worst(weights(off), plain_early)
    found["pretrain off, function untouched"] = (
        chunks[0] is off.ddp and off.model.config.finalize_model_grads_func is finalize_model_grads
    )

    ours, transform = own(layout, groups)
    args = types.SimpleNamespace(vp2o=ON, load=None)
    slime = fresh(layout, groups)
    path = Path(folder) / "iter_0000004"

    def save(rollout: int) -> None:
        if rollout == 1 and layout:  # saving takes as long as all else of a rank: in one layout
            if groups.rank == 0:
                path.mkdir(parents=True)
            torch.distributed.barrier()
            dist_checkpointing.save({"model": slime.model.sharded_state_dict()}, str(path))
            torch.save(slime.optimizer.state_dict(), Path(folder) / f"optimizer{groups.rank}.pt")

    slime_loop(slime, args, after=save)
    found["slime and own trainer"] = worst(weights(slime), weights(ours))
    found["transform moved"] = worst(weights(slime), plain_end)
    found["metrics"] = slime_plugin.metrics([slime.ddp])
    found["own steps"] = transform.steps
    found["logged"] = kept

    if layout:
        found |= resumed(layout, groups, folder, weights(slime))
    pretrain = fresh(layout, groups)
    pretrain_plugin._write = lambda metrics: None  # the writers are megatron.training's
    pretrain_plugin.post_wrap_hook(["stein.enabled=true", "stein.neighbours=2", "stein.repulsion_scale=relative"])(
        [pretrain.ddp]
    )
    for step in range(STEPS):
        host_step(pretrain, step, lambda: None)
    found["pretrain and own trainer"] = worst(weights(pretrain), weights(ours))

    found |= broken(layout, groups, [pretrain.ddp])
    losses = fresh(layout, groups)
    slime_loop(losses, types.SimpleNamespace(vp2o=LOSSES, load=None), last=1)
    found["losses moved"] = worst(weights(losses), plain_early)
    world.stop_model_parallel()
    world.stop()
    return found


def broken(layout: dict[str, Any], groups: Any, plugged: list[Any]) -> dict[str, Any]:
    """What is said of a second registration and of a release that was not tested; a critic's model is left alone."""
    said: list[str] = []
    kept = logging.Handler()
    kept.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    versions.logger.addHandler(kept)
    versions.TESTED["megatron-core"] = ("0.1",)
    versions.warn_if_untested.cache_clear()
    messages = {}
    for name, call in {
        "pretrain": lambda model: pretrain_plugin.post_wrap_hook(LOSSES)(model),
        "slime": lambda model: slime_plugin.before_train_step(
            types.SimpleNamespace(vp2o=ON, load=None), 0, 0, model, None, None
        ),
    }.items():
        try:
            call(plugged)
        except ConfigError as error:
            messages[f"{name} twice"] = str(error)
    policy = fresh(layout, groups)
    policy.ddp.role = "critic"
    slime_plugin.before_train_step(types.SimpleNamespace(vp2o=ON, load=None), 0, 0, [policy.ddp], None, None)
    function = policy.model.config.finalize_model_grads_func
    return {**messages, "warnings": said, "critic untouched": function is finalize_model_grads}


def resumed(layout: dict[str, Any], groups: Any, folder: str, straight: dict[str, Tensor]) -> dict[str, Any]:
    """Load weights and optimizer as slime does, before its first step; the hook then finds its state in the checkpoint."""
    policy = fresh(layout, groups)
    path = Path(folder) / "iter_0000004"
    wanted = policy.model.sharded_state_dict()
    policy.model.load_state_dict(dist_checkpointing.load(wanted, str(path)))
    policy.optimizer.load_state_dict(torch.load(Path(folder) / f"optimizer{groups.rank}.pt", weights_only=False))
    for _ in range(2 * PER_ROLLOUT):
        policy.scheduler.step(1)
    (Path(folder) / "latest_checkpointed_iteration.txt").write_text("4")
    slime_loop(policy, types.SimpleNamespace(vp2o=ON, load=folder), first=2)
    lost = fresh(layout, groups)
    lost.model.load_state_dict(dist_checkpointing.load(lost.model.sharded_state_dict(), str(path)))
    lost.optimizer.load_state_dict(torch.load(Path(folder) / f"optimizer{groups.rank}.pt", weights_only=False))
    for _ in range(2 * PER_ROLLOUT):
        lost.scheduler.step(1)
    slime_loop(lost, types.SimpleNamespace(vp2o=ON, load=None), first=2)
    return {
        "resumed and straight": worst(weights(policy), straight),
        "resumed without its state": worst(weights(lost), straight),
    }
