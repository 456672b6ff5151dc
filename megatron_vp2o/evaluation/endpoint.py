"""An OpenAI-compatible endpoint (vLLM and others) as a model: chat or plain completions over HTTP.

Whatever an endpoint does wrong ends the evaluation with one error, and nothing of that batch is counted. Connections that
fail and answers of status 429 and 5xx are tried again a few times first.
"""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from megatron_vp2o.errors import ConfigError, UserError
from megatron_vp2o.evaluation.model import Response, Sampling
from megatron_vp2o.evaluation.tokens import split

LONGEST_ANSWER = 64 << 20  # bytes


class EndpointError(UserError):
    """An endpoint that cannot be reached, or does not do what an OpenAI-compatible one does."""


@dataclass
class Endpoint:
    """See the module; implements `model.Model`."""

    label: str
    url: str
    """Up to and with `/v1`."""
    name: str
    """The model's name there."""
    step: int = 0
    chat: bool = True
    timeout_s: float = 600.0
    """Time limit of one answer, seconds."""
    tries: int = 3
    pause_s: float = 2.0
    """Between tries; doubles."""
    concurrency: int = 32
    count: Callable[[str], int] | None = None
    """Counts the tokens of a text, with the model's tokenizer; None: the parts of an answer are told apart by their share of
    its characters."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of each request."""
    own_numbers: bool = False

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or not self.name:
            raise ConfigError(
                f"endpoint {self.url}#{self.name}: it must be http://HOST:PORT/v1#MODEL, with the model's name there"
            )
        self.url = self.url.rstrip("/")

    @property
    def identity(self) -> dict[str, Any]:
        return {
            "kind": "endpoint",
            "model": self.name,
            "chat": self.chat,
            "options": dict(self.options),
            "tokens": "estimated" if self.count is None else "exact",
        }

    def check(self, prompts: Sequence[str], length: int) -> None:
        """Ask which models there are.

        Raises:
            EndpointError: it does not answer, or has not this one.
        """
        listed = self._call("/models", None)
        try:
            names = [entry["id"] for entry in listed["data"]]
        except (KeyError, TypeError) as error:
            raise EndpointError(f"{self.url}/models gave no list of models: {_shown(listed)}") from error
        if self.name not in names:
            raise EndpointError(f"{self.url} serves {', '.join(map(str, names)) or 'no model'}, not {self.name}")

    def generate(self, prompts: Sequence[str], uids: Sequence[int], sampling: Sampling) -> list[Response]:
        """Ask for all at once, `concurrency` at a time. No seed is sent: vLLM's CPU engine dies of some.

        Raises:
            EndpointError: one answer could not be had, or is no answer.
        """
        with ThreadPoolExecutor(max_workers=self.concurrency) as pool:
            asked = [pool.submit(self._answer, prompt, sampling) for prompt in prompts]
            try:
                return [one.result() for one in asked]
            except BaseException:
                for one in asked:
                    one.cancel()
                raise

    def _answer(self, prompt: str, sampling: Sampling) -> Response:
        body: dict[str, Any] = {
            **self.options,
            "model": self.name,
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "n": 1,
            "stream": False,
        }
        if self.chat:
            body["messages"] = [{"role": "user", "content": prompt}]
        else:
            body["prompt"] = prompt
        path = "/chat/completions" if self.chat else "/completions"
        return self._read(self._call(path, body), path, sampling)

    def _read(self, answer: Any, path: str, sampling: Sampling) -> Response:
        where = f"{self.url}{path}"
        try:
            (choice,) = answer["choices"]
            said = choice["message"] if self.chat else choice
            text = said["content"] if self.chat else said["text"]
            thought = (said.get("reasoning_content") or said.get("reasoning")) if self.chat else None
            reason, model, total = choice["finish_reason"], answer["model"], answer["usage"]["completion_tokens"]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise EndpointError(
                f"{where} gave no completion ({type(error).__name__}: {error}): {_shown(answer)}"
            ) from error
        text = "" if text is None and thought is not None else text
        if model != self.name:
            raise EndpointError(f"{where} answered with the model {model!r}, and {self.name!r} was asked for")
        if not isinstance(text, str) or not isinstance(thought, str | None) or reason not in ("stop", "length"):
            raise EndpointError(f"{where} gave no text that ended (finish_reason={reason!r}): {_shown(answer)}")
        if isinstance(total, bool) or not isinstance(total, int) or not 0 <= total <= sampling.max_new_tokens:
            raise EndpointError(
                f"{where} says that an answer of at most {sampling.max_new_tokens} tokens has {total!r:.40} tokens"
            )
        return self._response(text, thought, total, reason == "length")

    def _response(self, text: str, thought: str | None, total: int, truncated: bool) -> Response:
        if thought is not None:
            solution, before = text, thought
            text = f"<think>{thought}</think>{text}"
        else:
            parts = split(text)
            solution, before = parts.solution, text[: parts.start]
        if self.count is not None:
            of_solution = min(self.count(solution), total) if before else total
        else:
            of_solution = round(total * len(solution) / max(1, len(solution) + len(before)))
        return Response(text, solution, total - of_solution, of_solution, truncated)

    def _call(self, path: str, body: Mapping[str, Any] | None) -> Any:
        """The JSON that is answered. Raises EndpointError after the last try."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        pause, problem = self.pause_s, ""
        for attempt in range(self.tries):
            if attempt:
                time.sleep(pause)
                pause *= 2
            try:
                return self._once(request)
            except urllib.error.HTTPError as error:
                said = error.read(2000).decode(errors="replace")
                if error.code != 429 and error.code < 500:
                    raise EndpointError(f"{self.url}{path} answers with status {error.code}: {_shown(said)}") from error
                problem = f"status {error.code}: {_shown(said)}"
            except TimeoutError:
                problem = f"no answer within {self.timeout_s:g} s (--timeout)"
            except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
                slow = isinstance(getattr(error, "reason", None), TimeoutError)
                problem = f"no answer within {self.timeout_s:g} s (--timeout)" if slow else str(error)
        raise EndpointError(f"{self.url}{path} failed {self.tries} times, the last time with: {problem}")

    def _once(self, request: urllib.request.Request) -> Any:
        deadline = time.monotonic() + self.timeout_s
        with urllib.request.urlopen(request, timeout=self.timeout_s) as answer:
            content = bytearray()
            while piece := answer.read1(1 << 16):  # a byte now and then would keep a socket's own time-out from coming
                content += piece
                if time.monotonic() > deadline:
                    raise TimeoutError
                if len(content) > LONGEST_ANSWER:
                    raise EndpointError(f"{request.full_url} answered more than {LONGEST_ANSWER >> 20} MiB")
        try:
            return json.loads(content)
        except ValueError as error:
            raise EndpointError(
                f"{request.full_url} gave no JSON: {_shown(content.decode(errors='replace'))}"
            ) from error


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return repr(text[:200]) if text else "(nothing)"
