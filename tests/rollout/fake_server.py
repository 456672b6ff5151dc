"""A server that speaks what the client speaks, with a model of one table and faults on demand: `fake_server.py FOLDER PORT`.

The model is a bigram: the logits of the next token are a row of a table, which arrives in the files of a weight set in several
tensors. It checks an update of files as `server_side/vp2o_vllm.py` does, and takes one by broadcast with the code that vLLM's
workers run (`server_side/vp2o_broadcast.py`). POST /fault {"kind": ..., "after": n} arms one fault of this
process, at the n-th request from then on that it applies to; {"kind": ..., "always": true} leaves it on.
"""

from __future__ import annotations

import base64
import hashlib
import io
import itertools
import json
import os
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

FIXED = "VP2O_FAKE_FIXED" in os.environ
"""Samples depend on weights, prompt and place in the group only."""
ROUTED = [int(word) for word in os.environ.get("VP2O_FAKE_ROUTES", "").split()]
"""Layers, experts, and experts of a token, if answers say where tokens went."""
GENERATING = (
    "die_generating",
    "slow",
    "garbage",
    "short_logprobs",
    "error",
    "foreign_ids",
    "twice",
    "no_json",
    "aborted",
    "no_routes",
    "short_routes",
    "foreign_routes",
)
LOADING = ("die_loading", "load_nothing", "load_half", "load_other", "refuse")
RECEIVING = (*LOADING, "hang_receiving")
"""Faults of an update by broadcast."""
SERVER_SIDE = Path(__file__).resolve().parents[2] / "megatron_vp2o" / "rollout" / "server_side"
sys.path.insert(0, str(SERVER_SIDE))


