"""What a server answers, checked field by field before any of it counts.

A sample that is not exactly what was asked for is refused with the whole group, and the group is asked for again.

Shape legend: T tokens with a route, L MoE layers, K experts of a token.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


class BadAnswer(Exception):
    """What a server said cannot be used; the message says why, in one line."""


class OtherWeights(BadAnswer):
    """Tokens of other weights than the present ones: the server may be sound, and needs the weights."""


@dataclass(frozen=True)
class Sample:
    """One response."""

    tokens: list[int]  # its end included
    logprobs: list[float]  # of each token, nats
    finished: bool  # ended by an id that ends responses, not by the length limit
    versions: Sequence[
        tuple[int, int]
    ] = ()  # of weights: (version, end of its tokens), in order; () where none was asked for
    routes_TLK: Any = None  # array of expert ids of all tokens of prompt and response but the last; None: not asked for


@dataclass(frozen=True)
class RoutesAsked:
    """The routes that every sample must have."""

    layers: tuple[int, ...]  # that have experts, from 0; a server speaks of all layers of the model
    experts: int
    topk: int


@dataclass(frozen=True)
class Asked:
    """What every sample of a batch must be."""

    ends: Collection[int]
    vocabulary: int  # ids are below it
    longest: int  # tokens of a response
    labels: Mapping[str, int]  # that tokens may have, of proven weights, with their versions
    routes: RoutesAsked | None = None


def samples(answer: Any, count: int, asked: Asked, prompt: int) -> list[Sample]:
    """The samples of one prompt of this many tokens, in order. Raises BadAnswer."""
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list) or len(choices) != count:
        raise BadAnswer(f"{_shown(choices if choices is not None else answer)} instead of {count} choices")
    by_index = {choice.get("index"): choice for choice in choices if isinstance(choice, dict)}
    if by_index.keys() != set(range(count)):
        raise BadAnswer(f"choices {sorted(map(str, by_index))} instead of 0 to {count - 1}")
    return [_sample(by_index[index], asked, prompt) for index in range(count)]


def _sample(choice: dict[str, Any], asked: Asked, prompt: int) -> Sample:
    tokens: Any = choice.get("token_ids")
    reason = choice.get("finish_reason")
    if reason not in ("stop", "length"):
        raise BadAnswer(f"a response ended by {_shown(reason)}")
    if not _are_ids(tokens, asked.vocabulary):
        raise BadAnswer(f"token ids {_shown(tokens)} are not numbers from 0 to {asked.vocabulary - 1}")
    finished = tokens[-1] in asked.ends if tokens else False
    ends_early = any(token in asked.ends for token in tokens[:-1])
    whole = finished or len(tokens) == asked.longest
    if not tokens or ends_early or not whole or len(tokens) > asked.longest or (reason == "stop") != finished:
        raise BadAnswer(
            f"a response of {len(tokens)} tokens (at most {asked.longest}) that ended by {reason} "
            f"{'at' if finished else 'without'} an end-of-sequence"
        )
    versions = _versions(choice.get("weight_versions"), len(tokens), asked.labels)
    routes_TLK = None
    if asked.routes is not None:
        routes_TLK = _routes(choice.get("routed_experts"), prompt + len(tokens) - 1, asked.routes)
    return Sample(tokens, _log_probs(choice.get("logprobs"), tokens), finished, versions, routes_TLK)


def _routes(said: Any, tokens: int, asked: RoutesAsked) -> Any:
    """The experts of the layers that have some, [T, L, K], out of those of all layers."""
    if not isinstance(said, str):
        raise BadAnswer(
            "no routes of its tokens: start the server with --enable-return-routed-experts, or on CPUs as docs/rollouts.md says"
        )
    try:
        all_TLK = np.load(io.BytesIO(base64.b64decode(said, validate=True)), allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise BadAnswer(f"routes {_shown(said)}: {error}") from error
    layers = asked.layers[-1] + 1
    if all_TLK.dtype.kind not in "ui" or all_TLK.ndim != 3 or all_TLK.shape[::2] != (tokens, asked.topk):
        raise BadAnswer(
            f"routes of shape {all_TLK.shape} ({all_TLK.dtype}), and {tokens} tokens go to {asked.topk} experts in each of "
            f"{layers} layers"
        )
    if all_TLK.shape[1] < layers:
        raise BadAnswer(f"routes of {all_TLK.shape[1]} layers, and the last one with experts is the {layers}th")
    routes_TLK = all_TLK[:, list(asked.layers)]
    if routes_TLK.size and not 0 <= routes_TLK.min() <= routes_TLK.max() < asked.experts:
        raise BadAnswer(f"routes to experts {routes_TLK.min()} to {routes_TLK.max()} of {asked.experts}")
    return routes_TLK


def _are_ids(tokens: Any, vocabulary: int) -> bool:
    return isinstance(tokens, list) and all(
        isinstance(token, int) and not isinstance(token, bool) and 0 <= token < vocabulary for token in tokens
    )


def _versions(spans: Any, length: int, labels: Mapping[str, int]) -> list[tuple[int, int]]:
    """Whose weights each token comes from, as (version, end); all must be proven ones."""
    at, found = 0, list[tuple[int, int]]()
    for span in spans if isinstance(spans, list) else []:
        if not isinstance(span, dict) or span.get("start") != at or not isinstance(span.get("end"), int):
            raise BadAnswer(f"weight versions {_shown(spans)}")
        label, at = span.get("version"), span["end"]
        if not isinstance(label, str) or label not in labels:
            raise OtherWeights(f"tokens of weights {_shown(label)} instead of {' or '.join(labels)}")
        if found and labels[label] < found[-1][0]:
            raise OtherWeights(f"weight versions {_shown(spans)} go back")
        found.append((labels[label], at))
    if at != length:
        raise BadAnswer(f"weight versions {_shown(spans)} do not cover {length} tokens")
    return found


def _log_probs(said: Any, tokens: Sequence[int]) -> list[float]:
    content = said.get("content") if isinstance(said, dict) else None
    if not isinstance(content, list) or len(content) != len(tokens):
        raise BadAnswer(
            f"{len(content) if isinstance(content, list) else 'no'} log-probabilities of {len(tokens)} tokens"
        )
    found = []
    for entry, token in zip(content, tokens, strict=True):
        value: Any = entry.get("logprob") if isinstance(entry, dict) else None
        if not isinstance(entry, dict) or entry.get("token_id") != token or not _is_log_prob(value):
            raise BadAnswer(f"{_shown(entry)} as the log-probability of token {token}")
        found.append(min(float(value), 0.0))
    return found


def prompt_log_probs(answer: Any, tokens: Sequence[int]) -> list[float]:
    """Log-probabilities of all prompt tokens but the first. Raises BadAnswer."""
    rows = answer.get("prompt_logprobs") if isinstance(answer, dict) else None
    if not isinstance(rows, list) or len(rows) != len(tokens):
        raise BadAnswer(f"{_shown(rows)} instead of the log-probabilities of {len(tokens)} prompt tokens")
    found = []
    for row, token in zip(rows[1:], tokens[1:], strict=True):
        entry = row.get(str(token)) if isinstance(row, dict) else None
        value: Any = entry.get("logprob") if isinstance(entry, dict) else None
        if not _is_log_prob(value):
            raise BadAnswer(f"{_shown(row)} as the log-probability of prompt token {token}")
        found.append(float(value))
    return found


def _is_log_prob(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value <= 1e-4


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:100]}... ({len(text)} characters)"
