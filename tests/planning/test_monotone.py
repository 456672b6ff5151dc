"""The plan knows what a setting is for: at drawn recipes, more of it never costs what it is there to save, and where it applies it
saves some. VP2O_PLANS=1000: so many draws."""

from __future__ import annotations

import os
import random
from collections import Counter
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import lru_cache
from typing import Any

import pytest

from megatron_vp2o.config.compose import compose
from megatron_vp2o.config.schema import TrainConfig
from megatron_vp2o.errors import ConfigError
from megatron_vp2o.planning.compute import Flops, step_flops
from megatron_vp2o.planning.estimate import check
from megatron_vp2o.planning.hardware import DEVICES, GIB, Assumptions
from megatron_vp2o.planning.memory import Memory, memory, most_logits
from megatron_vp2o.planning.servers import ServerPlan, plan_servers, ranks_on
from megatron_vp2o.planning.traffic import traffic
from megatron_vp2o.planning.workload import Workload, padded_vocabulary, workload

Words = dict[str, Any]


@dataclass
class Planned:
    """A recipe's memory and work."""

    config: TrainConfig
    ids: int
    work: Workload
    memory: Memory
    flops: Flops
    bytes: dict[str, int] = field(default_factory=dict)
    servers: ServerPlan | None = None

    @property
    def static(self) -> int:
        return sum(self.memory.resident.values())

    @property
    def turns(self) -> list[int]:
        return [sum(turn.values()) for turn in (self.memory.training, self.memory.decoding, self.memory.scoring)]


def planned(words: Words, gpus: int, assumed: Assumptions) -> Planned:
    """Raises ConfigError for what cannot work."""
    groups = [f"{name}={value}" for name, value in words.items() if "." not in name]
    config = _composed(tuple(groups))
    for name, value in words.items():
        if "." in name:
            config = changed(config, name.split("."), value)
    ranks = ranks_on(config, gpus)
    check(config, ranks)
    ids, work = padded_vocabulary(config), workload(config, ranks, assumed)
    replicas = ranks // (
        config.parallel.tensor_parallel * config.parallel.pipeline_parallel * config.parallel.context_parallel
    )
    return Planned(
        config,
        ids,
        work,
        memory(config, ranks, ids, work, assumed),
        step_flops(config, work, replicas, ids),
        {name: stream.bytes for name, stream in traffic(config, ranks, ids, work).items()},
        plan_servers(config, ids, DEVICES["h100"], assumed),
    )


@lru_cache
def _composed(groups: tuple[str, ...]) -> TrainConfig:
    """Composing takes a hundred times as long as changing settings."""
    return compose("train", list(groups))


def changed(settings: Any, path: list[str], value: Any) -> Any:
    """With one setting changed; an enumeration's by its word."""
    old = getattr(settings, path[0])
    if len(path) > 1:
        return replace(settings, **{path[0]: changed(old, path[1:], value)})
    return replace(settings, **{path[0]: type(old)(value) if isinstance(old, Enum) else value})


def recipe(chance: random.Random) -> tuple[Words, int, Assumptions]:
    """Settings, GPUs, and what is assumed."""
    heads, groups = chance.choice([(32, 4), (16, 16), (64, 8)])
    algorithm = chance.choice(["supervised", "grpo", "grpo", "vp2o", "vp2o"])
    new = chance.choice([512, 2000, 8192, 16384])
    words: Words = {
        "algorithm": algorithm,
        "model.hidden_size": chance.choice([512, 2048, 4096]),
        "model.num_layers": chance.choice([8, 24, 48]),
        "model.num_attention_heads": heads,
        "model.num_query_groups": groups,
        "model.kv_channels": chance.choice([64, 128]),
        "model.num_moe_experts": chance.choice([16, 64, 128]),
        "model.moe_router_topk": chance.choice([2, 8]),
        "model.moe_ffn_hidden_size": chance.choice([256, 768, 3072]),
        "model.vocab_size": chance.choice([32000, 151936]),
        "model.precision": chance.choice(["fp32", "bf16", "bf16"]),
        "model.recompute": chance.choice([True, False]),
        "model.logits_chunk_mib": chance.choice([32, 256, 1024]),
        "model.implementation": chance.choice(["local", "torch", "auto"]),
        "model.max_sequence_length": new + 2048,
        "rollout.sampling.max_new_tokens": new,
        "rollout.max_batch_size": chance.choice([8, 64, 1024]),
        "evaluation.problems": chance.choice([16, 100]),
        "evaluation.samples": 16,
        "parallel.tensor_parallel": chance.choice([1, 1, 2]),
        "parallel.context_parallel": chance.choice([1, 1, 2, 4]),
        "parallel.pipeline_parallel": chance.choice([1, 1, 2]),
        "parallel.expert_parallel": chance.choice([1, 2, 4, 8]),
        "parallel.distributed_optimizer": chance.choice([True, False]),
    }
    if algorithm == "supervised":
        words |= {"algorithm.global_batch_size": 256, "algorithm.micro_batch_size": chance.choice([1, 4])}
    else:
        words |= {
            "algorithm.prompts_per_step": 128,
            "algorithm.group_size": chance.choice([4, 8]),
            "algorithm.micro_batch_size": chance.choice([1, 2, 4]),
            "algorithm.micro_batch_tokens": chance.choice([None, 4096, 16384, 65536]),
            "algorithm.kl_reference": chance.choice(["none", "initial"]),
            "algorithm.mismatch.measure": chance.choice([None, True]),
        }
        words["algorithm.kl_coef"] = 0.1 if words["algorithm.kl_reference"] == "initial" else 0.0
        if chance.random() < 0.4:
            words |= {
                "rollout": "vllm",
                "rollout.urls": [f"http://127.0.0.1:{port}" for port in range(8001, 8001 + chance.choice([1, 4]))],
                "rollout.server.tensor_parallel": chance.choice([1, 2, 4]),
                "rollout.server.max_num_seqs": chance.choice([16, 256]),
            }
    assumed = Assumptions(prompt_tokens=chance.choice([32, 1024, 2048]), response_share=chance.choice([0.125, 0.5, 1]))
    return words, 32, assumed


