"""Servers on another machine than the trainer: a *host* starts and ends them there, as the trainer says.

    host     one process on a node (`python -m megatron_vp2o.serve`); writes a *card* into the meeting folder: where it listens,
             and a secret that only readers of the folder know
    trainer  reads the cards, and keeps one connection to each host (`Link`); for the pool each server there is a
             `RemoteProcess`, which it starts, restarts with the present weights and ends like one of its own

Only the number of a server and a folder of weights go over the connection; what is run stands in the host's own command line.
When the connection ends, for whatever reason, so do the servers: the kernel closes it for a trainer that was killed, and lines that
both sides send every few seconds tell of a machine that is gone. Servers of a host that is killed end by their guards.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import signal
import socket
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_vp2o.errors import RolloutError
from megatron_vp2o.rollout.launch import ServerProcess

BEAT_S = 1.0
SILENCE_S = 120.0
"""After so long without a line the other side is taken for lost: its machine is gone, or it hangs."""
GREETING_S = 10.0
_CARDS = "host-*.json"


def own_address() -> str:
    """An address of this machine that others of its network reach; loopback where there is no network."""
    with contextlib.suppress(OSError):
        found = socket.gethostbyname(socket.gethostname())
        if not found.startswith("127."):
            return found
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing; says which interface would be taken
        return str(probe.getsockname()[0])
    return "127.0.0.1"


class Lines:
    """JSON values over a socket, one a line; for one reader and, with a lock, several writers."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self._rest = b""
        self._lock = threading.Lock()

    def send(self, value: Any) -> None:
        """Raises OSError where the other side is gone."""
        with self._lock:
            self.connection.sendall(json.dumps(value).encode() + b"\n")

    def receive(self, timeout: float) -> list[Any]:
        """Whatever has come, after at most `timeout` seconds; [] if nothing. Raises OSError when the other side is gone."""
        if not select.select([self.connection], [], [], timeout)[0]:
            return []
        got = self.connection.recv(65536)
        if not got:
            raise ConnectionResetError("the connection was closed")
        *whole, self._rest = (self._rest + got).split(b"\n")
        try:
            return [json.loads(line) for line in whole]
        except ValueError as error:
            raise ConnectionAbortedError(f"not a line of this protocol: {error}") from error

    def one(self, timeout: float) -> Any:
        """The next value. Raises OSError, also where none comes in time."""
        deadline = time.monotonic() + timeout
        while not (found := self.receive(max(0.0, deadline - time.monotonic()))):
            if time.monotonic() >= deadline:
                raise TimeoutError("no answer")
        return found[0]

    def close(self) -> None:
        """End the connection."""
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
        self.connection.close()


