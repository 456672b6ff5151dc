"""How far the policy has moved from the actors': the log-probabilities of some of a step's own tokens, computed again.

The geometric trust region looks at prototypes and gates. Attention, norms, embeddings and the experts' other directions change
what the policy says as well, and the region does not see them. A forward pass over a small share of the step's rows does.

Shape legend: N sequences of this data-parallel rank, S positions, R data-parallel ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_vp2o.core.deferred import Deferred
from megatron_vp2o.parallel.groups import Groups, gather_rows, max_scalars, sum_scalars
from megatron_vp2o.rl.interfaces import Policy
from megatron_vp2o.rl.types import TrainBatch


class SampledDrift:
    """`rl.interfaces.PolicyDrift` by a forward pass over a share of the rows, chosen by their global numbers: the same in all
    layouts.

    Args:
        share: of an optimizer step's rows over all ranks; at least one row is taken.
        micro_batch_size: rows of one forward pass on one rank.
    """

    def __init__(self, policy: Policy, groups: Groups, *, share: float, micro_batch_size: int) -> None:
        self._policy, self._groups = policy, groups
        self._share, self._micro_batch_size = share, micro_batch_size
        self._sample: TrainBatch | None = None

    def observe(self, batch: TrainBatch) -> None:
        """See `PolicyDrift`. The batch needs the rows' global numbers and the actors' log-probabilities."""
        assert batch.row_N is not None and batch.behaviour_logprobs_NS is not None
        chosen_N = sampled_rows(batch.row_N, self._share, self._groups)
        self._sample = batch.rows(chosen_N.nonzero().squeeze(1))

    def measure(self) -> Deferred[float]:
        """See `PolicyDrift`."""
        assert self._sample is not None, "measure() before observe()"
        sample = self._sample
        return self._policy.start_scoring(sample, self._micro_batch_size).then(lambda found: self._mean(sample, found))

    def _mean(self, sample: TrainBatch, logprobs_NS: Tensor) -> float:
        """Over all ranks' response tokens. Collective."""
        assert sample.behaviour_logprobs_NS is not None
        change_NS = (logprobs_NS - sample.behaviour_logprobs_NS).double().abs()
        sums = {
            "change": float(change_NS[sample.loss_mask_NS].sum()),
            "tokens": float(sample.loss_mask_NS.sum()),
        }
        total = sum_scalars(sums, self._groups.dp)
        return total["change"] / max(total["tokens"], 1.0)


def sampled_rows(row_N: Tensor, share: float, groups: Groups) -> Tensor:
    """Which of this rank's rows are in the sample, bool [N]: every `1/share`-th of all ranks' rows in the order of their numbers.

    Rows of one group have numbers in a row, so that the sample reaches over as many groups as it can. Collective over
    data-parallel ranks; some may have no row, and some no row in the sample.

    Args:
        row_N: global numbers of this rank's rows, int64, all different over all ranks.
        share: in (0, 1].
    """
    most = int(max_scalars({"rows": float(len(row_N))}, groups.dp)["rows"])
    padded = torch.full((most,), -1, dtype=torch.int64)
    padded[: len(row_N)] = row_N
    if groups.dp_size > 1:  # alone, there is nothing to wait for
        padded = gather_rows(padded.to(groups.device, non_blocking=True), groups.dp).cpu()
    rows = padded
    rows = rows[rows >= 0].sort().values
    if not len(rows):
        return torch.zeros(len(row_N), dtype=torch.bool)
    stride = max(1, min(len(rows), round(1 / share)))
    # Not always the same place in a group: the first row of the sample follows from the rows that there are.
    first = int(rows.sum()) % stride
    return torch.isin(row_N.cpu(), rows[first::stride])
