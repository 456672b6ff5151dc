"""After a refresh: does the engine report the learner's version and checksum?"""

from __future__ import annotations

import torch

from megatron_vp2o.core.deferred import read
from megatron_vp2o.errors import SyncError
from megatron_vp2o.parallel.groups import Groups, gather_rows
from megatron_vp2o.rl.interfaces import Policy, RolloutEngine


def verify_sync(policy: Policy, engine: RolloutEngine, version: int, groups: Groups) -> None:
    """Compare version and checksum of what the learner has and the engine reports. Collective.

    Raises:
        SyncError: on all ranks, naming both, if they differ on any.
    """
    have, hold = read(policy.checksum(), engine.checksum())
    told = torch.tensor([[have, hold, version, engine.version]], dtype=torch.int64)
    if groups.world_size > 1:  # alone, there is nothing to wait for
        told = gather_rows(told.to(groups.device, non_blocking=True), groups.world)
    for rank, (learner, actor, wanted, reported) in enumerate(told.tolist()):
        if learner != actor or wanted != reported:
            raise SyncError(
                f"the rollout engine of rank {rank} did not take the weights of version {wanted}: it reports version {reported} "
                f"with checksum {actor & _MASK:016x}, and the learner has {learner & _MASK:016x}; rollouts would come from other "
                "weights than the run believes. Check the engine's log, and start again from the last checkpoint"
            )


_MASK = 2**64 - 1