class Host:
    """The servers of one machine, for one trainer at a time.

    Args:
        processes: the servers, none of them started yet.
        folder: where trainer and hosts meet.
        idle_s: how long to wait for a trainer after one has gone without a goodbye (torchrun may start its ranks again). The
            first one may take as long as it likes.
    """

    def __init__(self, processes: Sequence[ServerProcess], address: str, folder: Path, idle_s: float) -> None:
        self.processes, self.idle_s = list(processes), idle_s
        self._secret = secrets.token_hex(16)
        self._listener = socket.create_server((address, 0))
        self._card = folder / f"host-{socket.gethostname()}-{os.getpid()}.json"
        self._asked, self._wake = os.pipe()
        os.set_blocking(self._wake, False)
        folder.mkdir(parents=True, exist_ok=True)
        place = self._listener.getsockname()[:2]
        text = json.dumps({"address": place[0], "port": place[1], "secret": self._secret})
        partial = self._card.with_suffix(".partial")
        with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
            file.write(text)
        partial.rename(self._card)

    def ask_to_end(self) -> None:
        """From a signal handler: end once no trainer is connected; at once if asked again."""
        with contextlib.suppress(BlockingIOError):
            os.write(self._wake, b"x")

    def serve(self) -> str:
        """Serve trainers until one says goodbye, none comes back, or `ask_to_end`. Returns why it ended."""
        try:
            deadline: float | None = None
            awaited: list[Any] = [self._listener, self._asked]
            while True:
                left = None if deadline is None else max(0.0, deadline - time.monotonic())
                ready = select.select(awaited, [], [], left)[0]
                if self._asked in ready:
                    return "it was asked to end"
                if not ready:
                    return f"no trainer has come back within {self.idle_s:g} s"
                connection, _ = self._listener.accept()
                said = self._with(Lines(connection))
                if said is None:
                    continue  # no trainer of ours
                if said:
                    return said
                deadline = time.monotonic() + self.idle_s
        finally:
            self._card.unlink(missing_ok=True)
            self._listener.close()
            for process in self.processes:
                process.close()

    def _with(self, lines: Lines) -> str | None:
        """Do what one trainer says, to its end. Returns why the host should end; empty if it should not; None for a stranger."""
        try:
            if lines.one(GREETING_S) != {"secret": self._secret}:
                raise PermissionError("that is not the secret of the card")
            lines.send({"urls": [process.url for process in self.processes]})
        except OSError:
            lines.close()
            return None
        heard, asked = time.monotonic(), 0
        try:
            while True:
                lines.send(self._state())
                ready = select.select([self._asked], [], [], 0)[0]
                if ready:
                    asked += len(os.read(self._asked, 64))
                if asked > 1:
                    return "it was asked to end twice"
                got = lines.receive(BEAT_S)
                heard = time.monotonic() if got else heard
                if time.monotonic() - heard > SILENCE_S:
                    raise TimeoutError("the trainer is silent")
                for said in got:
                    if said.get("do") == "end":
                        return "the trainer has ended"
                    self._do(lines, said)
        except OSError:
            return "it was asked to end" if asked else ""
        finally:
            for process in self.processes:
                process.stop()
            lines.close()  # a trainer that said goodbye waits for this

    def _do(self, lines: Lines, said: dict[str, Any]) -> None:
        if said["do"] == "beat":
            return
        process = self.processes[said["server"]]
        if said["do"] == "start":
            process.start(Path(said["model"]))
        elif said["do"] == "stop":
            process.stop()
        lines.send({"done": said["number"], **self._state()})

    def _state(self) -> dict[str, Any]:
        running = [process.running for process in self.processes]
        words = [
            process.last_words() if process.starts and not runs else ""
            for process, runs in zip(self.processes, running, strict=True)
        ]
        return {"running": running, "words": words}


class Link:
    """The trainer's connection to one host. Its methods may be called from several threads.

    Args:
        name: of the host, for messages.
    """

    def __init__(self, lines: Lines, urls: Sequence[str], name: str) -> None:
        self.urls, self.name = list(urls), name
        self.running, self.words = [False] * len(urls), [""] * len(urls)
        self.gone = ""  # why the host cannot be asked any more
        self._lines = lines
        self._done: set[int] = set()
        self._numbers = iter(range(2**62))
        self._news = threading.Condition()
        self._thread = threading.Thread(target=self._listen, name=f"host-{name}", daemon=True)
        self._thread.start()

    def ask(self, do: str, server: int, model: str = "", timeout: float = 60.0) -> None:
        """Have it done; returns when it is, or when the host is gone."""
        with self._news:
            number = next(self._numbers)
            if self.gone:
                return
            try:
                self._lines.send({"do": do, "server": server, "model": model, "number": number})
            except OSError as error:
                self.leave(str(error))
                return
            if not self._news.wait_for(lambda: number in self._done or self.gone, timeout):
                self.leave(f"it did not {do} a server within {timeout:g} s")
            self._done.discard(number)

    def end(self) -> None:
        """Say goodbye: the host ends with its servers."""
        with self._news:
            if not self.gone:
                with contextlib.suppress(OSError):
                    self._lines.send({"do": "end"})
                self._news.wait_for(lambda: self.gone, 30.0)  # it ends them first
                self.leave("the run has ended")

    def leave(self, why: str) -> None:
        """End the connection without a goodbye: the host ends its servers, and waits for another trainer."""
        with self._news:
            if not self.gone:
                self.gone = why
                self.running = [False] * len(self.urls)
                self._lines.close()
            self._news.notify_all()

    def _listen(self) -> None:
        heard = beaten = time.monotonic()
        try:
            while not self.gone:
                got = self._lines.receive(BEAT_S)
                now = time.monotonic()
                heard = now if got else heard
                if now - heard > SILENCE_S:
                    raise TimeoutError(f"it was silent for {SILENCE_S:g} s")
                if now - beaten > BEAT_S:
                    self._lines.send({"do": "beat"})
                    beaten = now
                with self._news:
                    for said in got:
                        self.running, self.words = said["running"], said["words"]
                        if "done" in said:
                            self._done.add(said["done"])
                    self._news.notify_all()
        except (OSError, ValueError) as error:  # ValueError: closed by another thread
            self.leave(str(error))


