"""Releases of the hosts that the plug-ins were tested with."""

from __future__ import annotations

import functools
import logging
from importlib.metadata import PackageNotFoundError, version

TESTED: dict[str, tuple[str, ...]] = {"verl": ("0.9.1",), "megatron-core": ("0.16.1", "0.19.2")}
"""Distribution: releases. slime has none; its snapshot of 2026-08-21 was tried."""

logger = logging.getLogger(__name__)


@functools.cache
def warn_if_untested(distribution: str) -> str | None:
    """Warn, once in a process, if the installed release is none that was tested. Returns the warning."""
    try:
        found = version(distribution)
    except PackageNotFoundError:
        found = "of unknown version"
    if found in TESTED[distribution]:
        return None
    message = (
        f"megatron-vp2o was tested with {distribution} {' and '.join(TESTED[distribution])}, and this is {found}: "
        "compare a short run with the plug-in off and on before you trust it"
    )
    logger.warning(message)
    return message
