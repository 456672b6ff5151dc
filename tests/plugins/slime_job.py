"""In a checkout of slime: its own `train()` and policy loss with the plug-in in them, beside this project's trainer.

slime's data path packs sequences, which takes transformer-engine: here its `get_batch` is replaced, and a micro-batch is what
host_job.py makes. All else of a step (schedule, hook, loss function, optimizer, logging) is slime's code.
"""

from __future__ import annotations

import types
from typing import Any

from tests.plugins.pretrain_on_cpu import prepare

prepare()

import slime.backends.megatron_utils.loss as slime_loss  # noqa: E402
import slime.backends.megatron_utils.model as slime_model  # noqa: E402
import torch  # noqa: E402
from slime.observability import logging_utils  # noqa: E402
from slime.utils.misc import load_function  # noqa: E402
from torch import Tensor  # noqa: E402

from megatron_vp2o.config.schema import ParallelConfig  # noqa: E402
from megatron_vp2o.errors import ConfigError  # noqa: E402
from megatron_vp2o.megatron.learner.policy import MegatronPolicy  # noqa: E402
from megatron_vp2o.megatron.platform import world  # noqa: E402
from tests.plugins import host_job  # noqa: E402
from tests.plugins.host_job import PER_ROLLOUT, ROLLOUTS, STEPS, VOCAB, WIDTH  # noqa: E402

HOOK = "megatron_vp2o.plugins.slime.before_train_step"


def arguments(**given: Any) -> types.SimpleNamespace:
    return types.SimpleNamespace(
        **{
            "custom_megatron_before_train_step_hook_path": HOOK,
            "load": None,
            "data_pad_size_multiplier": 1,
            "allgather_cp": False,
            "save_debug_train_data": None,
            "enable_mtp_training": False,
            "seq_length": WIDTH,
            "micro_batch_size": 1,
            "decoder_seq_length": None,
            "ci_test": False,
            "ci_save_grad_norm": None,
            "ci_load_grad_norm": None,
            "calculate_per_token_loss": True,
            "loss_type": "custom_loss",
            "custom_loss_function_path": "tests.plugins.slime_job.next_token",
            "recompute_loss_function": False,
            "rollout_top_p": 1.0,
            "overlap_grad_reduce": False,
            "overlap_param_gather": False,
            "use_distributed_optimizer": False,
            "reset_optimizer_states": False,
            "manual_gc": False,
            **given,
        }
    )


class Rows:
    """What slime's train() asks of a data iterator, and where the replaced get_batch takes micro-batches from."""

    def __init__(self, policy: MegatronPolicy, first: int) -> None:
        self.policy, self.first = policy, first

    def reset(self) -> None:
        self.left = [
            tokens_NS
            for inner in range(PER_ROLLOUT)
            for tokens_NS in host_job.micro_batches(self.first + inner, self.policy)
        ]


def get_batch(rows: Any, keys: Any, *args: Any) -> dict[str, Any]:
    tokens_NS = rows.left.pop(0)
    count = len(tokens_NS)
    return {
        "tokens": tokens_NS,
        "packed_seq_params": None,
        "full_loss_masks": None,
        "multimodal_train_inputs": None,
        "loss_masks": [torch.ones(WIDTH - 1, dtype=torch.int)] * count,
        "total_lengths": [WIDTH] * count,
        "response_lengths": [WIDTH - 1] * count,
        "rollout_mask_sums": [torch.tensor(WIDTH - 1.0)] * count,
    }


def next_token(args: Any, batch: Any, logits_NSV: Tensor, sum_of_sample_mean: Any) -> Any:
    """The loss of host_job.py."""
    logprobs = logits_NSV[:, :-1, :VOCAB].float().log_softmax(-1)
    total = -logprobs.gather(2, batch["tokens"][:, 1:, None]).sum()
    return total, {"loss": total.detach()}


def rollouts(policy: MegatronPolicy, args: Any, last: int = ROLLOUTS) -> None:
    """slime's train(), once a rollout."""
    slime_model.get_args = lambda: args
    for rollout in range(last):
        slime_model.train(
            rollout,
            [policy.ddp],
            policy.optimizer,
            policy.scheduler,
            [Rows(policy, rollout * PER_ROLLOUT)],
            [2] * PER_ROLLOUT,
            [1] * PER_ROLLOUT,  # by this the scheduler advances
        )