def _context(a: Planned, b: Planned) -> list[bool]:
    """CP doubled, on twice the GPUs."""
    packed = b.work.packed is not None
    tokens = [one.work.micro_tokens / one.config.parallel.context_parallel for one in (a, b)]
    plain = _plain(b) and not _plain(
        a
    )  # logits that fit into one chunk are taken whole, with more copies than a chunk has
    return [
        tokens[1] <= 0.5 * tokens[0] + 8,
        b.memory.training["activations"] < a.memory.training["activations"],
        b.static <= a.static,
        plain or b.turns[0] < a.turns[0] or a.config.model.num_query_groups > 8,
        b.turns[1] <= a.turns[1]
        and (packed or b.turns[2] <= 1.01 * a.turns[2]),  # actors and references see whole rows
        b.bytes.get("context parallelism", 0) > a.bytes.get("context parallelism", 0),
        b.flops.training == pytest.approx(a.flops.training, rel=1e-9),
        b.flops.scoring == pytest.approx(2 * a.flops.scoring, rel=1e-9),
        b.flops.decoding == pytest.approx(a.flops.decoding, rel=1e-9) or b.work.decoded < a.work.decoded // 2 + 8,
    ]


def _plain(one: Planned) -> bool:
    rows = one.ids // one.config.parallel.tensor_parallel
    return one.work.micro_tokens / one.config.parallel.context_parallel * rows <= most_logits(one.config, one.ids)


def _tensor(a: Planned, b: Planned) -> list[bool]:
    weights = [one.memory.resident["weights"] for one in (a, b)]
    return [weights[1] < weights[0], b.memory.training["activations"] < a.memory.training["activations"]]


def _experts(a: Planned, b: Planned) -> list[bool]:
    names = ("weights", "gradients", "actor weights")
    return [b.memory.resident[name] < a.memory.resident[name] for name in names] + [b.turns[0] <= a.turns[0]]


def _chunk(a: Planned, b: Planned) -> list[bool]:
    same = a.memory.training["activations"] == b.memory.training["activations"]
    logits = [one.memory.training.get("logits") for one in (a, b)]
    smaller = logits[0] is None or logits[1] is None or logits[1] < logits[0] or (_plain(a) and _plain(b))
    return [same, smaller, b.turns[0] <= a.turns[0], b.turns[2] <= a.turns[2], b.static == a.static]


def _recompute(a: Planned, b: Planned) -> list[bool]:
    return [b.memory.training["activations"] < a.memory.training["activations"], b.flops.total > a.flops.total]


def _budget(a: Planned, b: Planned) -> list[bool]:
    """Fewer tokens in a micro-batch."""
    # else a single row takes that much room, or there are no more tokens
    longer = a.work.micro_tokens > max(a.work.longest, getattr(b.config.algorithm, "micro_batch_tokens", None) or 0)
    stages = a.config.parallel.pipeline_parallel
    # as many micro-batches as there are stages are under way at once, if there are so many
    each = [one.memory.training["activations"] / min(stages, one.work.micro_batches) for one in (a, b)]
    return [
        each[1] < each[0] if longer else each[1] <= each[0],
        b.work.micro_batches >= a.work.micro_batches,
        b.flops.total == pytest.approx(a.flops.total, rel=1e-9),
    ]


def _sharing(a: Planned, b: Planned) -> list[bool]:
    moved = [sum(size for name, size in one.bytes.items() if "grad" not in name) for one in (a, b)]
    computed = b.work.computed < a.work.computed and b.work.pairs < a.work.pairs
    return [
        computed,
        b.flops.total < a.flops.total,
        moved[1] <= moved[0],
        b.work.micro_batches <= a.work.micro_batches,
        b.work.rows == a.work.rows,
    ]


