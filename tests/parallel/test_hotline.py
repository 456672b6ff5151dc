"""The line between ranks: what one says all hear, and an end without a word is noticed; strangers change nothing."""

from __future__ import annotations

import json
import queue
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from megatron_vp2o.parallel.hotline import Hub, Spoke, call, publish


@contextmanager
def line(size: int) -> Iterator[tuple[Hub, list[Spoke], list[queue.Queue[tuple[int, Any]]]]]:
    """All ranks of a line in this process, with what each hears."""
    heard: list[queue.Queue[tuple[int, Any]]] = [queue.Queue() for _ in range(size)]
    hub = Hub("127.0.0.1", size, lambda *said: heard[0].put(said))
    spokes = [
        call("127.0.0.1", publish(hub), rank, lambda *said, r=rank: heard[r].put(said), 5.0) for rank in range(1, size)
    ]
    try:
        yield hub, spokes, heard
    finally:
        for spoke in spokes:
            spoke.leave()
        hub.leave()
        for spoke in spokes:
            spoke._line.socket.close()


def nothing(heard: queue.Queue[tuple[int, Any]]) -> bool:
    try:
        return heard.get(timeout=0.3) is None
    except queue.Empty:
        return True


@pytest.mark.parametrize("size", [2, 5])
def test_all_others_hear_what_a_rank_says(size: int) -> None:
    with line(size) as (hub, spokes, heard):
        assert hub.wait(5) and all(spoke.wait(5) for spoke in spokes) and hub.missing() == []
        ends: list[Hub | Spoke] = [hub, *spokes]
        for rank, end in enumerate(ends):
            end.say({"number": rank, "text": "line\nbreak"})
            for other in set(range(size)) - {rank}:
                assert heard[other].get(timeout=5) == (rank, {"number": rank, "text": "line\nbreak"})
        assert all(map(nothing, heard))


def test_an_end_without_a_word_is_noticed_and_leave_is_not() -> None:
    with line(4) as (hub, spokes, heard):
        spokes[0].leave()
        spokes[0]._line.socket.shutdown(socket.SHUT_RDWR)
        spokes[1]._line.socket.shutdown(socket.SHUT_RDWR)
        assert heard[0].get(timeout=5) == (2, None) and heard[3].get(timeout=5) == (2, None)
        assert nothing(heard[0]) and nothing(heard[3])
        spokes[2].leave()
        hub.leave()
        assert nothing(heard[3])


def test_the_hubs_end_is_noticed() -> None:
    with line(3) as (hub, _, heard):
        assert hub.wait(5)
        for connection in list(hub._lines.values()):
            connection.socket.shutdown(socket.SHUT_RDWR)
        assert heard[1].get(timeout=5)[1] is None and heard[2].get(timeout=5)[1] is None


def test_who_comes_late_hears_of_earlier_failures() -> None:
    heard: queue.Queue[tuple[int, Any]] = queue.Queue()
    hub = Hub("127.0.0.1", 3, lambda *_: None)
    hub.say({"reason": "out of memory"})
    assert not hub.wait(0.1) and hub.missing() == [1, 2]
    spoke = call("127.0.0.1", publish(hub), 2, lambda *said: heard.put(said), 5.0)
    assert heard.get(timeout=5) == (0, {"reason": "out of memory"})
    assert not spoke.wait(0.1) and hub.missing() == [1]
    hub.leave()


@pytest.mark.parametrize(
    "said",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\n",
        b"[1, 2]\n",
        b'{"rank": 1, "token": "guessed"}\n{"said": {}}\n',
        b"",
    ],
)
def test_strangers_change_nothing(said: bytes) -> None:
    with line(2) as (hub, spokes, heard):
        port = json.loads(publish(hub))[0]
        with socket.create_connection(("127.0.0.1", port), timeout=5) as stranger:
            stranger.sendall(said)
            time.sleep(0.1)
        assert nothing(heard[0]) and nothing(heard[1])
        spokes[0].say({"still": "here"})
        assert heard[0].get(timeout=5) == (1, {"still": "here"})