def loop(layout: dict[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(1)
    torch.compiler.set_stance("force_eager")  # slime compiles its losses, which takes half a minute
    kept: list[dict[str, float]] = []
    logging_utils.log = lambda args, metrics, step_key: kept.append(dict(metrics))
    slime_model.get_batch = get_batch
    groups = world.start(ParallelConfig(**layout), 1)
    plain = host_job.fresh(layout, groups)
    start = host_job.weights(plain)
    rollouts(plain, arguments(custom_megatron_before_train_step_hook_path=None))
    off = host_job.fresh(layout, groups)
    rollouts(off, arguments(vp2o={"stein": {"enabled": False}}))
    on = host_job.fresh(layout, groups)
    kept.clear()
    rollouts(on, arguments(vp2o=host_job.ON))
    logged = list(kept)
    own, _ = host_job.own(layout, groups)
    found = {
        "moved": host_job.worst(start, host_job.weights(plain)),
        "off": host_job.worst(host_job.weights(off), host_job.weights(plain)),
        "transform moved": host_job.worst(host_job.weights(on), host_job.weights(plain)),
        "own": host_job.worst(host_job.weights(on), host_job.weights(own)),
        "steps": STEPS,
        "logged": [line["vp2o/step"] for line in logged if "vp2o/step" in line],
        "losses": [line["train/loss"] for line in logged if "train/loss" in line],
    }
    broken = host_job.fresh(layout, groups)
    for name, path in (("missing settings", HOOK), ("no such function", f"{HOOK}s")):
        try:
            rollouts(broken, arguments(custom_megatron_before_train_step_hook_path=path), last=1)
        except (ConfigError, AttributeError) as error:
            found[name] = f"{type(error).__name__}: {error}"
    found |= policy_loss()
    world.stop_model_parallel()
    world.stop()
    return found


def policy_loss() -> dict[str, float]:
    """The plug-in's policy loss, by slime's own loss_function, against a loop over tokens; and slime's, which clips."""
    generator = torch.Generator().manual_seed(5)
    lengths, prompts = [9, 6, 7], [3, 2, 4]
    rows = [torch.randint(VOCAB, (length,), generator=generator) for length in lengths]
    responses = [length - prompt for length, prompt in zip(lengths, prompts, strict=True)]
    logits_1TV = torch.randn(1, sum(lengths), VOCAB, generator=generator)
    old = [torch.randn(n, generator=generator) - 2.5 for n in responses]
    advantages = [torch.randn(n, generator=generator) for n in responses]
    batch = {
        "advantages": advantages,
        "log_probs": old,
        "unconcat_tokens": rows,
        "response_lengths": responses,
        "total_lengths": lengths,
        "loss_masks": [torch.ones(n, dtype=torch.int) for n in responses],
        "rollout_mask_sums": [torch.tensor(float(n)) for n in responses],
    }
    args = arguments(
        custom_loss_function_path="megatron_vp2o.plugins.slime.policy_loss",
        calculate_per_token_loss=False,
        advantage_estimator="grpo",
        eps_clip=0.2,
        eps_clip_high=0.2,
        eps_clip_c=None,
        entropy_coef=0.0,
        use_kl_loss=False,
        use_rollout_logprobs=False,
        use_opsm=False,
        get_mismatch_metrics=False,
        use_tis=False,
        log_probs_chunk_size=-1,
        rollout_temperature=1.0,
        qkv_format="thd",
        true_on_policy_mode=False,
    )
    total, start = 0.0, 0
    for row, prompt, old_S, advantage_S in zip(rows, prompts, old, advantages, strict=True):
        mean = 0.0
        for i, token in enumerate(row[prompt:].tolist()):
            new = logits_1TV[0, start + prompt + i - 1].log_softmax(-1)[token]
            mean -= float((new - old_S[i]).exp() * advantage_S[i]) / len(old_S)
        total, start = total + mean, start + len(row)
    ours = slime_loss.loss_function(args, dict(batch), 1, 3, logits_1TV.clone().requires_grad_(True))[0]
    args.loss_type = "policy_loss"
    clipped = slime_loss.loss_function(args, dict(batch), 1, 3, logits_1TV.clone().requires_grad_(True))[0]
    assert load_function(args.custom_loss_function_path).__name__ == "policy_loss"
    return {"loss": float(ours.detach()), "by hand": total / 3, "clipped": float(clipped.detach())}
