"""The embedded rollout engine: an actor with its own snapshot of the weights, decoding with a KV cache on the learner's ranks.

Context-parallel ranks, which have the same prompts, deal them to each other, since a decoded token cannot be split.

Shape legend: P prompts of this rank, N = P * group_size sequences, R sequences still in the batch, S padded
sequence length, V vocabulary, Z ids that end a response, L MoE layers of this pipeline stage, K experts of a token.

Prompts that form a group share one prefill; finished sequences leave the batch; random numbers belong to a sequence and a
position, so that neither the layout nor the batch order changes what is drawn.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vp2o.config.schema import TrainConfig
from megatron_vp2o.core.deferred import Deferred
from megatron_vp2o.core.routes import packed_dtype, sentinel
from megatron_vp2o.core.sampling import sample, uniform_N
from megatron_vp2o.errors import RolloutError, SyncError
from megatron_vp2o.megatron.actor.dealt import gather_rollouts
from megatron_vp2o.megatron.actor.decoding import Decoder, ModuleDecoder
from megatron_vp2o.megatron.actor.direct import DirectDecoder, supported
from megatron_vp2o.megatron.learner.micro_batches import token_budget
from megatron_vp2o.megatron.learner.policy import MegatronPolicy
from megatron_vp2o.megatron.learner.scoring import score_and_record, scores
from megatron_vp2o.megatron.model.build import build_model, named_weight_tensors, weight_tensors
from megatron_vp2o.megatron.model.experts import GroupedSequentialMLP
from megatron_vp2o.megatron.model.moe_layer import moe_layers
from megatron_vp2o.megatron.model.replay import ModelReplay
from megatron_vp2o.megatron.platform.compat import leave_inference_mode
from megatron_vp2o.parallel.checksum import weights_checksum
from megatron_vp2o.parallel.groups import any_rank, max_scalars
from megatron_vp2o.rl.interfaces import HandOver
from megatron_vp2o.rl.types import LoggedGates, Rollouts, SamplingParams, TrainBatch
from megatron_vp2o.rollout.protocol import Health, Probe, Receipt

COMPACT_BELOW = 0.75
"""Finished sequences are dropped from the batch once fewer than this fraction of it is still active."""


class MegatronEngine:
    """Implements `rl.interfaces.RolloutEngine` and `rollout.protocol.Engine` in the learner's processes.

    The actor has the learner's layout, so a refresh is a local copy of each rank's shard.
    """

    def __init__(self, config: TrainConfig, policy: MegatronPolicy, *, eos_ids: Collection[int], pad_id: int) -> None:
        self.policy, self.groups = policy, policy.groups
        self.pad_id = pad_id
        self.eos_ids_Z = torch.tensor(sorted(eos_ids), dtype=torch.int64, device=self.groups.device)
        self.max_batch_size = config.rollout.max_batch_size
        self.micro_batch_size = config.algorithm.micro_batch_size
        self.token_budget = token_budget(config)
        self.actor = build_model(
            config.model,
            config.parallel,
            policy.groups,
            vocab_size=policy.padded_vocab,
            seed=config.seed,
            inference=True,
        )
        self.version = -1
        self._unusable = ""  # why the weights cannot be used, after an update that failed
        self._closed = False
        self._borrowed = False  # whether the tensors are the learner's for now
        # Ranks whose sequences meet in an expert must decode in lockstep: experts on several ranks (EP), or their parts (ETP).
        shared = self.groups.ep.size() > 1 or self.groups.etp.size() > self.groups.tp.size()
        self._lockstep = shared and self.groups.dp_size * self.groups.cp.size() > 1
        # Those that decode other prompts; tensor-parallel ranks in between say what their neighbours do.
        self._peers = self.groups.dp if self.groups.cp.size() == 1 else self.groups.stage
        self._group_size = 1  # of the call to `generate` under way
        self._layers = moe_layers(self.actor)
        self.direct = supported(self.actor, self.groups)
        """Decode straight from the weights, not through modules."""
        self._logged_contexts = 0
        self._records_routes = False
        self._take: HandOver | None = None
        # Asking the accelerator whether all sequences are done stalls its queue; the CPU has none.
        self._ask_every = 1 if self.groups.device.type == "cpu" else 8

    def log_gates(self, contexts: int) -> None:
        """From now on rollouts carry the actor's gates, at up to about this many contexts of this rank."""
        self._logged_contexts = contexts

    def record_routes(self) -> None:
        """From now on rollouts carry the experts of every token that the actor routed."""
        self._records_routes = True

    @cached_property
    def _replay(self) -> ModelReplay:
        """Records and replays the actor's routes. Made when it is first needed: without it nothing of the actor is changed."""
        return ModelReplay(self._layers)

    def refresh(self, version: int) -> None:
        """Take the learner's weights as they are now. A local copy: no communication, no second set of weights in flight."""
        self.policy.gather_parameters()
        self._take_weights(named_weight_tensors(self.policy.model), version, None)

    @torch.no_grad()
    def update_weights(
        self, weights: Iterable[tuple[str, Tensor]], version: int, probe: Probe | None = None
    ) -> Receipt:
        """See `rollout.protocol.Engine.update_weights`. Names and shapes are those of this rank's part of the model, as
        `named_weight_tensors` has them. Collective over the ranks that share the model if there is a probe."""
        taken, size = self._take_weights(weights, version, probe)
        return Receipt(version, taken, size, self.checksum().read())

    @torch.no_grad()
    def _take_weights(
        self, weights: Iterable[tuple[str, Tensor]], version: int, probe: Probe | None
    ) -> tuple[int, int]:
        """`update_weights` without its receipt: how many tensors and how many bytes were taken."""
        self.version = -1
        self._unusable = f"its update to version {version} was not completed"
        left = dict(named_weight_tensors(self.actor))
        taken = size = 0
        problems: list[str] = []
        for name, tensor in weights:
            mine = left.pop(name, None)
            if mine is None or mine.shape != tensor.shape:
                of = "unknown, or there twice" if mine is None else f"not {list(mine.shape)}"
                problems.append(f"{name} {list(tensor.shape)} is {of}")
                continue
            mine.copy_(tensor)
            taken, size = taken + 1, size + tensor.numel() * tensor.element_size()
        problems += [f"{name} is missing" for name in left]
        if not problems and probe is not None and (wrong := self._contradicts(probe)):
            problems.append(wrong)
        if problems:
            more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
            self._unusable = f"its update to version {version} failed: {'; '.join(problems[:3])}{more}"
            raise SyncError(f"the embedded engine has no usable weights, because {self._unusable}; give it a whole set")
        self.version, self._unusable = version, ""
        return taken, size

    def _contradicts(self, probe: Probe) -> str:
        """What is wrong with the weights according to a probe; empty if nothing."""
        length_N = torch.tensor([len(row) for row in probe.tokens])
        tokens_NS = torch.full((len(length_N), int(length_N.max())), self.pad_id)
        for row, tokens in zip(tokens_NS, probe.tokens, strict=True):
            row[: len(tokens)] = torch.tensor(tokens)
        mask_NS = torch.arange(tokens_NS.shape[1]) < length_N[:, None]
        batch = TrainBatch(tokens_NS, length_N, mask_NS)
        logprob_NS = scores(self.actor, batch, self.micro_batch_size, self.groups, self.policy.valid_vocab, 1).read()
        leave_inference_mode()
        logprobs = [row[1:length].tolist() for row, length in zip(logprob_NS, length_N.tolist(), strict=True)]
        difference = probe.difference(logprobs)
        if difference <= probe.tolerance:
            return ""
        return f"log-probabilities of the probe differ by up to {difference:.3g}, more than {probe.tolerance:.3g}"

    def health(self) -> Health:
        """See `rollout.protocol.Engine.health`."""
        detail = "closed" if self._closed else self._unusable
        return Health(not detail and self.version >= 0, -1 if self._closed else self.version, detail)

    def close(self) -> None:
        """The engine lives in the learner's processes: it only refuses to generate from now on."""
        self._closed = True

    def checksum(self) -> Deferred[int]:
        """A number that tells the weights of this rank's actor; `MegatronPolicy.checksum` of the same weights is equal."""
        return weights_checksum(self._tensors())

    @contextmanager
    def at_learner_weights(self) -> Iterator[None]:
        """Generate with the learner's weights inside, without a copy of either; gates and routes are not kept there.

        The actor's tensors stand for the learner's meanwhile, and get their own values back after it.
        """
        self.policy.gather_parameters()
        contexts, self._logged_contexts = self._logged_contexts, 0
        records, self._records_routes = self._records_routes, False
        kept = [tensor.data for tensor in self._tensors()]
        experts, theirs = _grouped_experts(self.actor), _grouped_experts(self.policy.model)
        stacks = [module._stacked for module in experts]
        try:
            for mine, learned in zip(self._tensors(), weight_tensors(self.policy.model), strict=True):
                mine.data = learned.data
            for module, other in zip(experts, theirs, strict=True):
                module._stacked = other._stacked
            self._borrowed = True
            yield
        finally:
            leave_inference_mode()  # which generation that failed did not
            self._borrowed = False
            for mine, own in zip(self._tensors(), kept, strict=True):
                mine.data = own
            for module, stack in zip(experts, stacks, strict=True):
                module._stacked = stack
            self._logged_contexts, self._records_routes = contexts, records

    def _tensors(self) -> list[Tensor]:
        return weight_tensors(self.actor)

    @contextmanager
    def handing_over(self, take: HandOver) -> Iterator[None]:
        """See `rl.types.HandsOver`: a response is handed over when its sequence leaves the batch."""
        self._take = take
        try:
            yield
        finally:
            self._take = None

    def _hand_over(self, first: int, row_R: Tensor, tokens_NS: Tensor, prompt_len_N: Tensor, length_N: Tensor) -> None:
        """Responses of the rows `row_R` of a batch whose rows are those from `first` on."""
        if self._take is None or not len(row_R):
            return
        rows, starts, ends = (column.tolist() for column in (row_R, prompt_len_N[row_R], length_N[row_R]))
        texts = tokens_NS[row_R].tolist()
        size, context = self._group_size, self.groups.cp
        places = [divmod(first + row, size) for row in rows]
        self._take(
            [(prompt * context.size() + context.rank()) * size + member for prompt, member in places],
            [text[start:end] for text, start, end in zip(texts, starts, ends, strict=True)],
        )

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[Sequence[int]], uids: Sequence[int], sampling: SamplingParams, group_size: int = 1
    ) -> Rollouts:
        """See `rl.interfaces.RolloutEngine.generate`. Raises ValueError for an empty prompt."""
        if any(len(prompt) == 0 for prompt in prompts):
            raise ValueError("a prompt has 0 tokens; at least 1 is needed to predict from")
        if self._closed:
            raise RolloutError("the embedded engine is closed: make a new one")
        if self._unusable and not self._borrowed:
            raise SyncError(f"the embedded engine has no usable weights, because {self._unusable}")
        longest_here = max((len(p) for p in prompts), default=1)
        agreed = max_scalars({"longest": longest_here, "drawn": len(prompts) * group_size}, self.groups.dp)
        longest, drawn = int(agreed["longest"]), int(agreed["drawn"]) * sampling.max_new_tokens
        width = longest + sampling.max_new_tokens
        # The same on all ranks: packing may give a rank's rows to another one.
        stride = max(1, -(-drawn // self._logged_contexts)) if self._logged_contexts else 0
        self._group_size = group_size
        context = self.groups.cp
        mine = slice(context.rank(), None, context.size())
        rollouts = self._generate_own(prompts[mine], uids[mine], sampling, group_size, width, stride)
        return rollouts if context.size() == 1 else gather_rollouts(rollouts, len(prompts), group_size, self.groups)

    def _generate_own(
        self,
        prompts: Sequence[Sequence[int]],
        uids: Sequence[int],
        sampling: SamplingParams,
        group_size: int,
        width: int,
        stride: int,
    ) -> Rollouts:
        """`generate` for the prompts that this rank decodes."""
        batches = self._batches(len(prompts), group_size)
        if self._lockstep:
            most = int(max_scalars({"n": len(batches)}, self._peers)["n"])
            batches += [(slice(0, 0), range(1))] * (most - len(batches))
        parts: list[Any] = []
        logged: list[Any] = []
        for chosen, members in batches:
            firsts = [uid * group_size for uid in uids[chosen]]
            first = sum(len(part[0]) for part in parts)
            part, part_gates = self._generate_batch(prompts[chosen], firsts, sampling, members, width, stride, first)
            if prompts[chosen]:
                parts.append(part)
                logged.append(part_gates)
        leave_inference_mode()
        if not parts:
            empty = torch.zeros(0, dtype=torch.int64)
            none = torch.zeros(0, width)
            routes_NSLK = self._no_routes(0, width).cpu() if self._records_routes else None
            contexts = -(-sampling.max_new_tokens // stride) if stride else 0
            none_LMJE = torch.zeros(len(self._layers), 0, contexts, self.actor.config.num_moe_experts)
            gates = LoggedGates(none_LMJE.to(self.groups.device), empty, stride) if stride else None
            return Rollouts(none.long(), empty, empty, none, none, empty.bool(), self.version, gates, routes_NSLK)
        tokens_NS, prompt_len_N, length_N, logprobs_NS, model_logprobs_NS, finished_N, routes_NSLK = (
            torch.cat(part).cpu() for part in zip(*parts, strict=True)
        )
        gates = LoggedGates(torch.cat(logged, dim=1), torch.arange(len(length_N)), stride) if stride else None
        return Rollouts(
            tokens_NS,
            prompt_len_N,
            length_N,
            logprobs_NS,
            model_logprobs_NS,
            finished_N,
            self.version,
            gates,
            routes_NSLK if self._records_routes else None,
        )

    def _batches(self, prompts: int, group_size: int) -> list[tuple[slice, range]]:
        """Prompts that are decoded together, with the members of their groups: at most `max_batch_size` sequences each."""
        most = self.max_batch_size
        if group_size <= most:
            per_batch = most // group_size
            return [(slice(first, first + per_batch), range(group_size)) for first in range(0, prompts, per_batch)]
        return [
            (slice(prompt, prompt + 1), range(first, min(first + most, group_size)))
            for prompt in range(prompts)
            for first in range(0, group_size, most)
        ]

    def _generate_batch(
        self,
        prompts: Sequence[Sequence[int]],
        firsts: Sequence[int],
        sampling: SamplingParams,
        members: range,
        width: int,
        stride: int,
        first: int,
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """One batch from prefill to the last end-of-sequence. An empty one decodes a dummy, to keep step with other ranks.

        Args:
            firsts: identity of the first sequence of each prompt's group.
            members: which sequences of each group.
            first: row of its first sequence among those of the call.

        Returns the columns of `Rollouts`, and the gates at every `stride`-th context, [L, N, J, E] (empty for stride 0).
        """
        device = self.groups.device
        dummy = not prompts
        prompts, firsts = (prompts, firsts) if not dummy else ([[self.pad_id]], [0])
        length_P = torch.tensor([len(prompt) for prompt in prompts])
        prompt_PS = torch.full((len(prompts), width), self.pad_id)
        for row, prompt in zip(prompt_PS, prompts, strict=True):
            row[: len(prompt)] = torch.tensor(prompt)
        # Everything but each prompt's last token: that one is the first to be decoded from, at its own position.
        routes_PSLK = self._no_routes(len(prompts), width)
        prefill = self._widest(length_P) - 1
        decoder = self._decoder(len(prompts), prefill, width)
        if prefill > 0:
            moved_PS = prompt_PS[:, :prefill].to(device, non_blocking=True)
            decoder.prefill(moved_PS, length_P.to(device, non_blocking=True))
            if self._records_routes:
                routes_PSLK[:, :prefill] = decoder.routes().unflatten(0, (-1, prefill))
        expand_N = torch.arange(len(prompts)).repeat_interleave(len(members))
        decoder.begin(expand_N.to(device, non_blocking=True))

        tokens_NS, routes_NSLK = (
            prompt_PS[expand_N].to(device, non_blocking=True),
            routes_PSLK[expand_N.to(device, non_blocking=True)],
        )
        logprobs_NS = torch.zeros(tokens_NS.shape, device=device)
        model_logprobs_NS = torch.zeros_like(logprobs_NS) if 0 < sampling.top_p < 1 else logprobs_NS
        length_N = length_P[expand_N].to(device, non_blocking=True)
        prompt_len_N = length_N.clone()
        finished_N = torch.full((len(expand_N),), dummy, device=device)
        member_N = torch.tensor(members).repeat(len(prompts))
        uid_N = (torch.tensor(firsts)[expand_N] + member_N).to(device, non_blocking=True)

        experts = self.actor.config.num_moe_experts if stride else 0
        contexts = -(-sampling.max_new_tokens // stride) if stride else 0
        gates_LNJE = torch.zeros(len(self._layers), len(expand_N), contexts, experts, device=device)

        u_NS = uniform_N(sampling.seed, uid_N[:, None], torch.arange(sampling.max_new_tokens, device=device))
        row_R = torch.arange(len(expand_N), device=device)  # which sequence each batch row is
        for step in range(sampling.max_new_tokens):
            at_R = prompt_len_N[row_R] + step
            log = bool(stride) and step % stride == 0
            logits_RV = decoder.step(tokens_NS[row_R, at_R - 1], at_R - 1, step, log=log)
            if self._records_routes:
                routes_NSLK[row_R, at_R - 1] = decoder.routes()
            if log:
                for gates_NJE, seen_RE in zip(gates_LNJE, decoder.gates(), strict=True):
                    gates_NJE[row_R, step // stride] = seen_RE.float()
            token_R, logprob_R, model_logprob_R = self._sample(logits_RV, u_NS[row_R, step], sampling)
            live_R = ~finished_N[row_R]
            tokens_NS[row_R, at_R] = torch.where(live_R, token_R, self.pad_id)
            logprobs_NS[row_R, at_R] = torch.where(live_R, logprob_R, 0.0)
            if model_logprobs_NS is not logprobs_NS:
                model_logprobs_NS[row_R, at_R] = torch.where(live_R, model_logprob_R, 0.0)
            length_N[row_R] += live_R
            finished_N[row_R] |= live_R & (token_R[:, None] == self.eos_ids_Z).any(dim=1)
            if (step + 1) % self._ask_every == 0:
                keep_R = ~finished_N[row_R]
                live = int(keep_R.sum())
                if not (any_rank(live > 0, self._peers) if self._lockstep else live):
                    break
                if 0 < live < COMPACT_BELOW * len(row_R):
                    self._hand_over(first, row_R[~keep_R], tokens_NS, prompt_len_N, length_N)
                    kept_R = keep_R.nonzero().squeeze(1)
                    row_R = row_R[kept_R]
                    decoder.select(kept_R)
        if not dummy:
            self._hand_over(first, row_R, tokens_NS, prompt_len_N, length_N)
        # What stands at a last token or beyond comes of padding, or of how long its neighbours were.
        unrouted_NS = torch.arange(width, device=device) >= length_N[:, None] - 1
        routes_NSLK[unrouted_NS] = sentinel(routes_NSLK.dtype)
        columns = tokens_NS, prompt_len_N, length_N, logprobs_NS, model_logprobs_NS, finished_N, routes_NSLK
        return columns, gates_LNJE

    def _no_routes(self, rows: int, width: int) -> Tensor:
        """Room for the routes of all positions, [rows, width, L, K] packed, none of them there yet; empty if none are recorded."""
        config = self.actor.config
        layers, topk = (len(self._layers), config.moe_router_topk) if self._records_routes else (0, 0)
        dtype = packed_dtype(config.num_moe_experts)
        return torch.full((rows, width, layers, topk), sentinel(dtype), dtype=dtype, device=self.groups.device)

    def _decoder(self, rows: int, prefill: int, width: int) -> Decoder:
        """What computes the logits of a batch of so many prompts, longest `prefill` without their last tokens."""
        if self.direct:
            return DirectDecoder(self.actor, rows, prefill, width, needs_routes=self._records_routes)
        replay = self._replay if self._records_routes else None
        return ModuleDecoder(self.actor, self._layers, self.groups, rows, prefill, width, replay)

    def _widest(self, length_P: Tensor) -> int:
        """Longest prompt of the batches decoded in lockstep: all of them prefill, or none does."""
        widest = int(length_P.max())
        return int(max_scalars({"n": widest}, self._peers)["n"]) if self._lockstep else widest

    def _sample(self, logits_RV: Tensor | None, u_R: Tensor, sampling: SamplingParams) -> tuple[Tensor, Tensor, Tensor]:
        """Next tokens with their log-probabilities as sampled and without the nucleus, drawn on the last pipeline stage."""
        if logits_RV is not None:
            valid = self.policy.valid_vocab
            token_R, logprob_R = sample(
                logits_RV,
                u_R,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                valid_vocab=valid,
            )
            model_logprob_R = logprob_R
            if sampling.top_p < 1 and sampling.temperature > 0:
                logp_RV = (logits_RV[:, :valid].float() / sampling.temperature).log_softmax(dim=-1)
                model_logprob_R = logp_RV.gather(-1, token_R[:, None]).squeeze(1)
        else:
            token_R = torch.empty_like(u_R, dtype=torch.int64)
            logprob_R, model_logprob_R = torch.empty((2, *u_R.shape), device=u_R.device)
        if self.groups.pp.size() > 1:
            for values in (token_R, logprob_R, model_logprob_R):
                dist.broadcast(values, group=self.groups.pp, group_src=self.groups.pp.size() - 1)
        return token_R, logprob_R, model_logprob_R

    def log_probs(self, rollouts: Rollouts, temperature: float) -> Tensor:
        """Log-probabilities of the response tokens by a teacher-forced pass of the actor. [N, S]; 0 outside responses.

        It replays the routes of the rollouts, where they have some.
        """
        batch = _scored(rollouts, temperature)
        batch.routes_NSLK = rollouts.routes_NSLK
        replay = self._replay if batch.routes_NSLK is not None else None
        logprob_NS = scores(
            self.actor, batch, self.micro_batch_size, self.groups, self.policy.valid_vocab, 1, replay, self.token_budget
        ).read()
        leave_inference_mode()
        return logprob_NS * batch.loss_mask_NS

    def log_probs_and_routes(self, rollouts: Rollouts, temperature: float) -> tuple[Tensor, Tensor]:
        """See `rl.interfaces.RolloutEngine.log_probs_and_routes`."""
        batch = _scored(rollouts, temperature)
        logprob_NS, routes_NSLK = score_and_record(
            self.actor, batch, self.micro_batch_size, self.groups, self.policy.valid_vocab, self._replay
        )
        leave_inference_mode()
        return logprob_NS * batch.loss_mask_NS, routes_NSLK


def _scored(rollouts: Rollouts, temperature: float) -> TrainBatch:
    """What a teacher-forced pass takes of rollouts; the mask is that of their responses."""
    mask_NS = rollouts.response_mask_NS()
    return TrainBatch(rollouts.tokens_NS, rollouts.total_len_N, mask_NS, temperature=temperature)


def _grouped_experts(model: torch.nn.Module) -> list[GroupedSequentialMLP]:
    return [module for module in model.modules() if isinstance(module, GroupedSequentialMLP)]
