"""Random small recipes, killed at random moments and resumed: each must end as the run that nobody disturbed.

    python -m tests.resume_draws FOLDER SEED ...      # leaves out seeds that FOLDER/results.jsonl has already

A seed says everything but the exact moment of a kill, which is a time after an event (a step's line in the record, or a
checkpoint's folder), so that it falls into generation, training, evaluation, saving or start-up.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tests.resume_job import Run, run_all

SMALL = [
    "init_from=null",
    "model.num_layers=2",
    "model.hidden_size=16",
    "model.num_attention_heads=2",
    "model.num_query_groups=2",
    "model.kv_channels=8",
    "model.num_moe_experts=4",
    "model.moe_ffn_hidden_size=16",
    "task.train_size=40",
    "task.validation_size=4",
    "task.test_size=4",
    "evaluation.problems=4",
    "evaluation.samples=2",
    "evaluation.pass_at=[1]",
    "evaluation.final_split=false",
    "rollout.sampling.max_new_tokens=8",
    "logging.tensorboard=false",
    "threads=1",
]
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "single": (1, {}),
    "DP2": (2, {}),
    "EP2": (2, {"parallel.expert_parallel": 2}),
    "TP2": (2, {"parallel.tensor_parallel": 2}),
    "PP2": (2, {"parallel.pipeline_parallel": 2}),
}

CONTEXT: dict[str, dict[str, Any]] = {
    "CP2": {"parallel.context_parallel": 2},
    "CP2, EP2 inside": {"parallel.context_parallel": 2, "parallel.expert_parallel": 2},
}
"""What two data-parallel ranks may become."""


@dataclass
class Draw:
    """One recipe and the kills that its run has to stand."""

    seed: int
    layout: str
    ranks: int
    steps: int
    recipe: str
    settings: dict[str, Any]
    kills: list[dict[str, Any]] = field(default_factory=list)

    @property
    def arguments(self) -> list[str]:
        """Arguments of the command line."""
        values = {key: str(value).lower() if isinstance(value, bool) else value for key, value in self.settings.items()}
        return [f"--config-name={self.recipe}", *SMALL, *(f"{key}={value}" for key, value in values.items())]


class _Dice:
    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng((20261126, seed))

    def one_of(self, *choices: Any) -> Any:
        return choices[int(self.rng.integers(len(choices)))]

    def chance(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)

    def number(self, low: float, high: float) -> float:
        """Log-uniform, three digits."""
        return float(f"{np.exp(self.rng.uniform(np.log(low), np.log(high))):.3g}")


def draw(seed: int) -> Draw:
    """The recipe and kills of a seed."""
    dice = _Dice(seed)
    algorithm = dice.one_of("supervised", "grpo", "grpo", "vp2o", "vp2o", "vp2o", "vp2o")
    layout = dice.one_of(*LAYOUTS)
    ranks, parallel = LAYOUTS[layout]
    steps = int(dice.rng.integers(4, 7))
    settings = {
        "algorithm.steps": steps,
        "checkpoint.interval": dice.one_of(1, 2, 3),
        "checkpoint.keep": dice.one_of(1, 2, 9),
        "evaluation.interval": dice.one_of(0, 2, 3),
        **parallel,
        **_optimizer(dice),
        **_model(dice),
        **_stein(dice, enabled=dice.chance(0.8 if algorithm == "vp2o" else 0.3)),
    }
    if algorithm == "supervised":
        settings |= {"algorithm.global_batch_size": 8, "algorithm.micro_batch_size": dice.one_of(2, 4)}
        settings["algorithm.data.pack"] = dice.chance(0.5)
    else:
        settings |= _reinforcement(dice, algorithm)
        settings |= _packing(_Dice(seed + 10**6))  # apart, so that a seed's other draws are what they were
    later = _Dice(seed + 2 * 10**6)
    settings |= _kernels(later)
    if layout == "DP2":
        layout = later.one_of(layout, *CONTEXT)
        settings |= CONTEXT.get(layout, {})
        if layout in CONTEXT and settings.get("algorithm.prefix_sharing") == "on":  # refused
            settings["algorithm.prefix_sharing"] = "auto"
    settings["algorithm.specialization.orthogonality_scale"] = later.one_of("absolute", "relative")
    return Draw(seed, layout, ranks, steps, f"countdown_tiny_{algorithm}", settings, _kills(dice, ranks, steps))


def _optimizer(dice: _Dice) -> dict[str, Any]:
    settings = {
        "seed": int(dice.rng.integers(1000)),
        "optimizer.lr": dice.number(1e-3, 3e-2),
        "optimizer.lr_warmup_steps": dice.one_of(0, 1, 2),
        "optimizer.lr_decay_style": dice.one_of("cosine", "linear", "constant"),
        "optimizer.weight_decay": dice.one_of(0.0, 0.1),
        "optimizer.clip_grad": dice.one_of(0.0, 0.5, 1.0),
    }
    if dice.chance(0.4):
        settings["parallel.distributed_optimizer"] = True
        settings["parallel.overlap_grad_reduce"] = overlap = dice.chance(0.5)
        settings["parallel.overlap_param_gather"] = overlap and dice.chance(0.5)
    return settings


def _model(dice: _Dice) -> dict[str, Any]:
    sigmoid = dice.chance(0.3)
    topk = dice.one_of(1, 2, 2)
    balancing = dice.one_of("aux_loss", "seq_aux_loss", "none")
    return {
        "model.precision": "bf16" if dice.chance(0.2) else "fp32",
        "model.moe_router_score_function": "sigmoid" if sigmoid else "softmax",
        "model.moe_router_topk": topk,
        "model.moe_router_pre_softmax": not sigmoid and (topk == 1 or dice.chance(0.3)),
        "model.moe_router_enable_expert_bias": sigmoid and dice.chance(0.6),
        "model.moe_router_load_balancing_type": balancing,
        "model.moe_aux_loss_coeff": 0.0 if balancing == "none" else dice.one_of(0.0, 0.01),
        "model.moe_z_loss_coeff": dice.one_of(0.0, 0.001),
    }


def _stein(dice: _Dice, *, enabled: bool) -> dict[str, Any]:
    neighbours = dice.chance(0.6)
    return {
        "algorithm.stein.enabled": enabled,
        "algorithm.stein.monitor": dice.chance(0.3),
        "algorithm.stein.eta": dice.one_of(0.0, 0.01, 0.1),
        "algorithm.stein.attraction": dice.chance(0.8),
        "algorithm.stein.repulsion_scale": dice.one_of("absolute", "relative"),
        "algorithm.stein.kernel": dice.one_of("projective", "cosine"),
        "algorithm.stein.normalisation": dice.one_of("row", "svgd"),
        "algorithm.stein.neighbours": dice.one_of(1, 2) if neighbours else "null",
        "algorithm.stein.coactivation_threshold": "null" if neighbours else 0.1,
        "algorithm.stein.coactivation_ema": dice.one_of(0.0, 0.9),
        "algorithm.stein.power_iterations": dice.one_of(1, 2),
        "algorithm.stein.initial_power_iterations": dice.one_of(1, 16),
        "algorithm.stein.prototype_interval": dice.one_of(1, 1, 2, 3),
        "algorithm.specialization.orthogonality_coef": dice.one_of(0.0, 0.1),
        "algorithm.specialization.orthogonality_token_fraction": dice.one_of(1.0, 0.5),
        "algorithm.specialization.variance_coef": dice.one_of(0.0, 0.1),
    }


def _reinforcement(dice: _Dice, algorithm: str) -> dict[str, Any]:
    reference = dice.one_of("none", "initial", "anchor" if algorithm == "vp2o" else "initial")
    settings = {
        "algorithm.prompts_per_step": 4,
        "algorithm.group_size": 4,
        "algorithm.micro_batch_size": dice.one_of(4, 16),
        "algorithm.minibatches": dice.one_of(1, 2, 4),
        "algorithm.epochs": dice.one_of(1, 1, 2),
        "algorithm.filter_uniform_groups": dice.chance(0.5),
        "algorithm.normalise_by_std": dice.chance(0.5),
        "algorithm.kl_reference": reference,
        "algorithm.kl_coef": 0.0 if reference == "none" else 0.1,
        "algorithm.entropy_coef": dice.one_of(0.0, 0.05),
        "rollout.refresh_interval": dice.one_of(1, 2, 3),
        "rollout.sampling.temperature": dice.one_of(1.0, 0.7),
        "rollout.sampling.top_p": dice.one_of(1.0, 1.0, 0.9),
    }
    if reference == "none":
        settings["algorithm.kl_estimator"] = dice.one_of("k2", "k3")
    else:
        settings["algorithm.kl_estimator"] = dice.one_of("k2", "k3", *(["reward"] if reference == "initial" else []))
    settings["algorithm.answer_repulsion.form"] = dice.one_of("none", "none", "leave_one_out", "count")
    if algorithm == "vp2o":
        modes = [("enforce", "enforce"), ("enforce", "off"), ("off", "enforce"), ("monitor", "enforce")]
        region, budget = dice.one_of(*modes, ("monitor", "monitor"), ("off", "off"))
        bounded = "enforce" in (region, budget)
        settings |= {
            "algorithm.objective": dice.one_of("vp2o", "grpo") if bounded else "grpo",
            "algorithm.trust_region.mode": region,
            "algorithm.trust_region.delta": dice.number(1e-2, 0.5),
            "algorithm.trust_region.max_backtracks": dice.one_of(0, 1, 3),
            "algorithm.trust_region.max_consecutive_rejections": 1000,
            "algorithm.trust_region.snapshot_on_host": dice.chance(0.3),
            "algorithm.trust_region.contexts_per_rank": dice.one_of(8, 64),
            "algorithm.budget.mode": budget,
            "algorithm.budget.max_drift": dice.number(1e-4, 1.0),
            "algorithm.budget.min_ess": dice.one_of(0.1, 0.9),
            "algorithm.budget.ratio_length": dice.one_of("mean", "sum"),
            "algorithm.budget.max_age": dice.one_of("null", 2, 4),
        }
    return settings


def _packing(dice: _Dice) -> dict[str, Any]:
    tokens = dice.one_of("null", 40, 400)
    return {
        "algorithm.micro_batch_tokens": tokens,
        "algorithm.prefix_sharing": dice.one_of("on", "on", "off", "auto") if tokens != "null" else "auto",
    }


def _kernels(dice: _Dice) -> dict[str, Any]:
    return {
        "model.implementation": dice.one_of("auto", "torch", "torch"),
        "model.logits_chunk_mib": dice.one_of(256.0, 0.005, 0.02),  # 12 and 51 tokens of 104 ids
    }


def _kills(dice: _Dice, ranks: int, steps: int) -> list[dict[str, Any]]:
    """Kills in the order in which they are to happen."""
    kills = []
    for _ in range(dice.one_of(1, 1, 2)):
        after = int(dice.rng.integers(-1, steps))
        kill: dict[str, Any] = {"end": "SIGKILL", "rank": dice.one_of(None, *range(ranks))}
        if dice.chance(0.4):
            kill |= {"saving_step": -1, "delay": float(dice.rng.uniform(0.0, 0.05))}
        else:
            kill |= {"after_step": after, "delay": float(dice.rng.uniform(0.0, 0.4))}
        kills.append(kill)
    return kills


# --- running them -----------------------------------------------------------------------------------------------------


def runs_of(one: Draw, folder: Path) -> list[Run]:
    """The undisturbed run, and the same one killed and started again until nothing is left."""
    whole, killed = str(folder / "whole"), str(folder / "killed")
    common: dict[str, Any] = {"arguments": one.arguments, "ranks": one.ranks, "earn": True}
    return [
        Run(whole, **{**common, "arguments": [*one.arguments, "checkpoint.keep=99"]}),
        *(Run(killed, **common, **kill) for kill in one.kills),
        Run(killed, **common),
    ]


def problems(one: Draw, folder: Path, runs: list[Run]) -> list[str]:
    """What is wrong with the runs of a draw; empty where resuming changed nothing."""
    whole, killed = folder / "whole", folder / "killed"
    finished = [runs[0], runs[-1]]
    wrong = [f"{Path(run.run_dir).name} ended with {run.statuses}" for run in finished if any(run.statuses)]
    if wrong:
        return wrong
    expected, found = record(whole), record(killed)
    if [line["step"] for line in expected] != list(range(one.steps + 1)):
        wrong.append(f"steps {[line['step'] for line in expected]}")
    for a, b in zip(expected, found, strict=False):
        keys = [key for key in a.keys() | b.keys() if a.get(key) != b.get(key)]
        if keys:
            values = ", ".join(f"{key} {a.get(key)} {b.get(key)}" for key in sorted(keys)[:4])
            wrong.append(f"step {a['step']}: {len(keys)} metrics differ: {values}")
            break
    if len(expected) != len(found):
        wrong.append(f"{len(found)} lines of {len(expected)}")
    a, b = last_checkpoint(whole), last_checkpoint(killed)
    wrong += [f"the last checkpoint's {key} differs" for key in a.keys() | b.keys() if a.get(key) != b.get(key)]
    return wrong


def record(run_dir: Path) -> list[dict[str, Any]]:
    """The metrics by step, without times."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith("time/")} for line in lines]


