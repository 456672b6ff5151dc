"""The learner: a GPTModel under DistributedDataParallel with Megatron's optimizer and schedule."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor

from megatron_vp2o.config.parameters import length_multiple, padded_vocab
from megatron_vp2o.config.schema import LoadBalancing, Precision, PrefixSharing, TrainConfig
from megatron_vp2o.core.deferred import Deferred, known, merged
from megatron_vp2o.megatron.learner.clipping import clip_by, squared_norms, total_norm
from megatron_vp2o.megatron.learner.fused_adam import adamw_for
from megatron_vp2o.megatron.learner.micro_batches import MicroBatch, PackedBatches, micro_batches, token_budget
from megatron_vp2o.megatron.learner.scoring import run_schedule, scores
from megatron_vp2o.megatron.learner.step_state import StepState
from megatron_vp2o.megatron.model.build import DTYPES, build_model, weight_tensors
from megatron_vp2o.megatron.model.experts import GroupedSequentialMLP
from megatron_vp2o.megatron.model.moe_layer import moe_layers
from megatron_vp2o.megatron.model.orthogonality_weight import specialise
from megatron_vp2o.megatron.model.output_layer import OutputLayer
from megatron_vp2o.megatron.model.packed import PackedRows
from megatron_vp2o.megatron.model.replay import ModelReplay
from megatron_vp2o.megatron.model.router import LOAD_BALANCING, Z_LOSS, PackedTokens, StepTokens, router_losses
from megatron_vp2o.megatron.model.shared_prefix import SharedRows
from megatron_vp2o.megatron.model.token_share import TokenShare
from megatron_vp2o.parallel.checksum import weights_checksum
from megatron_vp2o.parallel.groups import Groups, any_rank, sum_scalars
from megatron_vp2o.rl.interfaces import Objective
from megatron_vp2o.rl.types import StepStats, TrainBatch
from megatron_vp2o.tracking.schema import Aggregate, aggregate_of


class MicroBatchWatcher(Protocol):
    """Is told of the micro-batches of each training step. Everything it gets is on the CPU: what it works out, it can work out
    without waiting for the device."""

    def begin_step(self, micro_batches: int) -> None: ...

    def before_forward(self, part: TrainBatch, packed: PackedRows | None) -> None:
        """`part` is about to go through the model, its rows padded or packed."""
        ...


class MegatronPolicy:
    """Implements `rl.interfaces.Policy`.

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
        self.padded_vocab = padded_vocab(self.model_vocab, config.parallel.tensor_parallel)
        self.model: GPTModel = build_model(
            config.model, config.parallel, groups, vocab_size=self.padded_vocab, seed=config.seed
        )
        self.share = TokenShare.of(self.model.config, groups)
        """Which of a micro-batch's tokens this rank's layers see."""
        self.length_multiple = length_multiple(config.parallel.tensor_parallel, config.parallel.context_parallel)
        self.token_budget = token_budget(config)
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
        adam = OptimizerConfig(
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
        )
        with adamw_for(config.model.implementation):
            self.optimizer = get_megatron_optimizer(adam, [self.ddp])
        self.clip_grad, self.peak_lr = settings.clip_grad, settings.lr
        self._squares: Tensor | None = None  # from `gradient_norm`, for `take_step`
        self._layers = moe_layers(self.ddp)
        self._replay: ModelReplay | None = None
        losses = config.algorithm.specialization
        self.orthogonality = specialise(self._layers, losses, groups) if losses.enabled else None
        """The weight of the orthogonality loss, where the layers attach specialisation losses."""
        aux_loss = (
            config.model.moe_aux_loss_coeff > 0
            and config.model.moe_router_load_balancing_type is not LoadBalancing.none
        )
        on = {LOAD_BALANCING: aux_loss, Z_LOSS: config.model.moe_z_loss_coeff > 0}
        self._router_losses = [name for name, present in on.items() if present]
        self._balances_rows = aux_loss and config.model.moe_router_load_balancing_type is LoadBalancing.seq_aux_loss
        self.watcher: MicroBatchWatcher | None = None
        """Sees every micro-batch of training before its forward pass."""
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
        """`accumulate_gradients`, waited for."""
        return self.accumulate_gradients(batch, objective, micro_batch_size).read()

    def accumulate_gradients(
        self, batch: TrainBatch, objective: Objective, micro_batch_size: int
    ) -> Deferred[dict[str, float]]:
        """Gradients of the objective per loss token over all ranks, reduced and ready for the optimizer.

        Returns global metric means per loss token (maxima where `tracking.schema` says so), equal on all ranks, and `tokens`.
        """
        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        parts, sharing = self._micro_batches(batch, micro_batch_size)
        if self.orthogonality is not None or self._router_losses or sharing:
            self._begin_step(batch)

        def loss(logprob_NS: Tensor, entropy_NS: Tensor, part: TrainBatch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            total, metrics = objective(logprob_NS, entropy_NS, part)
            tokens = part.loss_mask_NS.sum()
            metrics = {"loss": total, **metrics, "tokens": tokens}
            # Megatron adds the tokens of all context-parallel ranks up, and each has whole rows here.
            counted = tokens.int() if self.groups.cp.rank() == 0 else torch.zeros_like(tokens.int())
            return total, counted, {key: value.detach() for key, value in metrics.items()}

        replay = self._replay_of(batch)
        if self.watcher is not None:
            self.watcher.begin_step(len(parts))
        if replay is not None:
            replay.begin_step()

        def before_forward(part: MicroBatch, on_device: TrainBatch, packed: PackedRows | None) -> None:
            self._tell_layers(packed)
            if replay is not None:
                replay.before_forward(on_device, packed)
            if self.watcher is not None:
                self.watcher.before_forward(part.batch, part.layout(torch.device("cpu")))

        try:
            reported = run_schedule(
                self.ddp,
                parts,
                self.groups,
                self.valid_vocab,
                loss,
                forward_only=False,
                before_forward=before_forward,
            )
        finally:
            self._tell_layers(None)
            if replay is not None:
                replay.stop()
        if self.orthogonality is not None:
            self.orthogonality.settle()
        losses = router_losses(
            [layer.router for layer in self._layers],
            self._router_losses,
            int(self.model.config.num_layers),
            self.groups,
        )
        metrics = merged(self._reduce(reported, losses), known(sharing))
        if replay is not None:
            layers = int(self.model.config.num_layers)
            metrics = merged(metrics, replay.metrics(layers, float(batch.length_N.sum()), self.groups))
        return metrics

    def _replay_of(self, batch: TrainBatch) -> ModelReplay | None:
        """What replays the batch's routes, made when a batch first has some; None where it has none."""
        if batch.routes_NSLK is None:
            return None
        if self._replay is None:
            self._replay = ModelReplay(self._layers, self.share)
        return self._replay

    def _micro_batches(self, batch: TrainBatch, micro_batch_size: int) -> tuple[list[MicroBatch], dict[str, float]]:
        """The micro-batches, and what was shared of the batch; nothing where nothing may be."""
        if self.token_budget is None:
            return micro_batches(batch, micro_batch_size, self.groups, self.length_multiple), {}
        dealt = self.share.context is not None
        packed = PackedBatches(batch, self.token_budget, self.groups, self.length_multiple, dealt=dealt)
        if self.token_budget.prefixes is PrefixSharing.off:
            return packed.parts, {}
        return packed.parts, {"packing/tokens_shared": 1 - packed.computed / max(packed.tokens, 1)}

    def _tell_layers(self, packed: PackedRows | None) -> None:
        """Tell the layers what the tokens of the coming micro-batch are, where a loss is taken row by row or a token stands for
        several rows."""
        tokens = None
        if packed is not None and (self._balances_rows or isinstance(packed, SharedRows)):
            (piece_T, stem_B), weight_T = packed.pieces(), packed.weights()
            weight_T = None if weight_T is None else self.share.own(weight_T, packed)
            tokens = PackedTokens(self.share.own(piece_T, packed), packed.rows, stem_B, weight_T)
        for layer in self._layers:
            layer.packed = tokens

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

    def _reduce(self, reported: list[dict[str, Tensor]], losses: dict[str, Tensor]) -> Deferred[dict[str, float]]:
        """Sums (maxima) over micro-batches and data-parallel ranks, in two collectives.

        Args:
            losses: what all ranks have the same, to be read along with it.
        """
        found: dict[str, Tensor] = {}
        maxima: set[str] = set()
        if self.groups.is_last_stage:
            maxima = {key for key in reported[0] if aggregate_of(f"policy/{key}") is Aggregate.maximum}
            for keys, op in ((reported[0].keys() - maxima, dist.ReduceOp.SUM), (maxima, dist.ReduceOp.MAX)):
                if not keys:
                    continue
                rows = torch.stack([torch.stack([part[key].double() for key in sorted(keys)]) for part in reported])
                values = rows.sum(dim=0) if op == dist.ReduceOp.SUM else rows.amax(dim=0)
                dist.all_reduce(values, op=op, group=self.groups.dp)
                found.update(zip(sorted(keys), values.unbind(), strict=True))
        together = [*found.values(), *losses.values()]

        def finish(on_host: list[Tensor]) -> dict[str, float]:
            numbers = on_host[0].tolist() if on_host else []
            result = dict(zip(found, numbers, strict=False))
            if result:
                tokens = max(result["tokens"], 1.0)
                result = {k: v if k == "tokens" or k in maxima else v / tokens for k, v in result.items()}
            if self.groups.pp.size() > 1:
                box = [result]
                dist.broadcast_object_list(box, group=self.groups.pp, group_src=self.groups.pp.size() - 1)
                result = box[0]
            return result | dict(zip(losses, numbers[len(found) :], strict=True))

        return Deferred((torch.stack(together),) if together else (), finish)

    @property
    def learning_rate(self) -> float:
        """Of the coming optimizer step."""
        return float(self.optimizer.param_groups[0]["lr"])

    @torch.no_grad()
    def gradient_norm(self) -> Deferred[float]:
        """Hand the gradients to the optimizer; returns their norm over all ranks. Collective."""
        found_inf = self.optimizer.prepare_grads()
        self._squares = squared_norms(self.optimizer, self.groups.device)
        if found_inf:
            return known(math.nan)
        return Deferred((self._squares,), lambda on_host: total_norm(on_host[0].tolist()))

    @torch.no_grad()
    def take_step(self) -> None:
        """Clip by the norm that `gradient_norm` found last, and step. Nothing is read: a caller that does not know yet whether
        the norm is a finite number must be able to take the step back."""
        assert self._squares is not None, "gradient_norm() comes first"
        if self.clip_grad > 0:
            for optimizer in self.optimizers():
                clip_by(self._squares, self.clip_grad, optimizer.get_parameters())
        self._squares = None
        self.optimizer.step_with_ready_grads()
        self.scheduler.step(increment=1)

    def optimizer_step(self, tokens: int) -> StepStats:
        """Clip and step. A step without tokens or with a non-finite gradient norm leaves parameters and optimizer state as
        they were (`skipped`).

        Args:
            tokens: loss tokens of all ranks, as `forward_backward` reported them.
        """
        lr = self.learning_rate
        stats = StepStats.of({"tokens": tokens}, self.gradient_norm().read(), lr=lr)
        if not stats.skipped:
            self.take_step()
        return replace(stats, metrics={})

    def save_state(self) -> StepState:
        """What the coming forward and backward passes change besides gradients, as it is now."""
        return StepState.of(self.model, self.orthogonality)

    def restore_state(self, saved: StepState) -> None:
        """Return to what `save_state` returned: the step did not happen."""
        saved.restore()

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
    def checksum(self) -> Deferred[int]:
        """Checksum of this rank's weights, for comparison with what an engine says it holds."""
        self.gather_parameters()
        return weights_checksum(weight_tensors(self.model))

    def log_probs(self, batch: TrainBatch, micro_batch_size: int) -> Tensor:
        """`start_scoring`, waited for."""
        return self.start_scoring(batch, micro_batch_size).read()

    def start_scoring(self, batch: TrainBatch, micro_batch_size: int) -> Deferred[Tensor]:
        """Log-probabilities under the present weights, without gradient. [N, S] float32 on the CPU.

        A batch's routes are replayed, as in training.
        """
        self.ddp.eval()
        replay = self._replay_of(batch)
        try:
            return scores(
                self.ddp,
                batch,
                micro_batch_size,
                self.groups,
                self.valid_vocab,
                self.length_multiple,
                replay,
                self.token_budget,
            )
        finally:
            self.ddp.train()
