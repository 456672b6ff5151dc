"""Plans as text."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from megatron_vp2o.config.schema import ParallelConfig
from megatron_vp2o.planning.estimate import Plan
from megatron_vp2o.planning.hardware import DEVICES, GIB
from megatron_vp2o.planning.servers import ServerPlan

NOTES = (
    "memory and traffic: one rank of the fullest pipeline stage, balanced routes; the actor is a copy of the weights beside "
    "the learner; training and decoding take turns",
    "traffic: bytes that leave the rank, a ring's least; times: every row as long as it may get (response_share)",
    "weights are synchronised by a local copy, and to servers through files: the first rank writes all of them, then all "
    "servers read them side by side; whether disk and network let so many read at once is not asked. With "
    "rollout.server.transfer=broadcast the first rank sends all of them once to each server",
    "evaluation and checkpoints are not in the step time; nothing here was measured on a GPU",
)


def describe(plan: Plan) -> str:
    """All of a plan."""
    count, rank, memory = plan.parameters, plan.rank, plan.memory
    lines = [
        f"{plan.name} on {plan.gpus} x {plan.device}, {plan.vocab_size} rows of embedding",
        *([f"  {plan.ranks} ranks train, {plan.gpus - plan.ranks} GPUs are the servers'"] if plan.servers else []),
        f"parameters: {count.total / 1e9:.2f}B in all, {count.active / 1e9:.2f}B active; "
        f"on a rank {rank.total / 1e9:.3f}B ({rank.expert / 1e9:.3f}B of experts)",
        "memory of a rank, GiB:",
        *_table({name: size / GIB for name, size in memory.resident.items()}, "{:8.2f}"),
        *_table({f"{name} (training)": size / GIB for name, size in memory.training.items()}, "{:8.2f}"),
        *_table({f"{name} (decoding)": size / GIB for name, size in memory.decoding.items()}, "{:8.2f}"),
        *_table({f"{name} (scoring)": size / GIB for name, size in memory.scoring.items()}, "{:8.2f}"),
        *_table({"contexts of CUDA and NCCL, fragmentation": memory.lost / GIB}, "{:8.2f}"),
        f"  {'peak':<44}{memory.peak / GIB:8.2f} of {plan.capacity / GIB:.0f}",
        "sent by a rank in a training step, GiB:",
        *(
            f"  {name:<44}{stream.bytes / GIB:8.2f}{'' if stream.exact else ' at most'}"
            for name, stream in plan.traffic.items()
        ),
        "operations of a training step, TFLOP, all ranks:",
        *_table({name: value / 1e12 for name, value in dataclasses.asdict(plan.flops).items() if value}, "{:8.0f}"),
        f"training step: {plan.step_seconds:.1f} s estimated ({plan.work.updates} optimizer steps, "
        f"{plan.work.micro_batches} micro-batches a rank), of it:",
        *_table(plan.times, "{:8.2f}"),
        f"weight synchronisation: {plan.sync_seconds * 1e3:.1f} ms",
        *(_servers(plan, plan.servers) if plan.servers is not None else []),
    ]
    if plan.fits:
        lines.append(f"FITS: {(plan.capacity - memory.peak) / GIB:.1f} GiB are left")
    if plan.servers is not None:
        lines += [f"SERVERS DO NOT FIT: {problem}" for problem in plan.servers.problems]
        lines += [f"warning: {warning}" for warning in plan.servers.warnings]
    if memory.peak > plan.capacity:
        lines += [f"DOES NOT FIT: {(memory.peak - plan.capacity) / GIB:.1f} GiB too much. What would lower it:"]
        lines += [f"  {knob}" for knob in plan.knobs] or ["  nothing that was tried: more GPUs, or larger ones"]
    return "\n".join([*lines, *assumptions(plan)])


def _servers(plan: Plan, servers: ServerPlan) -> list[str]:
    each = f"{servers.tensor_parallel} GPU{'s' if servers.tensor_parallel > 1 else ''}"
    whose = "" if servers.gpus else ", started by somebody else on other GPUs, which are taken for the same"
    parts = {"weights": servers.weights, "workspace": servers.workspace, "cache": servers.cache}
    return [
        f"servers: {servers.servers} of {each} each{whose}; memory of each GPU, GiB:",
        *_table({name: size / GIB for name, size in parts.items()}, "{:8.2f}"),
        f"  the cache holds {servers.held} of the {servers.asked} sequences that a server is asked for at once",
        f"  {servers.tokens_per_second:.0f} tokens/s a server, {servers.servers * servers.tokens_per_second:.0f} in all",
        f"  a synchronisation: {servers.transferred / GIB:.1f} GiB are written (transfer=broadcast: taken) in "
        f"{servers.write_seconds:.1f} s and read (sent) in {servers.read_seconds:.1f} s",
        f"  a step: {plan.synchronous_seconds:.1f} s with generation before training (rollout.ahead=0), "
        f"{plan.overlapped_seconds:.1f} s with both side by side (rollout.ahead=1)",
    ]


def assumptions(plan: Plan) -> list[str]:
    """What the plan takes for granted."""
    device = DEVICES[plan.device]
    facts = {**dataclasses.asdict(plan.assumed), **dataclasses.asdict(device)}
    return [
        "assumed (--assume name=value):",
        "  " + ", ".join(f"{name}={value:g}" for name, value in facts.items()),
        *(f"  {note}" for note in NOTES),
    ]


def layouts(found: Iterable[tuple[ParallelConfig, Plan]], limit: int = 10) -> str:
    """The best layouts as a table."""
    lines = ["layouts that fit, the fastest by estimate first:", "   TP  CP  PP  EP ETP   peak GiB   step s"]
    for parallel, plan in list(found)[:limit]:
        sizes = (
            parallel.tensor_parallel,
            parallel.context_parallel,
            parallel.pipeline_parallel,
            parallel.expert_parallel,
            parallel.expert_tensor_parallel,
        )
        row = "".join(f"{size:4d}" for size in sizes)
        lines.append(f" {row} {plan.memory.peak / GIB:10.1f} {plan.step_seconds:8.1f}")
    return "\n".join(lines if len(lines) > 2 else ["no layout fits: take more GPUs, or larger ones"])


def _table(values: dict[str, float], form: str) -> list[str]:
    return [f"  {name:<44}{form.format(value)}" for name, value in values.items()]
