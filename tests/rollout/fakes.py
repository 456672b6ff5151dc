"""Pools of fake servers: real processes that speak the client's protocol, with a model small enough to know by heart."""

from __future__ import annotations

import itertools
import json
import sys
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_vp2o.rollout.answers import RoutesAsked
from megatron_vp2o.rollout.board import Board
from megatron_vp2o.rollout.launch import ServerProcess, free_port
from megatron_vp2o.rollout.members import Member
from megatron_vp2o.rollout.pool import ServerPool
from megatron_vp2o.rollout.pool_settings import PoolSettings
from megatron_vp2o.rollout.protocol import Probe
from megatron_vp2o.rollout.transfer import BroadcastTransfer

FAKE = Path(__file__).with_name("fake_server.py")
VOCABULARY, END, PAD = 24, 1, 0
QUICK = {"request_timeout_s": 2.0, "sync_timeout_s": 10.0, "startup_s": 30.0, "batch_timeout_s": 60.0, "poll_s": 0.05}


def table(model: int) -> dict[str, Tensor]:
    """Weights of one of two models, in nine tensors."""
    generator = torch.Generator().manual_seed(model)
    rows = 1.5 * torch.randn(VOCABULARY, VOCABULARY, generator=generator)
    parts = {f"rows.{number}": part.clone() for number, part in enumerate(rows.chunk(8))}
    return parts | {"bias": 0.1 * torch.randn(VOCABULARY, generator=generator)}


class FakeHarness:
    """A pool whose servers it starts. With `fixed` a prompt always gets the same samples of the same weights; with `routes` answers
    have them, of all layers of a model of `layers`. A token takes `token_s`. `broadcast`: weights come by it, one or two tensors
    at once."""

    vocabulary, end, tolerance = VOCABULARY, END, 1e-5

    def __init__(
        self,
        folder: Path,
        servers: int = 1,
        settings: dict[str, Any] | None = None,
        board: Board | None = None,
        fixed: bool = False,
        routes: RoutesAsked | None = None,
        layers: int = 0,
        token_s: float = 0.0,
        broadcast: bool = False,
    ) -> None:
        def command(model: Path, port: int) -> list[str]:
            return [sys.executable, str(FAKE), str(model), str(port)]

        environment = {"VP2O_FAKE_TOKEN_S": str(token_s)} | ({"VP2O_FAKE_FIXED": "1"} if fixed else {})
        if broadcast:
            environment["VP2O_FAKE_BROADCAST"] = "1"
        if routes is not None:
            environment["VP2O_FAKE_ROUTES"] = f"{layers} {routes.experts} {routes.topk}"
        logs = [folder / f"server{number}.log" for number in range(servers)]
        processes = [ServerProcess(command, environment, free_port(), log) for log in logs]
        self.processes = processes
        members = [Member(process.url, process) for process in processes]
        self.engine = make_pool(members, folder, settings, board=board, routes=routes, broadcast=broadcast)

    def weights(self, model: int) -> Iterator[tuple[str, Tensor]]:
        yield from table(model).items()

    def log_probs(self, model: int, tokens: Sequence[int], temperature: float) -> list[float]:
        parts = table(model)
        rows = torch.cat([parts[f"rows.{number}"] for number in range(8)]).double()
        logp = ((rows + parts["bias"]) / temperature).log_softmax(-1)
        return [float(logp[before, token]) for before, token in itertools.pairwise(tokens)]

    def probe(self, model: int) -> Probe:
        tokens = [[5, 6, 7, 9, 11], [8, 3, 2]]
        return Probe(tokens, [self.log_probs(model, row, 1.0) for row in tokens], self.tolerance)

    def arm(self, server: int, kind: str, **more: Any) -> None:
        """A fault of one server."""
        post(f"{self.engine.members[server].url}/fault", {"kind": kind, **more})


def make_pool(
    members: list[Member],
    folder: Path,
    settings: dict[str, Any] | None = None,
    broadcast: bool = False,
    **more: Any,
) -> ServerPool:
    """A pool for the fake model."""
    timing = PoolSettings(**(QUICK | (settings or {})))
    if broadcast:
        more["transfer"] = BroadcastTransfer(torch.device("cpu"), timeout_s=timing.sync_timeout_s, bucket_bytes=500)
    return ServerPool(
        members,
        shapes={name: tuple(tensor.shape) for name, tensor in table(0).items()},
        describe=lambda where: (where / "config.json").write_text("{}"),
        folder=folder / "weights",
        ends=[END],
        vocabulary=VOCABULARY,
        pad_id=PAD,
        settings=timing,
        **more,
    )


def post(url: str, body: Any) -> Any:
    """POST as a person would."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        return json.loads(answer.read())
