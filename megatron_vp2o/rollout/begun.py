"""A batch that a pool was asked for, and what comes of it: samples of servers as rollouts.

Shape legend: N sequences, S padded sequence length, T positions of a sequence with a route, L MoE layers, K experts of a token.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future

import torch
from torch import Tensor

from megatron_vp2o.core.routes import packed_dtype, sentinel
from megatron_vp2o.rl.types import Rollouts, SamplingParams
from megatron_vp2o.rollout.answers import RoutesAsked, Sample


class Begun:
    """A batch under way in a pool's event loop.

    Args:
        pad_id: after a response.
        version: of the weights that generate it, or begin with it.
        several: whether later versions may go on with it.
        routes: that samples bring; None: they bring none.
    """

    future: Future[list[list[Sample]]]  # set by the pool

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        group_size: int,
        *,
        pad_id: int,
        version: int,
        several: bool = False,
        routes: RoutesAsked | None,
    ) -> None:
        self.prompts, self.sampling, self.group_size = prompts, sampling, group_size
        self.pad_id, self.version, self.several, self.routes = pad_id, version, several, routes
        self.started_at = self.ended_at = time.monotonic()  # its turn; over

    def result(self) -> Rollouts:
        """Wait for the samples; see `ServerPool.generate`. Where this thread is interrupted, so is the work."""
        try:
            groups = self.future.result()
        finally:
            self.future.cancel()  # does nothing to what is done
        return self._rollouts(groups)

    def _rollouts(self, groups: Sequence[Sequence[Sample]]) -> Rollouts:
        """The samples of each prompt, right-padded; sample g of prompt p is row p * group_size + g."""
        prompts = self.prompts
        width = max((len(prompt) for prompt in prompts), default=1) + self.sampling.max_new_tokens
        count = len(prompts) * self.group_size
        tokens_NS = torch.full((count, width), self.pad_id)
        logprobs_NS = torch.zeros(count, width)
        prompt_len_N, total_len_N = torch.zeros(count, dtype=torch.int64), torch.zeros(count, dtype=torch.int64)
        finished_N = torch.zeros(count, dtype=torch.bool)
        versions_NS = torch.full((count, width), -1) if self.several else None
        routes_NSLK = None if self.routes is None else _no_routes(count, width, self.routes)
        rows = ((p, sample) for p, group in enumerate(groups) for sample in group)
        for n, (p, sample) in enumerate(rows):
            start, end = len(prompts[p]), len(prompts[p]) + len(sample.tokens)
            tokens_NS[n, :end] = torch.tensor([*prompts[p], *sample.tokens])
            logprobs_NS[n, start:end] = torch.tensor(sample.logprobs)
            prompt_len_N[n], total_len_N[n], finished_N[n] = start, end, sample.finished
            if versions_NS is not None:
                begin = start
                for version, until in sample.versions:
                    versions_NS[n, begin : start + until] = version
                    begin = start + until
            if routes_NSLK is not None:
                routes_NSLK[n, : end - 1] = torch.from_numpy(sample.routes_TLK.astype("int16"))
        lengths = prompt_len_N, total_len_N
        return Rollouts(
            tokens_NS,
            *lengths,
            logprobs_NS,
            logprobs_NS,
            finished_N,
            self.version,
            routes_NSLK=routes_NSLK,
            versions_NS=versions_NS,
        )


def _no_routes(rows: int, width: int, routes: RoutesAsked) -> Tensor:
    """Room for the routes of all positions, packed, none of them there yet."""
    dtype = packed_dtype(routes.experts)
    return torch.full((rows, width, len(routes.layers), routes.topk), sentinel(dtype), dtype=dtype)
