"""The sandboxes that work on this machine, for tests to run in."""

from __future__ import annotations

import functools
import os
import warnings

import pytest

from megatron_vp2o.config.reward import SandboxKind
from megatron_vp2o.errors import RewardError
from megatron_vp2o.rewards.sandbox import Sandbox, open_sandbox


@functools.cache
def _opened(kind: SandboxKind) -> Sandbox | str:
    try:
        return open_sandbox(kind)
    except RewardError as error:
        return str(error)


def sandbox_or_skip(kind: SandboxKind = SandboxKind.bubblewrap) -> Sandbox:
    """That sandbox; the test is skipped, loudly, where it does not work. In CI bubblewrap must work."""
    found = _opened(kind)
    if isinstance(found, str):
        if kind is SandboxKind.bubblewrap:
            assert not os.environ.get("CI"), f"CI must test the sandbox: {found}"
            warnings.warn(f"NO SANDBOX, so nothing of it is tested: {found}", stacklevel=2)
        pytest.skip(found)
    return found
