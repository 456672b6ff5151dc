"""One training step of any rank of a recipe's world, in this one process: which groups it is in, what it holds, what it sends.

The model, the optimizer, the Stein transform and the step are the run's own, built under `meta_world`. What is not traced:
generation, scoring, and the trust region's verdict, whose loops end when tokens say so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from megatron_vp2o.megatron.platform.cpu import enable_cpu

enable_cpu()

import torch  # noqa: E402

from megatron_vp2o.config.schema import Implementation, ParallelConfig, TrainConfig  # noqa: E402
from megatron_vp2o.megatron.learner.policy import MegatronPolicy  # noqa: E402
from megatron_vp2o.megatron.model.build import build_model  # noqa: E402
from megatron_vp2o.megatron.model.specs import use_transformer_engine  # noqa: E402
from megatron_vp2o.megatron.platform import world  # noqa: E402
from megatron_vp2o.megatron.platform.compat import forget_auxiliary_losses  # noqa: E402
from megatron_vp2o.megatron.stein import expert_gradients  # noqa: E402
from megatron_vp2o.megatron.stein.prototypes import ExpertPrototypes  # noqa: E402
from megatron_vp2o.megatron.stein.transform import SteinTransform  # noqa: E402
from megatron_vp2o.parallel.groups import Groups, Place  # noqa: E402
from megatron_vp2o.planning.meta_world import Collective, MetaWorld, meta_world  # noqa: E402
from megatron_vp2o.rl.objectives import next_token  # noqa: E402
from megatron_vp2o.rl.types import TrainBatch  # noqa: E402


@dataclass(frozen=True)
class SteinPlan:
    """The exchange of expert gradients on one rank."""

    ranks: tuple[int, ...]
    rounds: int
    columns: int
    """An expert's parameters in all layers of the stage."""
    workspace_bytes: int
    bytes_sent: int
    """To other ranks, both ways."""


@dataclass(frozen=True)
class Trace:
    """What one rank did in one optimizer step.

    Attributes:
        groups: its process groups, by name.
        shapes: shape of each parameter on this rank.
        memory: bytes of weights, gradients and optimizer state, as allocated: with Megatron's padding.
        collectives: in order; `phase` is build, forward_backward, stein or optimizer.
        transformer_engine: whether the model is made of its modules, or of local ones in their place.
    """

    rank: int
    world_size: int
    groups: dict[str, tuple[int, ...]]
    shapes: dict[str, tuple[int, ...]]
    parameters: int
    expert_parameters: int
    memory: dict[str, int]
    collectives: list[Collective]
    stein: SteinPlan | None
    transformer_engine: bool

    def sent(self) -> dict[str, dict[str, int]]:
        """Bytes that leave this rank, by phase and operation."""
        found: dict[str, dict[str, int]] = {}
        for collective in self.collectives:
            of_phase = found.setdefault(collective.phase, {})
            of_phase[collective.op] = of_phase.get(collective.op, 0) + collective.sent(self.rank)
        return found


def trace(config: TrainConfig, rank: int, world_size: int, *, width: int, rows: int = 1, vocab_size: int) -> Trace:
    """Build one rank and trace an optimizer step of one micro-batch.

    Args:
        width: tokens of a row; a multiple of `config.parameters.length_multiple`.
        rows: sequences of the micro-batch.
        vocab_size: of the tokenizer.

    Raises:
        ConfigError: the recipe cannot work on so many processes.
    """
    implementation = config.model.implementation
    # What is allocated and sent is the same under `torch`, whose kernels cannot be traced without values.
    if not torch.cuda.is_available() or not use_transformer_engine(implementation):
        implementation = Implementation.local
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, implementation=implementation))
    forget_auxiliary_losses()  # of another model, traced before
    with meta_world(rank, world_size) as mode:
        mode.phase = "build"
        groups = world.start(config.parallel, config.seed)
        try:
            with _places_known(mode):
                return _step(config, mode, groups, width, rows, vocab_size)
        finally:
            world.stop_model_parallel()
            forget_auxiliary_losses()


