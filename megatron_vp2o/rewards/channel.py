"""Messages over a socket: four bytes of length, then the message. From workers they are JSON, never pickles: a worker
reads what a model wrote, and nothing that comes from it may run in the process that trains."""

from __future__ import annotations

import contextlib
import json
import pickle
import socket
import struct
from collections.abc import Iterator
from typing import Any

_LENGTH = struct.Struct("!I")


def framed(body: bytes) -> bytes:
    """A message with its length before it."""
    return _LENGTH.pack(len(body)) + body


class Messages:
    """Cuts a stream of bytes into messages."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[Any]:
        """Take bytes as they arrive; yields each message that is complete, decoded from JSON."""
        self._buffer += data
        while len(self._buffer) >= _LENGTH.size:
            end = _LENGTH.size + _LENGTH.unpack_from(self._buffer)[0]
            if len(self._buffer) < end:
                return
            body = bytes(self._buffer[_LENGTH.size : end])
            del self._buffer[:end]
            yield json.loads(body)


class WorkerChannel:
    """A worker's end: reads pickles, which come from the process that trains, and writes JSON. Blocking."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def send(self, message: dict[str, Any]) -> None:
        self._connection.sendall(framed(json.dumps(message).encode()))

    def receive(self) -> Any:
        """The next message; None when the other side is gone."""
        head = self._exactly(_LENGTH.size)
        body = None if head is None else self._exactly(_LENGTH.unpack(head)[0])
        return None if body is None else pickle.loads(body)

    def _exactly(self, size: int) -> bytes | None:
        data = bytearray()
        with contextlib.suppress(ConnectionError):
            while len(data) < size:
                more = self._connection.recv(min(size - len(data), 1 << 20))
                if not more:
                    return None
                data += more
            return bytes(data)
        return None
