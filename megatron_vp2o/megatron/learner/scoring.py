"""One forward pass of a batch through a (pipelined, tensor-parallel) model, in micro-batches: the part that training and
scoring share.

Shape legend: N sequences of this rank, S padded length of one micro-batch, V this rank's part of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import scatter_to_sequence_parallel_region
from torch import Tensor

from megatron_vp2o.core.routes import packed_dtype, sentinel
from megatron_vp2o.megatron.model.output_layer import output_layer_of, unwrapped
from megatron_vp2o.megatron.model.replay import ModelReplay
from megatron_vp2o.megatron.platform.compat import forget_loss_scales
from megatron_vp2o.parallel.groups import Groups, max_scalars
from megatron_vp2o.parallel.logprobs import log_probs_and_entropy
from megatron_vp2o.rl.types import TrainBatch


def micro_batches(batch: TrainBatch, size: int, groups: Groups, multiple: int) -> list[tuple[TrainBatch, Tensor]]:
    """Cut a batch into micro-batches of similar lengths, each trimmed to its longest row, with the rows they hold.

    Every rank gets the same number (collectives must pair up); a rank that has too few rows adds dummy ones, all padding, so
    that they count nowhere.
    """
    rows = len(batch.length_N)
    count = max(1, int(max_scalars({"count": -(-rows // size)}, groups.dp)["count"]))
    order = torch.argsort(batch.length_N, descending=True, stable=True)
    parts = []
    for index in order.split(size) if rows else ():
        longest = int(batch.length_N[index].max())
        width = -(-longest // multiple) * multiple
        parts.append((_take(batch, index, width), index))
    while len(parts) < count:
        parts.append((_dummy(batch, multiple), order[:0]))
    return parts


def _fit(values_NS: Tensor, width: int, fill: float) -> Tensor:
    """Cut or padded to `width` positions; further dimensions stay."""
    missing = width - values_NS.shape[1]
    if missing <= 0:
        return values_NS[:, :width]
    padding = (0, 0) * (values_NS.dim() - 2) + (0, missing)
    return torch.nn.functional.pad(values_NS, padding, value=fill)


def _take(batch: TrainBatch, index: Tensor, width: int) -> TrainBatch:
    return batch.map(lambda value_N: value_N[index], lambda value_NS, padding: _fit(value_NS[index], width, padding))


def _dummy(batch: TrainBatch, width: int) -> TrainBatch:
    """One row of nothing but padding, of document 0 where there are documents: a row of no document would attend to nothing."""
    dummy = batch.map(
        lambda value_N: value_N.new_zeros(1),
        lambda value_NS, padding: value_NS.new_full((1, width, *value_NS.shape[2:]), padding),
    )
    return dummy if dummy.segment_NS is None else replace(dummy, segment_NS=torch.zeros_like(dummy.segment_NS))


def _to(batch: TrainBatch, device: torch.device) -> TrainBatch:
    def move(value: Tensor, padding: float = 0.0) -> Tensor:
        return value.to(device, non_blocking=True)

    return batch.map(move, move)


def _attention_mask(segment_NS: Tensor) -> Tensor:
    """Causal within each segment. [N, 1, S, S], True where forbidden; padding may see itself, so that no row is empty."""
    same = segment_NS[:, :, None] == segment_NS[:, None, :]
    causal = torch.ones(same.shape[1:], dtype=torch.bool, device=same.device).tril_()
    return ~(same & causal)[:, None]


def run_schedule(
    model: Any,
    parts: list[TrainBatch],
    groups: Groups,
    valid_vocab: int,
    loss: Callable[[Tensor, Tensor, TrainBatch], Any],
    *,
    forward_only: bool,
    before_forward: Callable[[TrainBatch], None] | None = None,
) -> list[Any]:
    """Drive Megatron's pipeline schedule over micro-batches; `loss` sees [N, S] log-probabilities and entropies.

    Returns what `loss` reported per micro-batch on the last pipeline stage, an empty list on the others.
    """

    def forward_step(parts_left: Iterator[TrainBatch], model: Any) -> tuple[Tensor, Callable[..., Any]]:
        batch = _to(next(parts_left), groups.device)
        width = batch.tokens_NS.shape[1]
        position_S = torch.arange(width, device=groups.device)
        padding_NS = position_S >= batch.length_N[:, None]
        if not groups.is_first_stage and unwrapped(model).config.sequence_parallel:
            # GPTModel scatters the padding mask on the first stage only (gpt_model.py, _preprocess).
            padding_NS = scatter_to_sequence_parallel_region(padding_NS.t().contiguous()).t().contiguous()
        if before_forward is not None:
            before_forward(batch)
        deferred = output_layer is not None and output_layer.defer_for(batch.tokens_NS.numel())
        output = model(
            batch.tokens_NS,
            position_S.expand_as(batch.tokens_NS),
            None if batch.segment_NS is None else _attention_mask(batch.segment_NS),
            padding_mask=padding_NS,
        )
        if output_layer is not None:
            output_layer.deferred = False  # who else calls the model wants logits

        def finish(output_NSX: Tensor, non_loss_data: bool = False) -> Any:
            targets_NS = batch.tokens_NS[:, 1:]
            settings: dict[str, Any] = {
                "temperature": batch.temperature,
                "valid_vocab": valid_vocab,
                "group": groups.tp,
            }
            if deferred and output_layer is not None:  # hidden states
                logprob, entropy = output_layer.log_probs(output_NSX[:, :-1], targets_NS, **settings)
            else:
                logprob, entropy = log_probs_and_entropy(output_NSX[:, :-1], targets_NS, **settings)
            # position s speaks of the token AT s, which was predicted at s - 1
            pad = torch.nn.functional.pad
            return loss(pad(logprob, (1, 0)), pad(entropy, (1, 0)), batch)

        return output, finish

    output_layer = output_layer_of(model)
    forget_loss_scales()
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(parts),
        model=[model],
        num_microbatches=len(parts),
        seq_length=max(part.tokens_NS.shape[1] for part in parts),
        micro_batch_size=max(len(part.length_N) for part in parts),
        forward_only=forward_only,
        collect_non_loss_data=forward_only,
    )


def score(
    model: Any,
    batch: TrainBatch,
    micro_batch_size: int,
    groups: Groups,
    valid_vocab: int,
    multiple: int,
    replay: ModelReplay | None = None,
) -> Tensor:
    """Teacher-forced log-probabilities, [N, S] float32 on the CPU: 0 at position 0 and beyond a row's length.

    Args:
        replay: of the model, where the batch has routes that are to be replayed.
    """
    parts = micro_batches(batch, micro_batch_size, groups, multiple)
    replayed = replay if batch.routes_NSLK is not None else None
    try:
        return _score_parts(model, batch, parts, groups, valid_vocab, replayed)
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
    """`score` of a model without sequence parallelism, and the routes that it took: packed, [N, S, L, K] on the CPU.

    The last token of a row predicts nothing and has no route, as in an engine's.
    """
    parts = micro_batches(batch, micro_batch_size, groups, 1)
    with replay.recording():
        logprob_NS = _score_parts(model, batch, parts, groups, valid_vocab, None)
    rows, width = batch.tokens_NS.shape
    dtype = packed_dtype(replay.experts)
    routes_NSLK = torch.full((rows, width, len(replay.layers), replay.topk), sentinel(dtype), dtype=dtype)
    for part, index in parts:
        many, wide = part.tokens_NS.shape
        routes_SNLK = replay.take().cpu().view(wide, many, len(replay.layers), replay.topk)
        most = min(wide, width)
        routes_NSLK[index, :most] = routes_SNLK[:most, : len(index)].transpose(0, 1)
    routed_NS = torch.arange(width) < batch.length_N[:, None] - 1
    return logprob_NS, torch.where(routed_NS[:, :, None, None], routes_NSLK, sentinel(dtype)).to(dtype)


@torch.no_grad()
def _score_parts(
    model: Any,
    batch: TrainBatch,
    parts: list[tuple[TrainBatch, Tensor]],
    groups: Groups,
    valid_vocab: int,
    replay: ModelReplay | None,
) -> Tensor:
    results = run_schedule(
        model,
        [part for part, _ in parts],
        groups,
        valid_vocab,
        lambda logprob, _, __: logprob,
        forward_only=True,
        before_forward=None if replay is None else replay.before_forward,
    )
    out_NS = torch.zeros(batch.tokens_NS.shape)
    for (part, rows), logprob in zip(parts, results, strict=False):
        width = min(logprob.shape[1], out_NS.shape[1])
        inside = torch.arange(width) < part.length_N[: len(rows), None]
        out_NS[rows, :width] = torch.where(inside, logprob[: len(rows), :width].float().cpu(), 0.0)
    if groups.pp.size() > 1:
        out_NS = out_NS.to(groups.device)
        dist.broadcast(out_NS, group=groups.pp, group_src=groups.pp.size() - 1)
    return out_NS.cpu()
