"""What a vLLM server is asked over HTTP: tokens in and out, and vLLM's own protocol of weight updates.

    POST /inference/v1/generate        token ids in; ids, log-probabilities and the weight version of every token out
    POST /pause, /start_weight_update, /update_weights (once a part), /finish_weight_update, /resume, /update_weight_version
    GET  /health, /weight_info, /get_world_size

The server needs `--enable-scale-out`, VLLM_SERVER_DEV_MODE=1 and the extension of `server_side/` (`launch.vllm_command`).
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import httpx

from megatron_vp2o.rl.types import SamplingParams
from megatron_vp2o.rollout.answers import Asked, BadAnswer, Sample, prompt_log_probs, samples
from megatron_vp2o.rollout.protocol import Probe

GENERATE = "/inference/v1/generate"
UNPROVEN = "-unproven"
"""Ends the label of weights that were loaded and not yet compared with the trainer's: no sample of theirs counts."""


class Server:
    """One server, over a client that others may share."""

    def __init__(self, url: str, http: httpx.AsyncClient) -> None:
        self.url, self.http = url, http

    async def _post(self, path: str, body: Any = None, timeout: float | None = None) -> Any:
        given = httpx.USE_CLIENT_DEFAULT if timeout is None else timeout
        return _answer(await self.http.post(self.url + path, json=body, timeout=given), path)

    async def health(self, limit_s: float = 5.0) -> int:
        """Status of /health, which does not wait for what the engine is busy with: 200 where it lives, 503 where it is dead; 0
        without an answer in time, -1 where nobody listens."""
        try:
            return (await self.http.get(f"{self.url}/health", timeout=limit_s)).status_code
        except httpx.ConnectError:
            return -1
        except httpx.HTTPError:
            return 0

    async def healthy(self) -> bool:
        """Whether it answers and says that its engine lives."""
        return await self.health() == 200

    async def label(self) -> str:
        """Version label of the weights that the server holds. Raises httpx.HTTPError or BadAnswer."""
        said = _answer(await self.http.get(f"{self.url}/weight_info", timeout=5.0), "/weight_info")
        if not isinstance(said, dict) or not isinstance(said.get("weight_version"), str):
            raise BadAnswer(f"{said!r} from /weight_info")
        return str(said["weight_version"])

    async def workers(self) -> int:
        """How many processes of the server hold weights. Raises httpx.HTTPError or BadAnswer."""
        path = "/get_world_size"
        said = _answer(await self.http.get(self.url + path, timeout=5.0), path)
        if not isinstance(said, dict) or not isinstance(said.get("world_size"), int) or said["world_size"] < 1:
            raise BadAnswer(f"{said!r} from {path}")
        return int(said["world_size"])

    async def join(self, meeting: dict[str, Any], timeout: float) -> None:
        """Before its first update: what its side of the transfer needs to know. Raises httpx.HTTPError or BadAnswer."""
        await self._post("/init_weight_transfer_engine", {"init_info": meeting}, timeout)

    async def update(self, part: dict[str, Any], timeout: float) -> None:
        """One part of an update, or what all of it comes to. Raises httpx.HTTPError or BadAnswer."""
        await self._post("/update_weights", {"update_info": part}, timeout)

    async def generate(
        self,
        prompt: Sequence[int],
        sampling: SamplingParams,
        group_size: int,
        asked: Asked,
        settled: Callable[[], Awaitable[None]],
    ) -> list[Sample]:
        """All samples of one prompt, in one request, so that they share its prefix. Raises httpx.HTTPError or BadAnswer.

        `settled` waits until it is known whose tokens count.
        No seed is sent: on CPUs one can end vLLM's engine (gpu_model_runner.py, discarded tokens).
        """
        greedy = sampling.temperature == 0
        wanted = 1 if greedy else group_size
        settings = {
            "n": wanted,
            "max_tokens": asked.longest,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "logprobs": 0,
            "stop_token_ids": sorted(asked.ends),
            "ignore_eos": True,  # the run's ends and no others
            "detokenize": False,
        }
        body = {"token_ids": list(prompt), "sampling_params": settings}
        answer = await self._post(GENERATE, body)
        await settled()
        found = samples(answer, wanted, asked, len(prompt))
        return found * group_size if greedy else found

    async def score(self, tokens: Sequence[int]) -> list[float]:
        """Log-probabilities of all tokens but the first. Raises httpx.HTTPError or BadAnswer."""
        settings = {"max_tokens": 1, "temperature": 1.0, "prompt_logprobs": 0, "detokenize": False}
        answer = await self._post(GENERATE, {"token_ids": list(tokens), "sampling_params": settings})
        return prompt_log_probs(answer, tokens)

    async def load(
        self,
        send: Callable[[], Awaitable[None]],
        label: str,
        probe: Probe | None,
        timeout: float,
        *,
        keep: bool = False,
    ) -> str:
        """Give it a whole set of weights, and let samples count only after the probe agrees.

        Args:
            send: brings all parts to the server, and what they come to (`transfer.Transfer.send`).
            keep: requests in flight go on with the new weights, for which the server reads what they have so far again; else they
                are aborted.

        Returns:
            The label that tokens got from these weights before they were proven.

        Raises:
            httpx.HTTPError or BadAnswer: it does not hold them. It must get a whole set, or be restarted, before it is used; it
                is left paused, or with a label whose samples nobody takes.
        """
        # Without clear_cache requests would go on from keys and values of the old weights.
        await self._post("/pause?mode=keep&clear_cache=true" if keep else "/pause?mode=abort", timeout=timeout)
        await self._post("/start_weight_update", timeout=timeout)
        await send()
        unproven = (
            f"{label}-{uuid.uuid4().hex[:4]}{UNPROVEN}"  # of this try: an earlier one may have loaded something else
        )
        await self._post("/finish_weight_update", {"weight_version": unproven}, timeout)
        await self._post("/resume", timeout=timeout)
        if probe is not None:
            try:
                difference = probe.difference([await self.score(tokens) for tokens in probe.tokens])
            except (httpx.HTTPError, BadAnswer):
                await self._post("/pause?mode=abort", timeout=timeout)
                raise
            if not difference <= probe.tolerance:
                await self._post("/pause?mode=abort", timeout=timeout)
                raise BadAnswer(
                    f"after the update its log-probabilities differ from the trainer's by up to {difference:.3g} nats, more "
                    f"than {probe.tolerance:.3g}: it does not compute with these weights"
                )
        await self._post("/update_weight_version", {"new_version": label}, timeout)
        if (said := await self.label()) != label:
            raise BadAnswer(f"it says that it holds weights {said!r} after an update to {label!r}")
        return unproven


async def unusable(servers: Sequence[Server], prepare: Callable[[Server, float], Awaitable[None]]) -> list[str]:
    """What is wrong with servers that somebody else started; those that are sound are prepared for weights."""
    problems = []
    for server in servers:
        try:
            await server.label()
            await prepare(server, 30.0)
        except (httpx.HTTPError, BadAnswer) as error:
            problems.append(
                f"rollout.urls has {server.url}, which cannot be used ({str(error) or type(error).__name__}): start it as "
                "docs/rollouts.md says, or take it out"
            )
    return problems


async def all_healthy(servers: Sequence[Server]) -> list[bool]:
    """Whether each answers and says that its engine lives."""
    return list(await asyncio.gather(*(server.healthy() for server in servers)))


def _answer(response: httpx.Response, path: str) -> Any:
    """The JSON of an answer. Raises BadAnswer for a refusal, or what is no JSON."""
    if response.status_code != 200:
        raise BadAnswer(f"status {response.status_code} from {path}: {' '.join(response.text.split())[:300]}")
    if not response.content:
        return None
    try:
        return response.json()
    except ValueError as error:
        raise BadAnswer(f"no JSON from {path}: {response.text[:100]!r}") from error
