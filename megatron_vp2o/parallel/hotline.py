"""A connection of every rank to rank 0 that is no process group: it carries words while collectives wait or fail.

Rank 0 listens, the others connect, one line of JSON is one message. What a rank says reaches all others, by way of rank 0. A
connection that closes although nobody took leave is a rank whose process has ended: the system closes it at once, also after
SIGKILL or a crash; a machine that vanished is noticed after KEEPALIVE_S.

Nothing here knows what the messages mean; `failure.py` does.
"""

from __future__ import annotations

import json
import secrets
import selectors
import signal
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

Message = dict[str, Any]
Heard = Callable[[int, Message | None], None]
"""Called in the listening thread with the rank that spoke and what it said; None where it ended without a word."""

KEEPALIVE_S = 90
_SEND_S = 5.0
_LOCAL = ("localhost", "127.0.0.1", "::1")


class Hub:
    """Rank 0's end.

    Args:
        host: the name by which the others know this machine; with a local name nobody outside can connect.
        size: ranks of the run.
        heard: what to do with messages; the hub has handed them on by then.
    """

    def __init__(self, host: str, size: int, heard: Heard) -> None:
        self.token = secrets.token_hex(16)
        self._size, self._heard = size, heard
        self._lines: dict[int, _Line] = {}
        self._gone: set[int] = set()
        self._said: list[Message] = []  # for those who come later
        self._lock = threading.Lock()
        self._complete = threading.Event()
        self._left = False
        self._server = _listen(host)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._server, selectors.EVENT_READ)
        _thread(self._listen)

    @property
    def port(self) -> int:
        return int(self._server.getsockname()[1])

    def missing(self) -> list[int]:
        """Ranks that have not connected."""
        with self._lock:
            return [rank for rank in range(1, self._size) if rank not in self._lines and rank not in self._gone]

    def wait(self, seconds: float) -> bool:
        """Whether all ranks are connected, at the latest after so many seconds."""
        return self._complete.wait(seconds)

    def say(self, message: Message) -> None:
        """Tell all other ranks."""
        self._pass_on(0, {"from": 0, "said": message})

    def leave(self) -> None:
        """Take leave: from now on connections may close."""
        self._left = True
        self._pass_on(0, {"from": 0, "said": None})
        self._server.close()

    def _pass_on(self, source: int, message: Message) -> None:
        with self._lock:
            self._said.append(message)
            lines = [line for rank, line in self._lines.items() if rank != source]
        for line in lines:
            line.send(message)

    def _listen(self) -> None:
        while not self._left:
            for key, _ in self._selector.select(timeout=1.0):
                if key.fileobj is self._server:
                    self._accept()
                else:
                    self._read(key.data)

    def _accept(self) -> None:
        try:
            connection, _ = self._server.accept()
        except OSError:  # closed by `leave`, or the caller gave up at once
            return
        _keep_alive(connection)
        self._selector.register(connection, selectors.EVENT_READ, _Line(connection))

    def _read(self, line: _Line) -> None:
        messages, ended = line.receive()
        for message in messages:
            if line.rank is None:
                self._greet(line, message)
                if line.rank is None:
                    break
            elif message["said"] is None:
                line.left = True
            else:
                self._pass_on(line.rank, message)
                self._heard(line.rank, message["said"])
        if ended:
            self._selector.unregister(line.socket)
            line.socket.close()
            if line.rank is not None:
                self._drop(line.rank, line.left or self._left)

    def _greet(self, line: _Line, message: Message) -> None:
        if message.get("token") != self.token:  # not one of ours
            line.refuse()
            return
        line.rank = int(message["rank"])
        with self._lock:
            self._lines[line.rank] = line
            said = list(self._said)
            complete = len(self._lines) + len(self._gone) == self._size - 1
        for earlier in said:
            line.send(earlier)
        if complete:
            self._pass_on(0, {"from": 0, "said": {}})
            self._complete.set()

    def _drop(self, rank: int, in_peace: bool) -> None:
        with self._lock:
            del self._lines[rank]
            self._gone.add(rank)
        if not in_peace:
            self._pass_on(rank, {"from": rank, "gone": True})
            self._heard(rank, None)


