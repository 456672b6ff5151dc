"""Routes of a real vLLM server on this machine: those of transformers, whatever the server's scheduler did, and replayed in
training."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_vp2o.core.routes import FREE, unpack_routes
from megatron_vp2o.rl.types import Rollouts, SamplingParams
from megatron_vp2o.rollout.answers import RoutesAsked
from megatron_vp2o.rollout.store import RolloutFile, file_of
from tests.rollout.test_vllm import MICRO, PYTHON, ROOT, SERVED, VLLMHarness, measured

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(not PYTHON.is_file(), reason=f"no vLLM at {PYTHON}: make test-vllm makes its environment"),
]

CROWDED = ("--block-size", "32", "--max-num-batched-tokens", "160", "--num-gpu-blocks-override", "48")
"""Prompts are read in chunks, and 48 blocks of 32 tokens do not hold the answers of a batch: requests are preempted."""


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VLLMHarness]:
    made = VLLMHarness(tmp_path_factory.mktemp("vllm"), RoutesAsked((0, 1, 2), 8, 2), CROWDED)
    yield made
    made.engine.close()


@torch.no_grad()
def own_routes(model: Any, tokens_NS: Tensor) -> Tensor:
    """What transformers chooses, [N, S, L, K], sorted. Rows are padded on the right, which a causal model does not see."""
    seen: list[Tensor] = []
    gates = [layer.mlp.gate for layer in model.model.layers]
    hooks = [gate.register_forward_hook(lambda _, __, out: seen.append(_chosen(out))) for gate in gates]
    model(tokens_NS)
    for hook in hooks:
        hook.remove()
    return torch.stack([ids.view(*tokens_NS.shape, -1) for ids in seen], dim=2).sort(-1).values


def _chosen(out: Any) -> Tensor:
    """The experts' ids among what a router returns."""
    return next(part for part in out if not part.is_floating_point())


def different(harness: VLLMHarness, model: int, rollouts: Rollouts) -> tuple[int, int]:
    """Tokens with other routes than the model's own in some layer, and all tokens that should have routes. No others have some."""
    assert rollouts.routes_NSLK is not None
    routes_NSLK = unpack_routes(rollouts.routes_NSLK)
    routed_NS = torch.arange(routes_NSLK.shape[1]) < rollouts.total_len_N[:, None] - 1
    assert (routes_NSLK[routed_NS] != FREE).all() and (routes_NSLK[~routed_NS] == FREE).all()
    other_NS = (routes_NSLK.sort(-1).values != own_routes(harness.models[model], rollouts.tokens_NS)).any(-1).any(-1)
    return int((other_NS & routed_NS).sum()), int(routed_NS.sum())


def counted(harness: VLLMHarness, name: str) -> float:
    """One of the server's own counters."""
    with urllib.request.urlopen(f"{harness.process.url}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    return sum(float(value) for value in re.findall(rf"^vllm:{name}{{.*}} (\S+)$", text, re.MULTILINE))


def test_routes_are_the_models_own(harness: VLLMHarness) -> None:
    """Random prompts with common beginnings, twice each, so that the second time finds them cached; weights that change, with which
    nothing cached counts; requests that do not fit and are computed again."""
    rng = random.Random(0)
    wrong = total = 0
    for version in range(4):
        model, length = version % 2, (6, 180, 100, 200)[version]
        harness.engine.update_weights(harness.weights(model), version + 1, harness.probe(model))
        begins = [rng.randrange(3, 64) for _ in range(length - 3)]
        prompts = [[*begins, *(rng.randrange(3, 64) for _ in range(3))] for _ in range(6)]
        for _ in range(2):
            sampling = SamplingParams(1.0, 1.0, rng.randint(20, 50), 0)
            rollouts = harness.engine.generate(prompts, range(6), sampling, group_size=8)
            found = different(harness, model, rollouts)
            wrong, total = wrong + found[0], total + found[1]
    figures = {name: counted(harness, f"{name}_total") for name in ("num_preemptions", "prefix_cache_hits")}
    print(f"{wrong} of {total} tokens went elsewhere; {figures}")
    assert total > 20_000 and wrong <= total / 10_000
    assert min(figures.values()) > 0, "requests were preempted, and prefixes were cached"


@pytest.mark.parametrize("ranks", [1, 2])
def test_training_replays_the_servers_routes(tmp_path: Path, ranks: int) -> None:
    """R3, on one rank and on two pipeline stages: in float32 the trainer would have chosen the same experts, all tokens but a
    sequence's last are replayed, and each stage keeps the routes of its layers."""
    run_dir = tmp_path / "run"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    more = ["init_from=null", "algorithm.steps=3", "algorithm.minibatches=1", "algorithm.mismatch.measure=true"]
    more += [
        "optimizer.lr_warmup_steps=1",
        "algorithm.filter_uniform_groups=false",
        "algorithm.entropy_coef=0.1",
        "algorithm.prompts_per_step=32",
    ]
    split = ["rollout.router_replay=R3", f"parallel.pipeline_parallel={ranks}", "checkpoint.save_at_end=false"]
    command = [*torchrun, "-m", "megatron_vp2o.train", "--config-name", "countdown_tiny_grpo", f"run_dir={run_dir}"]
    done = subprocess.run(
        [sys.executable, *command, *MICRO, *SERVED, *more, *split],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    figures = {key: measured(run_dir, key) for key in ("replay/tokens", "replay/agreement", "policy/logprob_mismatch")}
    print(ranks, figures)
    assert len(figures["replay/tokens"]) == 3 and all(0.9 < share < 1 for share in figures["replay/tokens"])
    assert min(figures["replay/agreement"]) > 0.9999
    assert max(figures["policy/logprob_mismatch"]) <= 1e-4
    for rank in range(ranks):
        stored = RolloutFile(file_of(run_dir / "rollouts", rank), writable=False)
        frames = [stored.read(key) or {} for key in stored.places]
        assert len(frames) == 6 and all(frame["routes"].shape[2:] == (2 // ranks, 2) for frame in frames)
