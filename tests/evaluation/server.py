"""An OpenAI-compatible endpoint in a thread, that answers as told and can misbehave in many ways."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

NAME = "served"


class Behaviour:
    """How requests are answered from now on, and which came."""

    def __init__(self) -> None:
        self.answer: Callable[[dict[str, Any]], str] = lambda body: "The answer is (A)"
        self.model = NAME
        self.models = [NAME]
        self.raw: bytes | None = None
        self.status = 200
        self.fail_first = 0
        self.seconds = 0.0
        self.drip = False
        self.die_after: int | None = None
        self.finish = "stop"
        self.tokens: Any = None
        self.reasoning: str | None = None
        self.requests: list[dict[str, Any]] = []
        self.lock = threading.Lock()


class Handler(BaseHTTPRequestHandler):
    behaviour: Behaviour

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._send(200, json.dumps({"data": [{"id": name} for name in self.behaviour.models]}).encode())

    def do_POST(self) -> None:
        it = self.behaviour
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with it.lock:
            it.requests.append(body)
            count = len(it.requests)
        if it.die_after is not None and count > it.die_after:
            self.connection.close()
            return
        if count <= it.fail_first:
            self._send(503, b"busy")
            return
        time.sleep(it.seconds)
        if it.raw is not None or it.status != 200:
            self._send(it.status, it.raw or b"no")
            return
        text = it.answer(body)
        said: dict[str, Any] = {"text": text}
        if "messages" in body:
            said = {"message": {"role": "assistant", "content": text, "reasoning_content": it.reasoning}}
        tokens = len(text.split()) if it.tokens is None else it.tokens
        answer = {
            "model": it.model,
            "choices": [{"index": 0, "finish_reason": it.finish, **said}],
            "usage": {"completion_tokens": tokens},
        }
        self._send(200, json.dumps(answer).encode())

    def _send(self, status: int, content: bytes) -> None:
        try:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.behaviour.drip and status == 200 and self.command == "POST":
                for byte in content:
                    self.wfile.write(bytes([byte]))
                    self.wfile.flush()
                    time.sleep(0.05)
            else:
                self.wfile.write(content)
        except OSError:
            pass


@contextmanager
def serving() -> Iterator[tuple[str, Behaviour]]:
    """URL up to /v1, and the behaviour."""
    behaviour = Behaviour()
    handler = type("Bound", (Handler,), {"behaviour": behaviour})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", behaviour
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
