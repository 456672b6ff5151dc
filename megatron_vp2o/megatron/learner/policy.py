"""The learner: a GPTModel under DistributedDataParallel with Megatron's optimizer and schedule."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor

from megatron_vp2o.config.schema import LoadBalancing, Precision, TrainConfig
from megatron_vp2o.megatron.learner.carried import Carried
from megatron_vp2o.megatron.learner.scoring import micro_batches, run_schedule, score
from megatron_vp2o.megatron.model.build import DTYPES, build_model, padded_vocab_size, weight_tensors
from megatron_vp2o.megatron.model.experts import GroupedSequentialMLP
from megatron_vp2o.megatron.model.moe_layer import Specialization, VP2OMoELayer, moe_layers
from megatron_vp2o.megatron.model.output_layer import OutputLayer
from megatron_vp2o.megatron.model.router import LOAD_BALANCING, Z_LOSS, StepTokens, router_losses
from megatron_vp2o.parallel.checksum import weights_checksum
from megatron_vp2o.parallel.groups import Groups, any_rank, sum_scalars
from megatron_vp2o.rl.types import GATE_ROW, Objective, StepStats, TrainBatch


class MegatronPolicy:
    """Implements `rl.types.Policy`.

    Args:
        config: the run.
        vocab_size: ids of the tokenizer (the model's vocabulary may be larger, and is padded).
        optimizer_steps: optimizer steps of the whole run, for the learning-rate schedule.
    """

    def __init__(self, config: TrainConfig, groups: Groups, *, vocab_size: int, optimizer_steps: int) -> None:
        self.groups = groups
        self.valid_vocab = vocab_size
        self.model_vocab = config.model.vocab_size or vocab_size
        """Ids that a checkpoint of the model speaks of; those beyond `valid_vocab` have probability zero."""
        self.padded_vocab = padded_vocab_size(self.model_vocab, config.parallel)
        self.model: GPTModel = build_model(
            config.model, config.parallel, groups, vocab_size=self.padded_vocab, seed=config.seed
        )
        self.length_multiple = config.parallel.tensor_parallel  # sequence parallelism cuts sequences in this many parts
        parallel, settings = config.parallel, config.optimizer
        self.ddp = DistributedDataParallel(
            self.model.config,
            DistributedDataParallelConfig(
                grad_reduce_in_fp32=True,
                overlap_grad_reduce=parallel.overlap_grad_reduce,
                overlap_param_gather=parallel.overlap_param_gather,
                use_distributed_optimizer=parallel.distributed_optimizer,
                check_for_nan_in_grad=False,  # a non-finite gradient skips the step (optimizer_step) instead of ending the run
            ),
            self.model,
        )
        self.ddp.broadcast_params()
        for module in self.model.modules():
            if isinstance(module, (GroupedSequentialMLP, OutputLayer)):
                module.add_to_main_grad = not parallel.overlap_grad_reduce
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=settings.lr,
                min_lr=settings.min_lr,
                weight_decay=settings.weight_decay,
                adam_beta1=settings.adam_beta1,
                adam_beta2=settings.adam_beta2,
                adam_eps=settings.adam_eps,
                clip_grad=settings.clip_grad,
                bf16=config.model.precision is Precision.bf16,
                params_dtype=DTYPES[config.model.precision],
                use_distributed_optimizer=parallel.distributed_optimizer,
                overlap_param_gather=parallel.overlap_param_gather,
            ),
            [self.ddp],
        )
        self.clip_grad, self.peak_lr = settings.clip_grad, settings.lr
        self._layers = moe_layers(self.ddp)
        self._specialised = self._specialise(config)
        aux_loss = (
            config.model.moe_aux_loss_coeff > 0
            and config.model.moe_router_load_balancing_type is not LoadBalancing.none
        )
        on = {LOAD_BALANCING: aux_loss, Z_LOSS: config.model.moe_z_loss_coeff > 0}
        self._router_losses = [name for name, present in on.items() if present]
        self._sampled: tuple[list[VP2OMoELayer], int] | None = None
        self._stride = 1
        self.scheduler = OptimizerParamScheduler(
            self.optimizer,
            init_lr=0.0,
            max_lr=settings.lr,
            min_lr=settings.min_lr,
            lr_warmup_steps=settings.lr_warmup_steps,
            lr_decay_steps=max(optimizer_steps, settings.lr_warmup_steps + 1),
            lr_decay_style=settings.lr_decay_style.value,
            start_wd=settings.weight_decay,
            end_wd=settings.weight_decay,
            wd_incr_steps=max(optimizer_steps, 1),
            wd_incr_style="constant",
        )
        self._wire_schedule(parallel.overlap_grad_reduce, parallel.overlap_param_gather)
        self._tokens = 0

    def _specialise(self, config: TrainConfig) -> bool:
        """Whether the layers attach specialisation losses."""
        settings = config.algorithm.specialization
        losses = Specialization(
            settings.orthogonality_coef,
            settings.orthogonality,
            settings.orthogonality_token_fraction,
            settings.variance_coef,
        )
        for layer in self._layers if losses else ():
            layer.specialise(losses)
        return bool(losses)

    def _wire_schedule(self, overlap_grads: bool, overlap_params: bool) -> None:
        """The callbacks through which Megatron's schedules reach the data-parallel wrapper and the optimizer."""
        model_config = self.model.config
        model_config.finalize_model_grads_func = finalize_model_grads
        model_config.grad_scale_func = self.optimizer.scale_loss
        model_config.no_sync_func = self.ddp.no_sync
        if overlap_grads:
            model_config.grad_sync_func = self.ddp.start_grad_sync
        if overlap_params:
            model_config.param_sync_func = self.ddp.start_param_sync

    def forward_backward(self, batch: TrainBatch, objective: Objective, micro_batch_size: int) -> dict[str, float]:
        """Gradients of the objective per loss token over all ranks, reduced and ready for the optimizer.

        Returns global metric means per loss token (maxima for keys ending in `_max`), equal on all ranks, and `tokens`.
        """
        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        if self._specialised or self._router_losses:
            self._begin_step(batch)
        parts = [part for part, _ in micro_batches(batch, micro_batch_size, self.groups, self.length_multiple)]

        def loss(logprob_NS: Tensor, entropy_NS: Tensor, part: TrainBatch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            total, metrics = objective(logprob_NS, entropy_NS, part)
            tokens = part.loss_mask_NS.sum()
            metrics = {"loss": total, **metrics, "tokens": tokens}
            return total, tokens.int(), {key: value.detach() for key, value in metrics.items()}

        before = None if self._sampled is None else self._context_sampler(len(parts))
        reported = run_schedule(
            self.ddp, parts, self.groups, self.valid_vocab, loss, forward_only=False, before_forward=before
        )
        metrics = self._reduce(reported)
        self._tokens = int(metrics["tokens"])
        metrics.update(
            router_losses(
                [layer.router for layer in self._layers],
                self._router_losses,
                int(self.model.config.num_layers),
                self.groups.world,
            )
        )
        return metrics

    def _begin_step(self, batch: TrainBatch) -> None:
        """Tell the layers of how many tokens the whole step is: their losses are means over them."""
        sums = sum_scalars(
            {
                "loss": float(batch.loss_mask_NS.sum()),
                "valid": float(batch.length_N.sum()),
                "sequences": float((batch.length_N > 0).sum()),
            },
            self.groups.dp,
        )
        for layer in self._layers:
            layer.begin_step(StepTokens(**sums))

    def sample_contexts(self, layers: list[VP2OMoELayer], per_rank: int) -> None:
        """From now on these layers keep the router's inputs at up to `per_rank` response tokens of each step."""
        self._sampled = layers, per_rank
        self.context_keys: list[Tensor] = []
        """Of the contexts of each micro-batch, [C, 2]: logged sequence, and how many response tokens precede; -1 where the
        batch does not say which sequence it is."""

    def logged_stride(self, stride: int) -> None:
        """Choose contexts among those that the actor logged: every `stride`-th of a response."""
        self._stride = stride

    def _context_sampler(self, micro_batches: int) -> Callable[[TrainBatch], None]:
        """Tells the layers, before each micro-batch, which positions to keep: evenly spread over those from which a response
        token is predicted."""
        assert self._sampled is not None
        layers, per_rank = self._sampled
        share = max(1, per_rank // micro_batches)
        tp = self.groups.tp if self.model.config.sequence_parallel else None
        for layer in layers:
            layer.drop_contexts()
        self.context_keys = []

        def choose(part: TrainBatch) -> None:
            context_NS = part.loss_mask_NS.roll(-1, dims=1)
            # how many response tokens came before the one that is predicted here
            before_NS = (
                torch.arange(context_NS.shape[1], device=context_NS.device) - context_NS.int().argmax(1)[:, None]
            )
            context_SN, before_SN = (context_NS & (before_NS % self._stride == 0)).t(), before_NS.t()
            if tp is not None:  # this rank has a contiguous share of the positions
                context_SN = context_SN.chunk(tp.size(), dim=0)[tp.rank()]
                before_SN = before_SN.chunk(tp.size(), dim=0)[tp.rank()]
            index_C = context_SN.flatten().nonzero().squeeze(1)
            kept_C = index_C[:: max(1, -(-len(index_C) // share))]
            rows_N = part.extras.get(GATE_ROW, torch.full_like(part.length_N, -1))
            self.context_keys.append(torch.stack([rows_N[kept_C % len(rows_N)], before_SN.flatten()[kept_C]], dim=1))
            for layer in layers:
                layer.context_index = kept_C

        return choose

    def _reduce(self, reported: list[dict[str, Tensor]]) -> dict[str, float]:
        """Sums (maxima) over micro-batches and data-parallel ranks, in two collectives and one host synchronisation."""
        result: dict[str, float] = {}
        if self.groups.is_last_stage:
            for suffix_max, op in ((False, dist.ReduceOp.SUM), (True, dist.ReduceOp.MAX)):
                keys = sorted(key for key in reported[0] if key.endswith("_max") is suffix_max)
                if not keys:
                    continue
                rows = torch.stack([torch.stack([part[key].double() for key in keys]) for part in reported])
                values = rows.amax(dim=0) if suffix_max else rows.sum(dim=0)
                dist.all_reduce(values, op=op, group=self.groups.dp)
                result.update(zip(keys, values.tolist(), strict=True))
            tokens = max(result["tokens"], 1.0)
            result = {k: v if k == "tokens" or k.endswith("_max") else v / tokens for k, v in result.items()}
        if self.groups.pp.size() > 1:
            box = [result]
            dist.broadcast_object_list(box, group=self.groups.pp, group_src=self.groups.pp.size() - 1)
            result = box[0]
        return result

    def optimizer_step(self) -> StepStats:
        """Clip and step. A non-finite gradient norm leaves parameters and optimizer state as they were (`skipped`)."""
        lr = float(self.optimizer.param_groups[0]["lr"])
        found_inf = self.optimizer.prepare_grads()
        grad_norm = float("nan") if found_inf else float(self.optimizer.get_grad_norm())
        skipped = self._tokens == 0 or not math.isfinite(grad_norm)
        if not skipped:
            for optimizer in self.optimizers():
                parameters = optimizer.get_parameters()
                if self.clip_grad > 0 and parameters:
                    clip_grad_by_total_norm_fp32(parameters, max_norm=self.clip_grad, total_norm=grad_norm)
            self.optimizer.step_with_ready_grads()
            self.scheduler.step(increment=1)
        return StepStats(metrics={}, grad_norm=grad_norm, lr=lr, skipped=skipped, tokens=self._tokens)

    def carry(self) -> Carried:
        """What the coming forward and backward passes change besides gradients, as it is now: for `put_back`."""
        return Carried.of(self.model)

    def put_back(self, carried: Carried) -> None:
        """Return to what `carry` said: the step did not happen."""
        carried.put_back()

    def optimizers(self) -> list[Any]:
        """Megatron's optimizers that have parameters on this rank."""
        chained = getattr(self.optimizer, "chained_optimizers", [self.optimizer])
        return [optimizer for optimizer in chained if not getattr(optimizer, "is_stub_optimizer", False)]

    def gather_parameters(self) -> None:
        """Before reading `model`: with overlap_param_gather, other ranks' updates arrive only in the next forward pass."""
        if self.ddp.ddp_config.overlap_param_gather:
            self.ddp.start_param_sync(force_sync=True)

    @torch.no_grad()
    def weights_finite(self) -> bool:
        """Whether every weight and buffer is a finite number, on all ranks. Collective."""
        self.gather_parameters()
        tensors = [*self.model.parameters(), *self.model.buffers()]
        finite = [tensor.isfinite().all() for tensor in tensors if tensor.is_floating_point()]
        return not any_rank(not bool(torch.stack(finite).all()), self.groups.world)

    @torch.no_grad()
    def checksum(self) -> int:
        """Of this rank's weights, for comparison with what an engine says it holds."""
        self.gather_parameters()
        return weights_checksum(weight_tensors(self.model))

    def log_probs(self, batch: TrainBatch, micro_batch_size: int) -> Tensor:
        """Log-probabilities under the present weights, without gradient. [N, S] float32 on the CPU."""
        self.ddp.eval()
        try:
            return score(self.ddp, batch, micro_batch_size, self.groups, self.valid_vocab, self.length_multiple)
        finally:
            self.ddp.train()