def _step(config: TrainConfig, mode: MetaWorld, groups: Groups, width: int, rows: int, vocab_size: int) -> Trace:
    policy = MegatronPolicy(config, groups, vocab_size=vocab_size, optimizer_steps=1000)
    stein = None
    if config.algorithm.stein.enabled:
        prototypes = ExpertPrototypes(policy.ddp, config.algorithm.stein, groups)
        stein = SteinTransform(prototypes, optimizer=policy.optimizer)
    tensor, context = config.parallel.tensor_parallel, config.parallel.context_parallel
    mode.awaited = torch.tensor([width // tensor // context, rows, config.model.hidden_size])
    mode.said = {"loss": 1.0, "tokens": float(width * rows)}  # metrics, from the last pipeline stage
    mask_NS = torch.ones(rows, width, dtype=torch.bool)
    batch = TrainBatch(torch.zeros(rows, width, dtype=torch.long), torch.full((rows,), width), mask_NS, temperature=1.0)
    mode.phase = "forward_backward"
    policy.forward_backward(batch, next_token, rows)
    if stein is not None:
        mode.phase = "stein"
        stein.apply()
    mode.phase = "optimizer"
    policy.optimizer_step(width * rows)
    sizes = {name: parameter.numel() for name, parameter in policy.model.named_parameters()}
    exchange = stein.gradients.exchange if stein is not None and prototypes.layers else None
    return Trace(
        rank=groups.rank,
        world_size=groups.world_size,
        groups={
            field.name: tuple(torch.distributed.get_process_group_ranks(getattr(groups, field.name)))
            for field in dataclasses.fields(groups)
            if field.name not in ("device", "timeout")
        },
        shapes={name: tuple(parameter.shape) for name, parameter in policy.model.named_parameters()},
        parameters=sum(sizes.values()),
        expert_parameters=sum(size for name, size in sizes.items() if ".experts." in name),
        memory=static_memory(policy),
        collectives=[collective for collective in mode.collectives if len(collective.ranks) > 1],
        stein=None
        if exchange is None
        else SteinPlan(
            tuple(torch.distributed.get_process_group_ranks(exchange.members.group)),
            len(exchange.chunks),
            sum(unit.columns for unit in exchange.units),
            exchange.workspace_bytes,
            exchange.bytes_sent,
        ),
        transformer_engine=use_transformer_engine(config.model.implementation),
    )


def built_parameters(config: TrainConfig, vocab_size: int) -> tuple[int, int]:
    """All parameters and those of routed experts, counted in the whole model, built on the meta device.

    Args:
        vocab_size: rows of the embedding, padding included.
    """
    alone = ParallelConfig()
    model = dataclasses.replace(config.model, implementation=Implementation.local)
    with meta_world(0, 1):
        groups = world.start(alone, config.seed)
        try:
            gpt = build_model(model, alone, groups, vocab_size=vocab_size, seed=0, inference=True)
        finally:
            world.stop_model_parallel()
    sizes = {name: parameter.numel() for name, parameter in gpt.named_parameters()}
    return sum(sizes.values()), sum(size for name, size in sizes.items() if ".experts." in name)


def static_memory(policy: MegatronPolicy) -> dict[str, int]:
    """Bytes of weights, gradients and optimizer state that a policy holds, as allocated. Call it after a step."""
    weights = {id(parameter) for parameter in policy.model.parameters()}
    buffers = [*policy.ddp.buffers, *policy.ddp.expert_parallel_buffers]
    state: dict[int, Any] = {}
    for optimizer in policy.optimizers():
        inner = optimizer.optimizer
        kept = [tensor for entry in inner.state.values() for tensor in entry.values() if torch.is_tensor(tensor)]
        masters = [parameter for group in inner.param_groups for parameter in group["params"]]
        low = policy.model.config.params_dtype is not torch.float32  # masters of float32 weights are views of them
        state |= {id(tensor): tensor for tensor in [*kept, *(masters if low else [])] if tensor.dim() > 0}
    return {
        "weights": sum(p.numel() * p.element_size() for p in policy.model.parameters()),
        "gradients": sum(buffer.grad_data.numel() * buffer.grad_data.element_size() for buffer in buffers),
        "optimizer": sum(t.numel() * t.element_size() for key, t in state.items() if key not in weights),
    }


@contextmanager
def _places_known(mode: MetaWorld) -> Iterator[None]:
    """Where all ranks are follows from the groups that were made; nobody is there to be asked."""
    of = {
        name: {rank: ranks.index(rank) for ranks in mode.groups[group] for rank in ranks}
        for name, group in (
            ("ep", "EXPERT_MODEL_PARALLEL_GROUP"),
            ("etp", "EXPERT_TENSOR_PARALLEL_GROUP"),
            ("expert_dp", "EXPERT_DATA_PARALLEL_GROUP"),
        )
    }

    def places(_: Groups, group: Any) -> list[Place]:
        ranks = torch.distributed.get_process_group_ranks(group)
        return [Place(rank, of["ep"][rank], of["etp"][rank], of["expert_dp"][rank]) for rank in ranks]

    real = expert_gradients.gather_places
    expert_gradients.gather_places = places  # type: ignore[assignment]
    try:
        yield
    finally:
        expert_gradients.gather_places = real


def describe(traces: Mapping[int, Trace]) -> str:
    """What was traced, and whether the ranks agree."""
    lines = []
    for rank, each in sorted(traces.items()):
        layers = "transformer-engine's" if each.transformer_engine else "local (transformer-engine cannot be used here)"
        groups = ", ".join(f"{name} {len(ranks)}" for name, ranks in each.groups.items())
        lines += [
            f"rank {rank} of {each.world_size}: {each.parameters / 1e9:.3f}B parameters "
            f"({each.expert_parameters / 1e9:.3f}B of experts); layers are {layers}",
            f"  groups: {groups}",
            "  allocated, GiB: " + ", ".join(f"{name} {size / 2**30:.2f}" for name, size in each.memory.items()),
        ]
        for phase, sent in each.sent().items():
            moved = ", ".join(f"{op} {size / 2**20:.2f}" for op, size in sent.items() if size)
            count = sum(collective.phase == phase for collective in each.collectives)
            lines.append(f"  {phase}: {count} collectives; sent, MiB: {moved or 'nothing'}")
        if each.stein is not None:
            lines.append(
                f"  Stein exchange: {len(each.stein.ranks)} ranks, {each.stein.rounds} rounds, "
                f"{each.stein.bytes_sent / 2**20:.2f} MiB sent, workspace {each.stein.workspace_bytes / 2**20:.1f} MiB"
            )
    found = disagreements(traces)
    if len(traces) > 1:
        lines.append(
            "order and sizes of collectives: " + ("equal on all ranks that share a group" if not found else "")
        )
    lines += [f"  DISAGREE: {line}" for line in found]
    lines.append(
        "not traced: generation, scoring, the trust region's verdict; routes are balanced, values mean nothing"
    )
    return "\n".join(lines)


def sample_ranks(group: Sequence[int]) -> list[int]:
    """First, middle and last."""
    return sorted({group[0], group[len(group) // 2], group[-1]})


def disagreements(traces: Mapping[int, Trace]) -> list[str]:
    """Where ranks of one group would not call the same collectives in the same order with matching sizes; [] is good."""
    found: list[str] = []
    ranks = sorted(traces)
    for position, a in enumerate(ranks):
        for b in ranks[position + 1 :]:
            found.extend(_between(traces[a], traces[b]))
    return found


def _between(a: Trace, b: Trace) -> Iterator[str]:
    common = {c.ranks for c in a.collectives} | {c.ranks for c in b.collectives}
    for group in common:
        if a.rank not in group or b.rank not in group:
            continue
        ours, theirs = ([c for c in t.collectives if c.ranks == group] for t in (a, b))
        where = f"ranks {a.rank} and {b.rank} in their group of {len(group)}"
        if len(ours) != len(theirs):
            yield f"{where}: {len(ours)} and {len(theirs)} collectives"
            continue
        for number, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            if problem := _mismatch(a.rank, b.rank, one, other):
                yield f"{where}: collective {number} ({one.phase}): {problem}"
                break


def _mismatch(a: int, b: int, one: Collective, other: Collective) -> str | None:
    if {one.op, other.op} == {"send", "receive"}:
        return None if one.given == other.given else f"{one.given} bytes are sent where {other.given} are awaited"
    if (one.op, one.phase, one.dtype) != (other.op, other.phase, other.dtype):
        return f"{one.op} of {one.dtype} in {one.phase} meets {other.op} of {other.dtype} in {other.phase}"
    if one.sends:
        at_a, at_b = one.ranks.index(a), one.ranks.index(b)
        for sends, receives in ((one.sends[at_b], other.receives[at_a]), (other.sends[at_a], one.receives[at_b])):
            if sends != receives:
                return f"{sends} elements are sent where {receives} are awaited"
        return None
    if (one.given, one.taken) != (other.given, other.taken):
        return f"{one.op} of {one.given} bytes meets {other.given}"
    return None
