"""Endpoints that answer well, and those that are dead, slow, talk garbage or serve another model: clear errors, nothing counted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_vp2o import evaluate
from megatron_vp2o.errors import ConfigError
from megatron_vp2o.evaluation.endpoint import Endpoint, EndpointError
from megatron_vp2o.evaluation.model import Sampling, named, token_count
from tests.evaluation.server import NAME, Behaviour, serving

SAMPLING = Sampling(0.6, 0.95, 32, 0)


def _endpoint(url: str, **changes: Any) -> Endpoint:
    return Endpoint("a", url, NAME, **{"timeout_s": 5.0, "pause_s": 0.01, **changes})


def test_chat_and_completions_send_what_they_should() -> None:
    with serving() as (url, it):
        it.answer = lambda body: "one two three"
        for chat in (True, False):
            (found,) = _endpoint(url, chat=chat).generate(["Q?"], [0], SAMPLING)
            assert (found.text, found.solution, found.solution_tokens, found.truncated) == (
                *["one two three"] * 2,
                3,
                False,
            )
        first, second = it.requests
        assert first["messages"] == [{"role": "user", "content": "Q?"}] and second["prompt"] == "Q?"
        assert {"max_tokens": 32, "temperature": 0.6, "top_p": 0.95, "model": NAME}.items() <= first.items()
        assert "seed" not in first


def test_answers_come_back_in_order_and_are_retried() -> None:
    with serving() as (url, it):
        it.answer = lambda body: body["messages"][0]["content"]
        it.fail_first = 2
        found = _endpoint(url, concurrency=4).generate([str(n) for n in range(20)], list(range(20)), SAMPLING)
        assert [one.text for one in found] == [str(n) for n in range(20)]


def test_thinking_apart() -> None:
    with serving() as (url, it):
        it.answer, it.tokens = (lambda body: "<think>aaaa</think>bbbbb"), 12
        (estimated,) = _endpoint(url).generate(["Q"], [0], SAMPLING)
        assert (estimated.thinking_tokens, estimated.solution_tokens) == (12 - round(12 * 5 / 24), round(12 * 5 / 24))
        (exact,) = _endpoint(url, count=len).generate(["Q"], [0], SAMPLING)
        assert (exact.thinking_tokens, exact.solution_tokens, exact.solution) == (7, 5, "bbbbb")
        it.answer, it.reasoning = (lambda body: "bbbbb"), "aaaa"
        (told,) = _endpoint(url, count=len).generate(["Q"], [0], SAMPLING)
        assert (told.thinking_tokens, told.solution_tokens, told.text) == (7, 5, "<think>aaaa</think>bbbbb")
        it.finish = "length"
        assert _endpoint(url).generate(["Q"], [0], SAMPLING)[0].truncated


FAULTS: dict[str, tuple[Callable[[Behaviour], None], str]] = {
    "no JSON": (lambda it: setattr(it, "raw", b"<html>hello"), "gave no JSON: '<html>hello"),
    "no completion": (lambda it: setattr(it, "raw", b'{"choices": []}'), "gave no completion"),
    "a list": (lambda it: setattr(it, "raw", b"[1]"), "gave no completion"),
    "text that is none": (lambda it: setattr(it, "finish", None), "no text that ended"),
    "another model": (lambda it: setattr(it, "model", "other"), "answered with the model 'other', and 'served' was asked"),
    "more tokens than asked": (lambda it: setattr(it, "tokens", 33), "at most 32 tokens has 33"),
    "tokens that are none": (lambda it: setattr(it, "tokens", "9"), "has '9' tokens"),
    "not found": (lambda it: setattr(it, "status", 404), "answers with status 404"),
    "broken": (lambda it: setattr(it, "status", 500), "failed 3 times, the last time with: status 500"),
    "slow": (lambda it: setattr(it, "seconds", 1.0), "no answer within 0.3 s"),
    "a byte now and then": (lambda it: setattr(it, "drip", True), "no answer within 0.3 s"),
    "dead": (lambda it: setattr(it, "die_after", 0), "failed 3 times"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_errors_that_say_what_happened(fault: str) -> None:
    misbehave, said = FAULTS[fault]
    with serving() as (url, it):
        misbehave(it)
        timeout = 0.3 if "0.3" in said else 5.0
        with pytest.raises(EndpointError) as error:
            _endpoint(url, timeout_s=timeout).generate(["Q", "R"], [0, 1], SAMPLING)
        assert said in str(error.value)


def test_nobody_there_and_a_model_that_is_not_served() -> None:
    with pytest.raises(EndpointError, match="failed 3 times"):
        _endpoint("http://127.0.0.1:9/v1").check([], 8)
    with serving() as (url, it):
        it.models = ["x", "y"]
        with pytest.raises(EndpointError, match="serves x, y, not served"):
            _endpoint(url).check([], 8)
    with pytest.raises(ConfigError, match="it must be http"):
        _endpoint("host:80")


def test_an_endpoint_that_dies_ends_the_evaluation_and_the_next_call_goes_on(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_vp2o.evaluation.endpoint.time.sleep", lambda seconds: None)
    arguments = ["--data", "own", "--suite", "gpqa", "--lengths", "64", "--samples", "4", "--out", str(tmp_path)]
    more = ["--batch", "4", "--concurrency", "1", "--workers", "1"]
    with serving() as (url, it):
        it.die_after = 10
        assert evaluate.main([f"a={url}#{NAME}", *arguments, *more]) == 2
        assert "failed 3 times" in capsys.readouterr().err
        path = tmp_path / "samples" / "a" / "step_000000" / "gpqa@64.jsonl"
        assert path.read_text().count("\n") == 1 + 8  # two whole batches; nothing of the third
        it.die_after = None
        it.requests.clear()
        assert evaluate.main([f"a={url}#{NAME}", *arguments, *more]) == 0
        assert len(it.requests) == 24 - 8 and path.read_text().count("\n") == 1 + 24
        it.requests.clear()
        assert evaluate.main([f"a={url}#{NAME}", *arguments, *more, "--temperature", "0.1"]) == 2
        assert "temperature is 0.6 there and 0.1 here" in capsys.readouterr().err and not it.requests


@pytest.mark.parametrize(
    ("text", "label", "length", "place"),
    [
        ("runs/x", "x", None, "runs/x"),
        ("vp2o=runs/x/", "vp2o", None, "runs/x/"),
        ("vp2o@16k=runs/x", "vp2o", 16384, "runs/x"),
        ("http://h:1/v1#org/Name-7B", "Name-7B", None, "http://h:1/v1#org/Name-7B"),
        ("s@8k=http://h:1/v1?a=b#m", "s", 8192, "http://h:1/v1?a=b#m"),
    ],
)
def test_how_models_are_named(text: str, label: str, length: int | None, place: str) -> None:
    assert vars(named(text)) == {"label": label, "length": length, "place": place}


def test_bad_command_lines_are_one_clear_error(tmp_path: Path, capsys: Any) -> None:
    out = ["--out", str(tmp_path / "none")]
    for arguments, said in (
        ([], "no model is named"),
        (["a=x", "--suite", "gpqq"], "'gpqq' is neither a suite"),
        (["a=x", "--data", str(tmp_path)], "has no aime24.jsonl or .parquet"),
        (["a b=x", "--data", "own"], "is no label"),
        (["a=x", "--data", "own", "--lengths", "8q"], "length '8q'"),
        (["a=x", "--data", "own", "--top-p", "0"], "--top-p 0.0: above 0"),
        (["a=x", "--data", "own", "--limit", "0"], "--limit 0: above 0"),
        (["--report-only"], "holds no samples"),
    ):
        assert evaluate.main([*arguments, *out]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
    with pytest.raises(ConfigError, match="a number of tokens"):
        token_count("0")
