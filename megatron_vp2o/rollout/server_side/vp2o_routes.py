"""Lets a vLLM server on CPUs say which experts its tokens went to: `--scheduler-cls vp2o_routes.RoutesScheduler --worker-cls
vp2o_routes.RoutesWorker --enable-prefix-caching`.

vLLM has `--enable-return-routed-experts` for that, which it refuses on CPUs: there it has only its older model runner, which does
not know the parts that capture routes, keep them beside the blocks of the prefix cache, and put them into answers. They do not
depend on the runner, though. So this scheduler has vLLM's own connector on its side, and this worker tells vLLM's own connector on
the other side what the runner computed. Chunks of prompts, cached prefixes, preempted requests and updates of weights are that
code's business, and an answer has `routed_experts` as with the flag.

It runs in the server's environment and imports nothing of megatron_vp2o. Written for vLLM 0.32.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
from vllm.distributed.aux_output_connector.connector import AuxOutputSchedulerConnector
from vllm.distributed.aux_output_connector.worker import AuxOutputWorkerConnector, PendingAuxOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.worker.cpu_worker import CPUWorker


class RoutesScheduler(Scheduler):
    """Tells workers which requests' routes to keep, and puts them into answers."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        if not self.cache_config.enable_prefix_caching:
            raise ValueError(
                "routes are kept beside the blocks of the prefix cache: start with --enable-prefix-caching"
            )
        self.aux_output_connector = AuxOutputSchedulerConnector()


class RoutesWorker(CPUWorker):
    """Captures the routes of every step."""

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        """Begin once model and cache are there."""
        super().initialize_from_config(kv_cache_config)
        self._routes = AuxOutputWorkerConnector(
            vllm_config=self.vllm_config, model=self.model_runner.get_model(), kv_cache_config=kv_cache_config
        )
        self._step: PendingAuxOutput | None = None

    def execute_model(self, scheduler_output: Any) -> Any:
        """One forward pass; the routers hand over what they choose meanwhile."""
        self._routes.begin_step(scheduler_output.aux_output_connector_metadata)
        output = super().execute_model(scheduler_output)
        if scheduler_output.total_num_scheduled_tokens:
            self._step = self._routes.prepare_output(self._batch(scheduler_output))
        return output

    def _batch(self, scheduler_output: Any) -> Any:
        """The requests of the step in the order of the forward pass: where each begins in it, and at which token of its own."""
        computed = {request.req_id: request.num_computed_tokens for request in scheduler_output.scheduled_new_reqs}
        cached = scheduler_output.scheduled_cached_reqs
        computed |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        names = list(self.model_runner.input_batch.req_ids)
        counts = [scheduler_output.num_scheduled_tokens[name] for name in names]
        return SimpleNamespace(
            req_ids=names,
            num_computed_tokens_np=np.array([computed[name] for name in names]),
            query_start_loc_np=np.cumsum([0, *counts]),
        )

    def sample_tokens(self, grammar_output: Any) -> Any:
        """Sampling after a forward pass, with the routes of the requests that got a token."""
        output = super().sample_tokens(grammar_output)
        step, self._step = self._step, None
        if step is not None:
            assert list(output.req_ids) == list(step.request_ids)
            sampled = np.array([len(tokens) for tokens in output.sampled_token_ids])
            step.enqueue_cpu_copy(sampled, np.zeros_like(sampled))
            output.aux_output_connector_output = step.process_output()
        return output
