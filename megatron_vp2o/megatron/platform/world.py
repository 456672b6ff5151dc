"""Start and end of the distributed world: torch.distributed, Megatron's process groups, seeds, and the bundle of groups."""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megatron_vp2o.config.schema import ParallelConfig
from megatron_vp2o.cores import local_size, share_of_cores
from megatron_vp2o.parallel import failure
from megatron_vp2o.parallel.groups import Groups


def set_threads(threads: int | None) -> None:
    """CPU threads of this process: as told, else the cores that it may use, divided among the processes of this node."""
    torch.set_num_threads(share_of_cores(local_size()) if threads is None else threads)


def environment_rank() -> int:
    """This process's rank, as its launcher says, before there is a process group."""
    return int(os.environ.get("RANK", "0"))


def start(parallel: ParallelConfig, seed: int) -> Groups:
    """Join the world that torchrun (or nothing: one process) describes and build Megatron's groups in it."""
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "127.0.0.1")):
        os.environ.setdefault(name, value)
    os.environ.setdefault("MASTER_PORT", "0" if os.environ["WORLD_SIZE"] == "1" else "29500")
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # cuDNN plans anew for every shape, and micro-batches are trimmed to their own lengths.
        torch.backends.cuda.enable_cudnn_sdp(False)
    timeout = timedelta(minutes=parallel.timeout_minutes)
    if not dist.is_initialized():
        store = failure.join(timedelta(minutes=parallel.startup_minutes))
        if store is not None:
            store.set_timeout(timeout)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo",
            store=None if store is None else dist.PrefixStore("default_pg", store),
            rank=int(os.environ["RANK"]),
            world_size=int(os.environ["WORLD_SIZE"]),
            timeout=timeout,
        )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_parallel,
        pipeline_model_parallel_size=parallel.pipeline_parallel,
        context_parallel_size=parallel.context_parallel,
        expert_model_parallel_size=parallel.expert_parallel,
        expert_tensor_parallel_size=parallel.expert_tensor_parallel,
        distributed_timeout_minutes=parallel.timeout_minutes,
    )
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)
    return current_groups(timeout)


@contextmanager
def joined(parallel: ParallelConfig, seed: int) -> Iterator[Groups]:
    """`start` before the body and `stop` after it.

    An exception leaves a world of several ranks as it is: closing it would wait for the others, who wait for this one. They are
    told, and the process is to end with the exception.
    """
    with failure.tells_all_ranks():
        groups = start(parallel, seed)
        try:
            yield groups
        except BaseException:
            if groups.world_size == 1:
                stop()
            raise
        stop()


def own_device() -> torch.device:
    """Where this process computes: its GPU, on a machine without CUDA the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def current_groups(timeout: timedelta | None = None) -> Groups:
    """The groups of a world whose model parallelism Megatron has initialised, here or in somebody else's loop.

    Args:
        timeout: of collectives, for groups that are made later; None: torch's default.
    """
    assert dist.group.WORLD is not None
    return Groups(
        world=dist.group.WORLD,
        tp=parallel_state.get_tensor_model_parallel_group(),
        pp=parallel_state.get_pipeline_model_parallel_group(),
        dp=parallel_state.get_data_parallel_group(),
        cp=parallel_state.get_context_parallel_group(),
        ep=parallel_state.get_expert_model_parallel_group(),
        etp=parallel_state.get_expert_tensor_parallel_group(),
        expert_dp=parallel_state.get_expert_data_parallel_group(),
        stage=parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True),
        device=own_device(),
        timeout=timeout,
    )


def stop_model_parallel() -> None:
    """Give up all groups but the world, so that `start` can build others in it. A collective.

    Megatron forgets its groups without closing them, and each of gloo's keeps threads that wake a hundred times a second.
    """
    if not parallel_state.model_parallel_is_initialized():
        return
    parallel_state.destroy_model_parallel()
    dist.barrier()  # nobody closes what another rank still reads from
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)
    gc.collect()  # models that are no longer used hold groups, and themselves by cycles


def stop() -> None:
    """Leave the world, so that the process ends without warnings and another world can start. A collective: not for a rank that
    ends by an exception, which the others don't know of (see `joined`)."""
    stop_model_parallel()
    failure.leave()
    if dist.is_initialized():
        dist.destroy_process_group()