class Spoke:
    """Another rank's end.

    Raises:
        OSError: rank 0 cannot be reached.
    """

    def __init__(self, host: str, port: int, token: str, rank: int, heard: Heard, timeout: float) -> None:
        self.rank, self._heard = rank, heard
        connection = socket.create_connection((host, port), timeout=timeout)
        _keep_alive(connection)
        self._line = _Line(connection)
        self._complete = threading.Event()
        self._left = False
        self._line.send({"rank": rank, "token": token})
        _thread(self._listen)

    def wait(self, seconds: float) -> bool:
        """Whether all ranks are connected, at the latest after so many seconds."""
        return self._complete.wait(seconds)

    def say(self, message: Message) -> None:
        """Tell all other ranks."""
        self._line.send({"from": self.rank, "said": message})

    def leave(self) -> None:
        """Take leave: from now on the connection may close."""
        self._left = True
        self._line.send({"from": self.rank, "said": None})

    def _listen(self) -> None:
        selector = selectors.DefaultSelector()
        selector.register(self._line.socket, selectors.EVENT_READ)
        ended = False
        while not ended:
            selector.select()
            messages, ended = self._line.receive()
            for message in messages:
                if message.get("gone"):
                    self._heard(message["from"], None)
                elif message["said"] is None:
                    self._left = True
                elif not message["said"]:
                    self._complete.set()
                else:
                    self._heard(message["from"], message["said"])
        if not self._left:
            self._heard(0, None)


class _Line:
    """A socket, and what has come of its next line."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.rank: int | None = None
        self.left = False
        self._refused = False
        self._rest = b""
        self._sending = threading.Lock()
        connection.settimeout(_SEND_S)  # messages are small: who does not take one is as good as gone

    def send(self, message: Message) -> None:
        with self._sending:
            try:
                self.socket.sendall(json.dumps(message).encode() + b"\n")
            except OSError:  # whoever reads this line notices that it is broken
                return

    def receive(self) -> tuple[list[Message], bool]:
        """What has come, and whether it was the last. Called when there is something to read."""
        try:
            data = b"" if self._refused else self.socket.recv(1 << 16)
        except OSError:
            data = b""
        *lines, self._rest = (self._rest + data).split(b"\n")
        try:
            messages = [json.loads(line) for line in lines]
        except ValueError:
            messages = [None]
        if all(isinstance(message, dict) for message in messages):
            return messages, not data
        return [], True  # not one of ours

    def refuse(self) -> None:
        """Nothing more is taken from whoever it is."""
        self._refused = True
        self.socket.shutdown(socket.SHUT_RDWR)


def publish(hub: Hub) -> str:
    """What the others need to find the hub."""
    return json.dumps([hub.port, hub.token])


def call(host: str, address: str, rank: int, heard: Heard, timeout: float) -> Spoke:
    """Connect to the hub that published this address on this host."""
    port, token = json.loads(address)
    deadline = time.monotonic() + timeout
    while True:
        try:
            return Spoke(host, port, token, rank, heard, max(1.0, deadline - time.monotonic()))
        except ConnectionError:  # a thousand ranks at once are more than a queue of waiting connections holds
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def _listen(host: str) -> socket.socket:
    if host in _LOCAL:
        family = socket.AF_INET6 if host == "::1" else socket.AF_INET
        return socket.create_server((host, 0), family=family, backlog=1024)
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, backlog=1024, dualstack_ipv6=True)
    return socket.create_server(("", 0), backlog=1024)


def _keep_alive(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", (KEEPALIVE_S - 30) // 10)):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _thread(target: Callable[[], None]) -> None:
    def run() -> None:
        # Signals are for the main thread: one that came here would not wake it.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        target()

    threading.Thread(target=run, name="hotline", daemon=True).start()
