"""Devices, and what the planner takes for granted. Every number can be overridden (`--assume name=value`)."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from dataclasses import dataclass

from megatron_vp2o.errors import ConfigError

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """One accelerator and its links, from vendors' data sheets.

    Attributes:
        usable_gib: what a process can allocate of its memory.
        tflops: peak of dense bfloat16 products.
        memory_gbs: bandwidth of its memory, GB/s.
        link_gbs: to a device of the same node, one direction, GB/s.
        network_gbs: its share of the node's network, one direction, GB/s.
        per_node: devices of a node.
    """

    usable_gib: float
    tflops: float
    memory_gbs: float
    link_gbs: float
    network_gbs: float
    per_node: int = 8


DEVICES = {
    "a100": Device(79, 312, 2039, 300, 25),
    "h100": Device(79, 989, 3350, 450, 50),
    "h200": Device(139, 989, 4800, 450, 50),
}


def hardware_of(recipe: str) -> tuple[int, str]:
    """GPUs and device that a recipe's name asks for (`..._64xh100`); one H100 where it names none."""
    found = re.search(r"_(\d+)x([a-z]+\d+)$", recipe)
    return (int(found[1]), found[2]) if found else (1, "h100")


@dataclass(frozen=True)
class Assumptions:
    """What no setting says. None of the speeds was measured on a GPU.

    Attributes:
        mfu: share of the peak that matrix products of a forward and backward pass reach.
        memory_efficiency: share of the memory bandwidth that decoding and copying reach.
        network_efficiency: share of the links' bandwidth that collectives reach.
        dp_overlap: share of gradient and parameter traffic that hides behind computing, where overlap is on.
        launch_us: microseconds that one layer of one decoded token takes at least (kernel launches, small collectives).
        prompt_tokens: of a prompt.
        response_share: length of a mean response over the longest allowed.
        imbalance: tokens of the busiest expert rank over the mean.
        reserve_gib: CUDA and NCCL contexts, and workspaces of libraries.
        fragmentation: share of what is allocated that the allocator loses.
        logits_bytes: bytes that one logit costs at the peak beside itself, where logits are not taken in chunks (four float32).
        server_share: what a rollout server takes of a GPU's memory (vLLM's gpu_memory_utilization, 0.92 by default).
        server_workspace_gib: what it needs of that beside weights and cache.
        server_launch_us: microseconds that one layer of one decoded token takes at least on a server, which replays graphs.
        file_gbs: GB/s at which one process writes and hashes files of weights, or reads, hashes and loads them.
        broadcast_gbs: GB/s at which the first rank takes weights into its memory, and at which it sends to all servers together.
    """

    mfu: float = 0.3
    memory_efficiency: float = 0.6
    network_efficiency: float = 0.7
    dp_overlap: float = 0.8
    launch_us: float = 150.0
    prompt_tokens: float = 32.0
    response_share: float = 1.0
    imbalance: float = 1.3
    reserve_gib: float = 3.0
    fragmentation: float = 0.05
    logits_bytes: float = 16.0
    server_share: float = 0.92
    server_workspace_gib: float = 4.0
    server_launch_us: float = 50.0
    file_gbs: float = 0.5
    broadcast_gbs: float = 2.0

    def override(self, words: Iterable[str]) -> Assumptions:
        """With `name=value` words applied. Raises ConfigError for a name that is none, or a value that is no number."""
        names = [field.name for field in dataclasses.fields(self)]
        changes = {}
        for word in words:
            name, _, value = word.partition("=")
            if name not in names:
                raise ConfigError(f"--assume {word}: {name} is not assumed; there are: {', '.join(names)}")
            try:
                changes[name] = float(value)
            except ValueError:
                raise ConfigError(f"--assume {word}: {value!r} is not a number") from None
            if not changes[name] >= 0:
                raise ConfigError(f"--assume {word}: choose at least 0")
        return dataclasses.replace(self, **changes)