def _reference(a: Planned, b: Planned) -> list[bool]:
    more = b.memory.resident["KL reference"] == a.memory.resident["weights"]
    return [
        more,
        b.static - a.static == a.memory.resident["weights"],
        bool(b.memory.scoring),
        b.flops.total > a.flops.total,
    ]


def _sharded(a: Planned, b: Planned) -> list[bool]:
    return [b.memory.resident["optimizer"] <= a.memory.resident["optimizer"], b.static <= a.static]


def _longer(a: Planned, b: Planned) -> list[bool]:
    grown = all(y >= x for x, y in zip(a.turns, b.turns, strict=True))
    packed = b.work.packed is not None and a.work.packed == b.work.packed
    supervised = a.config.algorithm.name == "supervised"
    activations = b.memory.training["activations"] > a.memory.training["activations"]
    found = [grown or (_plain(a) and not _plain(b)), activations or packed or supervised]
    if a.servers is not None and b.servers is not None:
        found += [b.servers.held <= a.servers.held, b.servers.seconds > a.servers.seconds]
    return found


def _server_split(a: Planned, b: Planned) -> list[bool]:
    assert a.servers is not None and b.servers is not None
    return [
        b.servers.weights < a.servers.weights,
        b.servers.cache >= a.servers.cache,
        b.servers.held >= a.servers.held,
        len(b.servers.problems) <= len(a.servers.problems),
        b.servers.tensor_parallel == 2 * a.servers.tensor_parallel,
        b.servers.weights + b.servers.workspace + b.servers.cache <= max(b.servers.share, b.servers.weights + 4 * GIB),
    ]


def doubled(words: Words, name: str) -> Words:
    return {**words, name: 2 * words[name]}


def changes(words: Words) -> list[tuple[Any, Words, int]]:
    """What each rule compares the recipe with, and on how many times its GPUs."""
    found: list[tuple[Any, Words, int]] = [
        (_context, {**doubled(words, "parallel.context_parallel"), "algorithm.prefix_sharing": "off"}, 2),
        (_tensor, doubled(words, "parallel.tensor_parallel"), 2),
        (_experts, doubled(words, "parallel.expert_parallel"), 1),
        (_chunk, {**words, "model.logits_chunk_mib": words["model.logits_chunk_mib"] / 4}, 1),
    ]
    if words["model.recompute"] is False:
        found.append((_recompute, {**words, "model.recompute": True}, 1))
    if words["parallel.distributed_optimizer"] is False:
        found.append((_sharded, {**words, "parallel.distributed_optimizer": True}, 1))
    longer = {
        "rollout.sampling.max_new_tokens": 2 * words["rollout.sampling.max_new_tokens"],
        "model.max_sequence_length": 2 * words["model.max_sequence_length"],
    }
    if words["algorithm"] != "supervised":
        found.append((_longer, {**words, **longer}, 1))
        if words["algorithm.kl_reference"] == "none":
            found.append((_reference, {**words, "algorithm.kl_reference": "initial", "algorithm.kl_coef": 0.1}, 1))
        if words["algorithm.micro_batch_tokens"] is not None:
            found.append(
                (_budget, {**words, "algorithm.micro_batch_tokens": words["algorithm.micro_batch_tokens"] // 2}, 1)
            )
    if "rollout" in words:
        found.append((_server_split, doubled(words, "rollout.server.tensor_parallel"), 1))
    return found


def test_settings_save_what_they_are_for() -> None:
    chance, tried, refused = random.Random(20261127), Counter[str](), 0
    for draw in range(int(os.environ.get("VP2O_PLANS", "40"))):
        words, gpus, assumed = recipe(chance)
        pairs = changes(words)
        if words.get("algorithm.micro_batch_tokens") is not None and words["parallel.context_parallel"] == 1:
            base = {**words, "algorithm.prefix_sharing": "off", "model.implementation": "local"}
            pairs.append((_sharing, {**base, "algorithm.prefix_sharing": "on"}, 1))
        for rule, other, times in pairs:
            first = {**other, "algorithm.prefix_sharing": "off"} if rule is _sharing else words
            if rule is _context:  # which shares no prompts
                first = {**words, "algorithm.prefix_sharing": "off"}
            if words["algorithm"] == "supervised":
                first, other = ({k: v for k, v in one.items() if "prefix_sharing" not in k} for one in (first, other))
            try:
                a, b = planned(first, gpus, assumed), planned(other, gpus * times, assumed)
            except ConfigError:
                refused += 1
                continue
            found = rule(a, b)
            tried[rule.__name__] += 1
            assert all(found), (draw, rule.__name__, found, first, other, assumed, a.memory, b.memory, a.work, b.work)
    print(dict(tried), refused)
    assert min(tried[rule] for rule in ("_context", "_tensor", "_chunk", "_budget", "_sharing")) >= 5, (tried, refused)
    assert len(tried) == 11, (tried, refused)
