"""Made-up but plausible records, written through the real writer."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from megatron_vp2o.config.schema import Algorithm
from megatron_vp2o.tracking.record import MetricsRecord
from megatron_vp2o.tracking.schema import schema_for

PASS_AT = (1, 4, 16)
Row = dict[str, Any]


def evaluation(rng: random.Random, prefix: str, skill: float, spread: float, pass_at: Sequence[int]) -> Row:
    """Metrics of an evaluation at accuracy `skill` in [0, 1], with `spread` of the answers found."""
    out: Row = {f"{prefix}/greedy_accuracy": min(1.0, skill + rng.gauss(0, 0.012))}
    for k in pass_at:
        out[f"{prefix}/pass@{k}"] = 1 - (1 - skill) ** (1 + (k - 1) * 0.35 * spread)
    out[f"{prefix}/distinct"] = 0.6 + 4.6 * spread * (0.3 + 0.7 * skill) + rng.gauss(0, 0.04)
    out[f"{prefix}/coverage"] = 0.55 * spread + rng.gauss(0, 0.008)
    out[f"{prefix}/answer_entropy"] = 0.9 * spread + rng.gauss(0, 0.01)
    out[f"{prefix}/response_length"] = 9 + rng.gauss(0, 0.1)
    out[f"{prefix}/solution_length"] = 8.4 + rng.gauss(0, 0.1)
    return out


def reinforcement_rows(
    steps: int, seed: int, *, collapse: float = 2.0, every: int = 10, pass_at: Sequence[int] = PASS_AT
) -> list[Row]:
    rng = random.Random(seed)
    rows: list[Row] = []
    elapsed = tokens = 0.0
    for step in range(steps + 1):
        t = step / max(steps, 1)
        skill = 0.17 + 0.55 * (1 - math.exp(-3.2 * t))
        spread = math.exp(-collapse * t)
        row: Row = {"step": step, "samples": step * 256}
        if step:
            right = min(1.0, max(0.0, skill + rng.gauss(0, 0.03)))
            entropy = 0.75 * math.exp(-1.6 * t) + 0.08 + rng.gauss(0, 0.015)
            length = 9.3 - 0.6 * t + rng.gauss(0, 0.15)
            seconds = {"rollout": rng.uniform(0.33, 0.4), "reward": 0.05, "train": rng.uniform(0.5, 0.65), "sync": 0.02}
            tokens += 256 * length * 0.8
            kept = int(32 * (1 - right**2) * 0.9)
            row |= {
                "reward/mean": right,
                "reward/std": math.sqrt(right * (1 - right)),
                "rollout/pass_rate": right,
                "rollout/pass_any": min(1.0, right + 0.3),
                "rollout/distinct": 0.4 + 2.2 * spread * right * 2,
                "rollout/groups_kept": kept,
                "rollout/groups_filtered": 32 - kept,
                "rollout/response_length": length,
                "rollout/truncated": max(0.0, 0.04 * (1 - t) + rng.gauss(0, 0.004)),
                "policy/loss": rng.gauss(0, 0.01) - 0.01,
                "policy/clip_fraction": abs(rng.gauss(0.02, 0.008)),
                "policy/approx_kl": abs(rng.gauss(0.0015, 0.0006)),
                "policy/entropy": entropy,
                "policy/ratio_max": 1.3 + abs(rng.gauss(0, 0.5)),
                "policy/logprob_mismatch": 10 ** rng.gauss(-6.1, 0.12),
                "optimizer/grad_norm": 0.3 + abs(rng.gauss(0, 0.15)),
                "optimizer/lr": 1e-4,
                "optimizer/steps": step,
                "optimizer/skipped": 0,
                "moe/load_balancing_loss": 1.01 + 0.05 * t + rng.gauss(0, 0.003),
                "actor/version": step - 1,
                "actor/age": 1,
                "actor/refreshes": step,
                **{f"time/{phase}_s": value for phase, value in seconds.items()},
                "time/step_s": sum(seconds.values()) + 0.01,
                "time/tokens_per_s": 256 * length * 0.8 / seconds["train"],
                "time/rollout_tokens_per_s": 256 * length / seconds["rollout"],
            }
            elapsed += row["time/step_s"]
        if step % every == 0 or step == steps:
            row |= evaluation(rng, "eval", skill, spread, pass_at)
            row["time/eval_s"] = 2.4
            elapsed += 2.4
        if step == steps:
            row |= evaluation(rng, "test", skill - 0.01, spread, pass_at)
        rows.append(row | {"tokens": int(tokens), "time/elapsed_s": elapsed})
    return rows


def supervised_rows(steps: int, seed: int, *, every: int = 100, pass_at: Sequence[int] = PASS_AT) -> list[Row]:
    rng = random.Random(seed)
    rows: list[Row] = []
    elapsed = 0.0
    for step in range(steps + 1):
        t = step / max(steps, 1)
        row: Row = {"step": step, "samples": step * 64, "tokens": step * 3900}
        if step:
            row |= {
                "supervised/loss": 0.62 + 2.6 * math.exp(-9 * t) + rng.gauss(0, 0.02),
                "optimizer/grad_norm": 0.2 + 1.5 * math.exp(-12 * t) + abs(rng.gauss(0, 0.05)),
                "optimizer/lr": 1e-3 * min(1.0, step / 50) * (0.55 + 0.45 * math.cos(math.pi * t)),
                "optimizer/steps": step,
                "optimizer/skipped": 0,
                "moe/load_balancing_loss": 1.02 + rng.gauss(0, 0.004),
                "time/step_s": 0.16,
                "time/train_s": 0.155,
                "time/tokens_per_s": 25000 + rng.gauss(0, 400),
            }
            elapsed += 0.16
        if step % every == 0 or step == steps:
            row |= evaluation(rng, "eval", 0.001 + 0.17 * (1 - math.exp(-3 * t)), 1.0, pass_at)
            row["time/eval_s"] = 2.2
            elapsed += 2.2
        rows.append(row | {"time/elapsed_s": elapsed})
    return rows


def write_run(
    folder: Path,
    rows: Sequence[Row],
    algorithm: Algorithm = Algorithm.grpo,
    *,
    pass_at: Sequence[int] = PASS_AT,
    steps: int | None = None,
    name: str | None = None,
    change: Callable[[Row], Row] = lambda row: row,
) -> Path:
    """A run folder with these rows and a stored configuration. `steps`: as configured, if not all were recorded."""
    with MetricsRecord(folder, schema_for(algorithm, pass_at)) as record:
        for row in rows:
            record.append(change(row))
    config = {
        "name": name or folder.name,
        "seed": 1234,
        "algorithm": {"name": algorithm.name, "steps": rows[-1]["step"] if steps is None else steps},
        "task": {"name": "countdown", "numbers": 3},
        "model": {
            "num_layers": 4,
            "hidden_size": 128,
            "num_moe_experts": 16,
            "moe_router_topk": 4,
            "precision": "fp32",
        },
        "parallel": {"tensor_parallel": 1, "pipeline_parallel": 1, "expert_parallel": 2, "expert_tensor_parallel": 1},
    }
    versions = {"python": "3.11.2", "megatron-vp2o": "0.1.0", "torch": "2.13.0", "transformer-engine": None}
    text = yaml.safe_dump({"versions": versions, "config": config}, sort_keys=False)
    (folder / "config.yaml").write_text(text, encoding="utf-8")
    return folder
