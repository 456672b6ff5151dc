"""What the ranks of a run tell each other about servers: the first rank, which owns them, and those that only ask them.

A rank that only asks cannot restart a server that answers it badly, and the owner may have seen nothing of that. So it complains,
and waits for the owner to mend the server or to give it up. Everything is said of one version's label and one mend of a
server, so that a complaint about a server before its restart does not restart it again. Nothing is read while all goes well,
but for the owner's look for complaints, which stays on its own machine.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from megatron_vp2o.parallel.groups import Groups, first_rank_says, speaks_for_replica


@dataclass(frozen=True)
class News:
    """What the owner says of a server."""

    mends: int = 0  # times that it was brought back since the update
    lost: str = ""  # why it is not used any more; empty: it is


class Board:
    """Notes in a store that several processes reach; every call returns at once."""

    def __init__(self, store: dist.Store) -> None:
        self.store = store

    def complain(self, label: str, server: int, mends: int, why: str) -> None:
        """By a rank that only asks: the server, after that many mends, answered badly several times."""
        self.store.set(f"complaint/{label}/{server}/{mends}", why or "?")

    def complaint(self, label: str, server: int, mends: int) -> str:
        """For the owner: what was complained of; empty if nothing."""
        return self._read(f"complaint/{label}/{server}/{mends}")

    def tell(self, label: str, server: int, news: News) -> None:
        """By the owner."""
        self.store.set(f"news/{label}/{server}", json.dumps([news.mends, news.lost]))

    def news(self, label: str, server: int) -> News:
        """For ranks that only ask."""
        said = self._read(f"news/{label}/{server}")
        return News(*json.loads(said)) if said else News()

    def _read(self, key: str) -> str:
        return self.store.get(key).decode() if self.store.check([key]) else ""


def meet(groups: Groups) -> Board | None:
    """The board of a run whose replicas ask servers; None on ranks that ask none, and where only one does. Collective."""
    if groups.dp.size() == 1:
        return None
    host, patience = os.environ.get("MASTER_ADDR", "127.0.0.1"), timedelta(seconds=60)
    first = groups.rank == 0
    store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=patience) if first else None
    port = first_rank_says(store.port if store is not None else 0, groups.world)
    if store is None and speaks_for_replica(groups):
        store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=patience)
    return None if store is None else Board(store)