def last_checkpoint(run_dir: Path) -> dict[str, Any]:
    """Checksums of weights, actor, optimizer and random numbers, and the trainer's state without its times."""
    name = (run_dir / "checkpoints" / "latest").read_text().strip()
    files = json.loads((run_dir / "checkpoints" / name / "manifest.json").read_text())["files"]
    state = json.loads((run_dir / "checkpoints" / name / "state.json").read_text())
    del state["elapsed_s"]
    tensors = {file: entry for file, entry in files.items() if file.endswith(".distcp") or file == "common.pt"}
    return {"name": name, "state": state, **tensors}


def movement(run_dir: Path) -> dict[str, Any]:
    """How much happened in a run: optimizer steps taken, rejected and skipped, refreshes of the actors, and the largest
    change of a weight between the first and the last checkpoint."""
    last = record(run_dir)[-1]
    keys = {"taken": "optimizer/steps", "skipped": "optimizer/skipped", "rejected": "trust_region/rejected"}
    counts = {name: int(last.get(key) or 0) for name, key in {**keys, "refreshes": "actor/refreshes"}.items()}
    shared = max(line.get("packing/tokens_shared") or 0.0 for line in record(run_dir))
    return {**counts, "shared": shared, "moved": _largest_change(run_dir)}


def _largest_change(run_dir: Path) -> float:
    """Largest change of an entry of the embedding, between the first and the last checkpoint."""
    from megatron_vp2o.hf.distributed_files import Region, StoredTensors

    folders = sorted((run_dir / "checkpoints").glob("step_*"))
    if len(folders) < 2:  # the run did not get so far, which `problems` reports
        return 0.0
    first, last = folders[0], folders[-1]
    tensors = []
    for path in (first, last):
        stored = StoredTensors(path)
        shape = stored.shapes["embedding.word_embeddings.weight"]
        tensors.append(stored.read(Region("embedding.word_embeddings.weight", (0,) * len(shape), shape)))
    return float((tensors[1].float() - tensors[0].float()).abs().max())


