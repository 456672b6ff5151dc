"""What the ranks of test_evaluation_weights.py do: evaluate with the learner's weights while the actor has others.

Shape legend: N sequences of this rank.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_vp2o.megatron.platform.cpu import enable_cpu

enable_cpu()

from megatron_vp2o.config.schema import Implementation, Precision  # noqa: E402
from megatron_vp2o.megatron.actor.generation import MegatronEngine  # noqa: E402
from megatron_vp2o.megatron.learner.policy import MegatronPolicy  # noqa: E402
from megatron_vp2o.megatron.model.build import weight_tensors  # noqa: E402
from megatron_vp2o.megatron.platform import world  # noqa: E402
from megatron_vp2o.parallel.groups import any_rank  # noqa: E402
from megatron_vp2o.rl.objectives import next_token  # noqa: E402
from megatron_vp2o.rl.types import Rollouts, SamplingParams, TrainBatch  # noqa: E402
from tests.megatron.policy_job import ENDS, GROUP, PROMPTS, VOCAB, fixed_batch, small_config  # noqa: E402

SAMPLINGS = [SamplingParams(0.0, 1.0, 10, seed=3), SamplingParams(1.0, 0.9, 10, seed=4)]


class _Stopped(Exception):
    """What goes wrong in an evaluation."""


def run(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One result a case; the world's size is the same for all."""
    torch.set_num_threads(1)
    results = []
    for case in cases:
        try:
            results.append(evaluate(**case))
        finally:
            world.stop_model_parallel()
    world.stop()
    return results


def evaluate(layout: dict[str, Any], implementation: str, precision: str, fails_after: int) -> dict[str, Any]:
    """What an evaluation said beside an engine with a copy of the learner's weights, and what it left behind.

    Args:
        fails_after: tokens that the actor draws of each sequence before a second evaluation breaks off.
    """
    config = small_config(**layout)
    config.model.implementation, config.model.precision = Implementation(implementation), Precision(precision)
    groups = world.start(config.parallel, config.seed)
    policy = MegatronPolicy(config, groups, vocab_size=VOCAB, optimizer_steps=4)
    engine, copied = (MegatronEngine(config, policy, eos_ids=ENDS, pad_id=0) for _ in range(2))
    engine.log_gates(40)
    engine.record_routes()
    engine.refresh(0)
    _train(policy)
    copied.refresh(1)  # an independent copy of what the learner has now
    share = len(PROMPTS) // groups.dp_size
    mine = range(groups.dp_rank * share, (groups.dp_rank + 1) * share)

    def generate(of: MegatronEngine) -> list[Rollouts]:
        return [of.generate([PROMPTS[i] for i in mine], list(mine), sampling, GROUP) for sampling in SAMPLINGS]

    expected, before, state = generate(copied), generate(engine), _state(engine)
    alive = _bytes_alive()
    with engine.at_learner_weights():
        added = _bytes_alive() - alive
        own = _places(weight_tensors(engine.actor)) == _places(weight_tensors(policy.model))
        found = generate(engine)
    left = [_difference(state, _state(engine)), *map(_apart, generate(engine), before)]
    stopped = _broken(engine, lambda: generate(engine), fails_after)
    left += [_difference(state, _state(engine)), *map(_apart, generate(engine), before)]
    _train(policy)  # the learner is still one that learns, from its own weights
    engine.refresh(2)
    copied.refresh(2)
    left += list(map(_apart, generate(engine), generate(copied)))
    moved = any(_apart(a, b) for a, b in zip(found, before, strict=True))
    return {
        "as a copy": list(map(_apart, found, expected)),
        "routes": [rollouts.routes_NSLK is not None or rollouts.gates is not None for rollouts in found],
        "own": own,
        "added": added,
        "weights": sum(tensor.nbytes for tensor in weight_tensors(engine.actor)),
        "left": left,
        "stopped": stopped,
        "moved": any_rank(moved, groups.world),
    }


def _train(policy: MegatronPolicy) -> None:
    rollouts = fixed_batch()
    mask_NS = rollouts.response_mask_NS()
    for _ in range(2):
        policy.forward_backward(TrainBatch(rollouts.tokens_NS, rollouts.total_len_N, mask_NS), next_token, 2)
        assert not policy.optimizer_step(1).skipped


def _broken(engine: MegatronEngine, evaluation: Any, after: int) -> bool:
    """Whether an evaluation was under way when its actor broke off, at the same token on all ranks."""
    sample, tokens = engine._sample, 0

    def failing(*args: Any) -> Any:
        nonlocal tokens
        tokens += 1
        if tokens > after:
            raise _Stopped
        return sample(*args)

    engine._sample = failing  # type: ignore[method-assign, assignment]
    try:
        with engine.at_learner_weights():
            evaluation()
    except _Stopped:
        return tokens > after
    finally:
        engine._sample = sample  # type: ignore[method-assign]
    return False


def _places(tensors: Sequence[Tensor]) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


def _bytes_alive() -> int:
    """Of all tensors' storages in this process, each counted once."""
    gc.collect()
    tensors = [found for found in gc.get_objects() if isinstance(found, Tensor) and found.device.type == "cpu"]
    storages = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}
    return sum(storages.values())


def _state(engine: MegatronEngine) -> dict[str, Any]:
    """All that says what an actor generates, cloned."""
    tensors = weight_tensors(engine.actor)
    return {
        "places": _places(tensors),
        "values": [tensor.detach().clone() for tensor in tensors],
        "version": engine.version,
        "checksum": engine.checksum().read(),
        "contexts": engine._logged_contexts,
        "records": engine._records_routes,
    }


def _difference(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """What is not the same to the bit."""
    same = {name: a[name] == b[name] for name in a if name != "values"}
    same["values"] = all(map(torch.equal, a["values"], b["values"]))
    return [name for name, equal in same.items() if not equal]


def _apart(a: Rollouts, b: Rollouts) -> list[str]:
    """What differs between rollouts, to the bit."""
    columns = ("tokens_NS", "total_len_N", "logprobs_NS", "model_logprobs_NS", "finished_N")
    return [name for name in columns if not torch.equal(getattr(a, name), getattr(b, name))]
