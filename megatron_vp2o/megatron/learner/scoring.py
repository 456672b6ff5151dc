"""One forward pass of a batch through a (pipelined, tensor-parallel) model, in micro-batches: the part that training and
scoring share.

Under context parallelism the ranks of a group have the same rows, and the model sees this rank's positions of them.
Log-probabilities are gathered to whole rows again, so that losses and whoever asks for scores know nothing of it.

Shape legend: N sequences of this rank, S padded length of one micro-batch, B x L the whole of it for the model (N x S, or 1 x T
where rows are packed), l positions of this context-parallel rank, V this rank's part of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import scatter_to_sequence_parallel_region
from torch import Tensor

from megatron_vp2o.core.deferred import Deferred
from megatron_vp2o.core.routes import packed_dtype, sentinel
from megatron_vp2o.megatron.learner.micro_batches import MicroBatch, PackedBatches, TokenBudget, micro_batches
from megatron_vp2o.megatron.model.output_layer import output_layer_of, unwrapped
from megatron_vp2o.megatron.model.packed import PackedRows
from megatron_vp2o.megatron.model.replay import ModelReplay
from megatron_vp2o.megatron.model.shared_prefix import SharedRows
from megatron_vp2o.megatron.model.token_share import TokenShare
from megatron_vp2o.megatron.platform.compat import forget_loss_scales
from megatron_vp2o.parallel.groups import Groups
from megatron_vp2o.parallel.logprobs import log_probs_and_entropy
from megatron_vp2o.rl.types import TrainBatch


def _to(batch: TrainBatch, device: torch.device) -> TrainBatch:
    def move(value: Tensor, padding: float = 0.0) -> Tensor:
        return value.to(device, non_blocking=True)

    return batch.map(move, move)


def _attention_mask(segment_NS: Tensor) -> Tensor:
    """Causal within each segment. [N, 1, S, S], True where forbidden; padding may see itself, so that no row is empty."""
    same = segment_NS[:, :, None] == segment_NS[:, None, :]
    causal = torch.ones(same.shape[1:], dtype=torch.bool, device=same.device).tril_()
    return ~(same & causal)[:, None]


def _model_inputs(batch: TrainBatch, packed: PackedRows | None) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, positions, and which tokens are padding, each [B, L]."""
    if packed is not None:
        return packed.pack(batch.tokens_NS)[None], packed.position_T[None], packed.padding_T[None]
    position_S = torch.arange(batch.tokens_NS.shape[1], device=batch.tokens_NS.device)
    return batch.tokens_NS, position_S.expand_as(batch.tokens_NS), position_S >= batch.length_N[:, None]


def _of_rows(values_1T: Tensor, packed: PackedRows) -> Tensor:
    """[N, S]. A row's first token was not predicted: before it stands another row's last one."""
    return packed.unpack(torch.where(packed.position_T > 0, values_1T[0], 0.0))


def run_schedule(
    model: Any,
    parts: list[MicroBatch],
    groups: Groups,
    valid_vocab: int,
    loss: Callable[[Tensor, Tensor, TrainBatch], Any],
    *,
    forward_only: bool,
    before_forward: Callable[[MicroBatch, TrainBatch, PackedRows | None], None] | None = None,
) -> list[Any]:
    """Drive Megatron's pipeline schedule over micro-batches; `loss` sees [N, S] log-probabilities and entropies.

    `before_forward` is told of each micro-batch, with what the device has of it: its rows, and where packed tokens come from.

    Returns what `loss` reported per micro-batch on the last pipeline stage, an empty list on the others.
    """

    def forward_step(parts_left: Iterator[MicroBatch], model: Any) -> tuple[Tensor, Callable[..., Any]]:
        part = next(parts_left)
        batch, packed = _to(part.batch, groups.device), part.layout(groups.device)
        tokens_BL, position_BL, padding_BL = _model_inputs(batch, packed)
        targets_BL = tokens_BL.roll(-1, dims=1)  # what each position predicts; the last one's is not used
        if share.context is not None:
            tokens_BL, position_BL, padding_BL, targets_BL = (
                share.on_context_rank(values_BL, packed, dim=1)
                for values_BL in (tokens_BL, position_BL, padding_BL, targets_BL)
            )
        mask_B1LL = None if packed is not None or batch.segment_NS is None else _attention_mask(batch.segment_NS)
        if mask_B1LL is not None:
            mask_B1LL = share.on_context_rank(mask_B1LL, dim=2)
        if not groups.is_first_stage and unwrapped(model).config.sequence_parallel:
            # GPTModel scatters the padding mask on the first stage only (gpt_model.py, _preprocess).
            padding_BL = scatter_to_sequence_parallel_region(padding_BL.t().contiguous()).t().contiguous()
        if before_forward is not None:
            before_forward(part, batch, packed)
        before_L = packed.before_T if isinstance(packed, SharedRows) else None
        deferred = output_layer is not None and output_layer.defer_for(tokens_BL.numel(), always=before_L is not None)
        output = model(
            tokens_BL,
            position_BL,
            mask_B1LL,
            padding_mask=padding_BL,
            packed_seq_params=packed,
        )
        if output_layer is not None:
            output_layer.deferred = False  # who else calls the model wants logits

        def finish(output_BLX: Tensor, non_loss_data: bool = False) -> Any:
            # Position s speaks of the token AT s, which was predicted at s - 1. A shared prefix's last one predicts several.
            given_BLX, wanted_BL = output_BLX[:, :end], targets_BL[:, :end]
            if before_L is not None:
                given_BLX, wanted_BL = output_BLX.index_select(1, before_L), tokens_BL
            settings: dict[str, Any] = {
                "temperature": batch.temperature,
                "valid_vocab": valid_vocab,
                "group": groups.tp,
            }
            if deferred and output_layer is not None:  # hidden states
                found = output_layer.log_probs(given_BLX, wanted_BL, **settings)
            else:
                found = log_probs_and_entropy(given_BLX, wanted_BL, **settings)
            if share.context is not None:
                whole_L2B = share.whole(torch.stack(found).permute(2, 0, 1), packed)
                logprob_BL, entropy_BL = whole_L2B[:-1].permute(1, 2, 0)
                found = logprob_BL, entropy_BL
            missing = 1 if before_L is None else 0
            logprob_BL, entropy_BL = (torch.nn.functional.pad(value_BL, (missing, 0)) for value_BL in found)
            if packed is None:
                return loss(logprob_BL, entropy_BL, batch)
            return loss(_of_rows(logprob_BL, packed), _of_rows(entropy_BL, packed), batch)

        return output, finish

    share = TokenShare.of(unwrapped(model).config, groups)
    end = -1 if share.context is None else None  # of the positions of this rank that predict something
    output_layer = output_layer_of(model)
    forget_loss_scales()
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(parts),
        model=[model],
        num_microbatches=len(parts),
        seq_length=max(part.batch.tokens_NS.shape[1] for part in parts),
        micro_batch_size=max(len(part.batch.length_N) for part in parts),
        forward_only=forward_only,
        collect_non_loss_data=forward_only,
    )