def try_seed(seed: int, folder: Path) -> dict[str, Any]:
    """Run one draw in `folder`, which is removed where nothing is wrong."""
    one = draw(seed)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    runs = runs_of(one, folder)
    run_all(runs, folder)
    wrong = problems(one, folder, runs)
    moved = movement(folder / "whole") if (folder / "whole" / "metrics.jsonl").exists() else {}
    killed = sum(any(run.statuses) for run in runs[1:-1])
    if not wrong:
        shutil.rmtree(folder)
    return {"seed": seed, "recipe": one.recipe, "layout": one.layout, "killed": killed, **moved, "wrong": wrong}


def main(folder: Path, seeds: list[int]) -> None:
    """Try seeds that the results do not have yet."""
    import megatron_vp2o.session  # noqa: F401 - everything heavy, once for all runs

    folder.mkdir(parents=True, exist_ok=True)
    results = folder / "results.jsonl"
    done = {json.loads(line)["seed"] for line in results.read_text().splitlines()} if results.exists() else set()
    for seed in seeds:
        if seed not in done:
            with results.open("a") as file:
                print(json.dumps(try_seed(seed, folder / f"seed-{seed}")), file=file)


if __name__ == "__main__":
    main(Path(sys.argv[1]), [int(seed) for seed in sys.argv[2:]])