class State:
    """Weights, their label, and the fault that is armed."""

    def __init__(self, folder: Path) -> None:
        self.tensors: dict[str, Any] = {}
        for file in sorted(folder.glob("*.safetensors")):
            self.tensors |= load_file(file)
        self.remember()
        self.label, self.paused = "default", False
        self.fault: dict[str, Any] = {}
        self.random = np.random.default_rng(int.from_bytes(os.urandom(8), "little"))
        self.lock = threading.Lock()
        self.served, self.aborts = 0, 0
        self.group: Any = None  # with a trainer that broadcasts
        self.token_s = float(os.environ.get("VP2O_FAKE_TOKEN_S", "0"))

    def pause(self, *, keep: bool) -> None:
        """Requests in flight stop at their next token, to go on after it or to end."""
        with self.lock:
            self.paused = True
            self.aborts += not keep

    def next_token(self, begun: int) -> bool:
        """Wait until it may be made. Returns whether the request, which began after so many aborts, is to have one."""
        time.sleep(self.token_s)
        while self.paused and self.aborts == begun:
            time.sleep(0.005)
        return self.aborts == begun

    def strikes(self, kinds: tuple[str, ...]) -> str:
        """The fault that happens now, if any."""
        with self.lock:
            if self.fault.get("kind") not in kinds:
                return ""
            self.fault["after"] = self.fault.get("after", 1) - 1
            if self.fault["after"] > 0:
                return ""
            kind = str(self.fault["kind"])
            if not self.fault.get("always"):
                self.fault = {}
            return kind

    def remember(self) -> None:
        """The table of logits, once for each set of weights."""
        if not self.tensors:  # started for a trainer that broadcasts them
            return
        rows = [self.tensors[name] for name in sorted(self.tensors) if name.startswith("rows")]
        self.logits = np.concatenate(rows).astype(np.float64) + self.tensors["bias"]

    def log_probs(self, token: int, temperature: float) -> Any:
        logits = self.logits[token] / (temperature or 1.0)
        return logits - np.logaddexp.reduce(logits)

    # updates

    def join(self, info: dict[str, Any]) -> None:
        """As the only worker. Nothing is to be agreed on where weights come as files."""
        self.leave()
        if info:
            Group, Meeting, device = server_side()
            self.group = Group(Meeting(**info), 1, device)

    def leave(self) -> None:
        if self.group is not None:
            self.group.close()
        self.group = None

    def start(self) -> None:
        self.staged: dict[str, Any] = {}
        self.seen, self.whole, self.digest = [0, 0], False, hashlib.blake2b(digest_size=8)
        self.received: Any = None

    def update(self, info: dict[str, Any]) -> None:
        if "entries" not in info:
            return self.update_by_file(info)
        try:
            self.update_by_broadcast(info)
        except BaseException:
            self.leave()
            raise

    def update_by_broadcast(self, info: dict[str, Any]) -> None:
        from vp2o_broadcast import Received, buffer_bytes

        if self.received is None:
            self.received = Received()
        entries = info["entries"]
        if not entries:
            self.received.compare(info["tensors"], info["bytes"], info["digest"])
            self.whole = True
            return
        kind = self.strikes(RECEIVING)
        if kind == "die_loading":
            os._exit(9)
        if kind == "refuse" or self.group is None:
            raise ValueError("a fault that was asked for" if kind else "no group")
        if kind == "hang_receiving":
            time.sleep(60)
        size = buffer_bytes(entries)
        buffer = self.group.receive(size)
        loaded = {name: tensor.numpy() for name, tensor in self.received.tensors_of(entries, buffer, info["digest"])}
        self.stage(loaded, kind)

    def update_by_file(self, info: dict[str, Any]) -> None:
        kind = self.strikes(LOADING) if info["file"] else ""
        if kind == "die_loading":
            os._exit(9)
        if kind == "refuse":
            raise ValueError("a fault that was asked for")
        if not info["file"]:
            if [*self.seen, self.digest.hexdigest()] != [info["tensors"], info["bytes"], info["digest"]]:
                raise ValueError("not whole")
            self.whole = True
            return
        path = Path(info["folder"]) / info["file"]
        self.digest.update(hashlib.blake2b(path.read_bytes(), digest_size=8).digest())
        loaded = load_file(path)
        self.seen[0] += len(loaded)
        self.seen[1] += sum(tensor.nbytes for tensor in loaded.values())
        self.stage(loaded, kind)

    def stage(self, loaded: dict[str, Any], kind: str) -> None:
        names = sorted(loaded)
        if kind == "load_nothing":
            return
        if kind == "load_half":
            names = names[: len(names) // 2]
        for name in names:
            self.staged[name] = loaded[name] * (1.3 if kind == "load_other" else 1.0)

    def finish(self, label: str) -> None:
        if not self.whole:
            raise ValueError("nobody said what all of it comes to")
        self.tensors |= self.staged
        self.remember()
        self.label = label

    # generation

    def generate(self, body: dict[str, Any]) -> Any:
        kind = self.strikes(GENERATING)
        if kind == "die_generating":
            os._exit(9)
        if kind == "slow":
            time.sleep(4)
        if kind == "error":
            raise ValueError("a fault that was asked for")
        settings, prompt = body["sampling_params"], body["token_ids"]
        answer: dict[str, Any] = {"request_id": "x", "choices": []}
        if settings.get("prompt_logprobs") is not None:
            rows = [
                {str(token): {"logprob": float(self.log_probs(before, 1.0)[token])}}
                for before, token in itertools.pairwise(prompt)
            ]
            answer["prompt_logprobs"] = [None, *rows]
        for index in range(settings.get("n", 1)):
            answer["choices"].append(self.sample(index, prompt, settings))
        with self.lock:
            self.served += 1
        return _spoilt(answer, kind)

    def draws(self, prompt: list[int], index: int) -> Any:
        """Where a sample's random numbers come from."""
        return np.random.default_rng([*prompt, index]) if FIXED else self.random

    def sample(self, index: int, prompt: list[int], settings: dict[str, Any]) -> dict[str, Any]:
        tokens: list[int] = []
        content: list[dict[str, Any]] = []
        spans: list[dict[str, Any]] = []
        last, begun = prompt[-1], self.aborts
        drawn = self.draws(prompt, index)
        while len(tokens) < settings["max_tokens"]:
            if not self.next_token(begun):
                break
            if not spans or spans[-1]["version"] != self.label:
                spans.append({"version": self.label, "start": len(tokens)})
            spans[-1]["end"] = len(tokens) + 1
            logp = self.log_probs(last, settings["temperature"])
            with self.lock:
                u = drawn.random()
            last = int(logp.argmax() if settings["temperature"] == 0 else np.exp(logp).cumsum().searchsorted(u))
            last = min(last, len(logp) - 1)
            tokens.append(last)
            content.append({"token_id": last, "logprob": float(logp[last])})
            if last in settings.get("stop_token_ids", ()):
                break
        routed = {"routed_experts": encoded(routes_of(prompt + tokens, *ROUTED))} if ROUTED else {}
        return routed | {
            "index": index,
            "finish_reason": _reason(tokens, settings),
            "token_ids": tokens,
            "logprobs": {"content": content},
            "weight_versions": spans,
        }


def server_side() -> tuple[Any, Any, Any]:
    """What takes broadcasts. It needs torch, whose import takes seconds."""
    import torch
    from vp2o_broadcast import Group, Meeting

    torch.set_num_threads(1)
    return Group, Meeting, torch.device("cpu")


def _reason(tokens: list[int], settings: dict[str, Any]) -> str:
    if tokens and tokens[-1] in settings.get("stop_token_ids", ()):
        return "stop"
    return "length" if len(tokens) == settings["max_tokens"] else "abort"


def routes_of(tokens: list[int], layers: int, experts: int, topk: int) -> Any:
    """Where tokens go: to experts that follow from a token and the one before it; the last one goes nowhere. [T-1, L, K]"""
    before_T = np.array([0, *tokens[:-1]]) + 3 * np.array(tokens)
    layer_L, choice_K = np.arange(layers), np.arange(topk)
    return (((before_T[:, None, None] + 5 * layer_L[:, None] + choice_K) % experts)[:-1]).astype(np.uint8)


def encoded(array: Any) -> str:
    """As vLLM writes arrays into its answers."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    return base64.b64encode(buffer.getvalue()).decode()


def _spoilt(answer: dict[str, Any], kind: str) -> Any:
    first = answer["choices"][0]
    if kind == "garbage":
        return {"choices": [{"index": 0, "token_ids": "hello", "finish_reason": 7}] * len(answer["choices"])}
    if kind == "short_logprobs":
        first["logprobs"]["content"].pop()
    if kind == "foreign_ids":
        first["token_ids"][0] = 10**6
    if kind == "twice":
        answer["choices"].append(first)
    if kind == "no_json":
        return b"<html>proxy error</html>"
    if kind == "no_routes":
        del first["routed_experts"]
    if kind in ("short_routes", "foreign_routes"):
        routes = np.load(io.BytesIO(base64.b64decode(first["routed_experts"])))
        first["routed_experts"] = encoded(routes[1:] if kind == "short_routes" else routes + 100)
    if kind == "aborted":
        first["finish_reason"] = "abort"
    return answer


class Handler(BaseHTTPRequestHandler):
    """Routes of the client's API."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body are two packets, and the second waited 40 ms
    state: State

    def log_message(self, *_: Any) -> None:
        """Quiet."""

    def reply(self, value: Any, status: int = 200) -> None:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        state = self.state
        if state.fault.get("kind") == "engine_dead" and self.path == "/health":
            return self.reply("", 503)
        known = {
            "/health": "",
            "/weight_info": {"weight_version": state.label},
            "/served": state.served,
            "/fault": state.fault,
            "/get_world_size": {"world_size": 1},
        }
        self.reply(known.get(self.path, "?"), 200 if self.path in known else 404)

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length) or b"null")
        try:
            path, _, query = self.path.partition("?")
            self.reply(self.act(path, query, body))
        except (ValueError, RuntimeError) as error:
            self.reply({"error": str(error)}, 500)

    def act(self, path: str, query: str, body: Any) -> Any:
        state = self.state
        while state.fault.get("kind") == "engine_dead":  # whatever needs the engine waits for ever
            time.sleep(0.1)
        if path == "/inference/v1/generate":
            while state.paused:
                time.sleep(0.02)
            return state.generate(body)
        if path == "/pause":
            state.pause(keep="mode=keep" in query)
        elif path == "/resume":
            state.paused = False
        elif path == "/start_weight_update":
            state.start()
        elif path == "/update_weights":
            state.update(body["update_info"])
        elif path == "/finish_weight_update":
            state.finish(body["weight_version"])
        elif path == "/update_weight_version":
            state.label = body["new_version"]
        elif path == "/fault":
            state.fault = body
        elif path == "/init_weight_transfer_engine":
            state.join(body["init_info"])
        else:
            raise ValueError(f"no such path: {path}")
        return {}


def serve(state: State, port: int, address: str = "127.0.0.1") -> None:
    """For ever."""
    Handler.state = state
    ThreadingHTTPServer.daemon_threads = True
    ThreadingHTTPServer.request_queue_size = (
        1024  # as vLLM's; with socketserver's 5, connections of a burst wait for seconds
    )
    ThreadingHTTPServer((address, port), Handler).serve_forever()


if __name__ == "__main__":
    if "VP2O_FAKE_BROADCAST" in os.environ:  # before it answers, as vLLM
        server_side()
    serve(State(Path(sys.argv[1])), int(sys.argv[2]))