def scores(
    model: Any,
    batch: TrainBatch,
    micro_batch_size: int,
    groups: Groups,
    valid_vocab: int,
    multiple: int,
    replay: ModelReplay | None = None,
    budget: TokenBudget | None = None,
) -> Deferred[Tensor]:
    """Teacher-forced log-probabilities, [N, S] float32 on the CPU: 0 at position 0 and beyond a row's length.

    Args:
        micro_batch_size: rows of a micro-batch where there is no `budget`.
        replay: of the model, where the batch has routes that are to be replayed.
        budget: pack rows, those of all data-parallel ranks dealt to them anew.
    """
    dealt = unwrapped(model).config.context_parallel_size > 1
    moved = None if budget is None else PackedBatches(batch, budget, groups, multiple, dealt=dealt)
    parts = micro_batches(batch, micro_batch_size, groups, multiple) if moved is None else moved.parts
    replayed = replay if batch.routes_NSLK is not None else None
    try:
        if moved is None:
            return _score_parts(model, batch, parts, groups, valid_vocab, replayed)
        return _score_parts(model, moved.batch, parts, groups, valid_vocab, replayed).then(moved.back)
    finally:
        if replayed is not None:
            replayed.stop()


def score_and_record(
    model: Any,
    batch: TrainBatch,
    micro_batch_size: int,
    groups: Groups,
    valid_vocab: int,
    replay: ModelReplay,
) -> tuple[Tensor, Tensor]:
    """`scores` of a model without sequence parallelism, and the routes that it took: packed, [N, S, L, K] on the CPU.

    The last token of a row predicts nothing and has no route, as in an engine's.
    """
    parts = micro_batches(batch, micro_batch_size, groups, 1)
    with replay.recording():
        logprob_NS = _score_parts(model, batch, parts, groups, valid_vocab, None).read()
    rows, width = batch.tokens_NS.shape
    dtype = packed_dtype(replay.experts)
    routes_NSLK = torch.full((rows, width, len(replay.layers), replay.topk), sentinel(dtype), dtype=dtype)
    for part in parts:
        (many, wide), index = part.batch.tokens_NS.shape, part.index_N
        routes_SNLK = replay.take().cpu().view(wide, many, len(replay.layers), replay.topk)
        most = min(wide, width)
        routes_NSLK[index, :most] = routes_SNLK[:most, : len(index)].transpose(0, 1)
    routed_NS = torch.arange(width) < batch.length_N[:, None] - 1
    return logprob_NS, torch.where(routed_NS[:, :, None, None], routes_NSLK, sentinel(dtype)).to(dtype)


@torch.no_grad()
def _score_parts(
    model: Any,
    batch: TrainBatch,
    parts: list[MicroBatch],
    groups: Groups,
    valid_vocab: int,
    replay: ModelReplay | None,
) -> Deferred[Tensor]:
    results = run_schedule(
        model,
        parts,
        groups,
        valid_vocab,
        lambda logprob, _, __: logprob,
        forward_only=True,
        before_forward=None if replay is None else lambda _, batch, packed: replay.before_forward(batch, packed),
    )
    out_NS = torch.zeros(batch.tokens_NS.shape, device=groups.device)
    for part, logprob in zip(parts, results, strict=False):  # no results but on the last pipeline stage
        row_N = part.index_N.to(groups.device, non_blocking=True)
        length_N = part.batch.length_N[: len(row_N)].to(groups.device, non_blocking=True)
        width = min(logprob.shape[1], out_NS.shape[1])
        inside_NS = torch.arange(width, device=groups.device) < length_N[:, None]
        out_NS[row_N, :width] = torch.where(inside_NS, logprob[: len(row_N), :width].float(), 0.0)
    if groups.pp.size() > 1:
        dist.broadcast(out_NS, group=groups.pp, group_src=groups.pp.size() - 1)
    return Deferred((out_NS,), lambda on_host: on_host[0])