class RemoteProcess:
    """One server of a host, as the pool sees a process (`launch.ServerProcess`)."""

    def __init__(self, link: Link, number: int) -> None:
        self.link, self.number = link, number
        self.starts = 0
        self.started_at = float("-inf")
        self.prepared = False

    def start(self, model: Path) -> None:
        """Start it with the model in a folder that the host sees, too."""
        self.starts += 1
        self.started_at, self.prepared = time.monotonic(), False
        self.link.ask("start", self.number, str(model.resolve()))

    @property
    def url(self) -> str:
        return self.link.urls[self.number]

    @property
    def running(self) -> bool:
        return not self.link.gone and self.link.running[self.number]

    def stop(self) -> None:
        """End it and wait for that."""
        self.link.ask("stop", self.number)

    def close(self, *, well: bool = True) -> None:
        """End it for good, and its host with it; not `well`: the host stays, for a run that is started again."""
        if well:
            self.link.end()
        else:
            self.link.leave("the run has ended with an error")

    def last_words(self) -> str:
        """Why it does not run."""
        if self.link.gone:
            return f"its host {self.link.name} is gone: {self.link.gone}"
        return f"on host {self.link.name}: {self.link.words[self.number] or 'it said nothing'}"


def find_hosts(folder: Path, hosts: int, count: int, timeout_s: float) -> list[Link]:
    """Connections to the hosts of a run, as soon as all of them are there.

    Args:
        folder: where their cards are.
        count: servers that each has.

    Raises:
        RolloutError: they did not come in time, or have other servers than the run's settings say.
    """
    links: dict[str, Link] = {}
    deadline = time.monotonic() + timeout_s
    try:
        while len(links) < hosts:
            for card in sorted(folder.glob(_CARDS)):
                known = card.name in links and not links[card.name].gone
                if len(links) < hosts and not known and (link := _greet(card)) is not None:
                    links[card.name] = link
            links = {name: link for name, link in links.items() if not link.gone}
            if time.monotonic() > deadline:
                there = ", ".join(link.name for link in links.values()) or "none"
                raise RolloutError(
                    f"rollout.server.hosts={hosts}: after {timeout_s:g} s (rollout.server.startup_minutes) these hosts of servers "
                    f"have come to {folder}: {there}. Start the others (python -m megatron_vp2o.serve), and look into their logs"
                )
            if len(links) < hosts:
                time.sleep(0.25)
        for link in links.values():
            if len(link.urls) != count:
                raise RolloutError(
                    f"host {link.name} has {len(link.urls)} servers, and rollout.server.count={count}: start it with the run's "
                    "settings"
                )
    except RolloutError:
        for link in links.values():
            link.leave("the run did not start")
        raise
    return [links[name] for name in sorted(links)]


def _greet(card: Path) -> Link | None:
    """A connection to the host of a card; None where none answers there (any more), or another trainer has it."""
    connection: socket.socket | None = None
    try:
        said = json.loads(card.read_text(encoding="utf-8"))
        connection = socket.create_connection((said["address"], said["port"]), timeout=GREETING_S)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        lines = Lines(connection)
        lines.send({"secret": said["secret"]})
        urls = lines.one(GREETING_S)["urls"]
    except (OSError, ValueError, KeyError, TypeError):
        if connection is not None:
            connection.close()
        return None
    return Link(lines, urls, card.stem.removeprefix("host-"))


def end_with_signals(host: Host) -> None:
    """SIGTERM and SIGINT ask the host to end. SIGUSR1, by which Slurm asks the ranks of a job to save, is nothing to it."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: host.ask_to_end())
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
