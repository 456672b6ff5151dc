"""How long and how often a pool of servers does what it does."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_vp2o.rollout.pulse import EVERY_S


@dataclass(frozen=True)
class PoolSettings:
    """How long and how often (docs/configuration.md has each under rollout.server)."""

    in_flight: int = 64  # prompts at once to each server
    attempts: int = 8  # tries of one prompt
    request_timeout_s: float = 120.0
    batch_timeout_s: float = 1800.0
    sync_timeout_s: float = 300.0
    startup_s: float = 600.0
    poll_s: float = 0.25  # between looks at processes, and the first wait of a back-off
    patience_s: float = 5.0  # the longest wait of a back-off
    silence_s: float = 30.0  # of looks at a server's health, after which it is taken for dead
    look_s: float = EVERY_S  # between such looks
    in_flight_updates: bool = (
        False  # new weights may come while servers generate, and requests in flight go on with them
    )
