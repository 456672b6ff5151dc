"""Settings of a launch, as dataclasses: where and how the ranks of a run are started (group `executor`, conf/executor/).

A docstring under a field is its documentation; the tables of docs/launching.md are made from them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any, Optional

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING


@dataclass
class ExecutorSettings:
    """One process on this machine. Where the command line is all that is needed, `megatron_vp2o.train` does the same."""

    workdir: Optional[str] = None
    """Folder that the run starts in, and that its relative paths (`run_dir`, `init_from`) start from; null: this one."""
    python: Optional[str] = None
    """Python interpreter of the run; null: the one that launches, and in a container the image's `python`."""
    log_dir: Optional[str] = None
    """Folder for NeMo-Run's records, scripts and logs; null: NeMo-Run's own ($NEMORUN_HOME, else ~/.nemo_run)."""
    environment: dict[str, str] = field(default_factory=dict)
    """Further environment variables, `executor.environment={NCCL_DEBUG: INFO}`; passed on as they are, nothing is expanded."""


@dataclass
class TorchrunSettings(ExecutorSettings):
    """Several processes on this machine, under torchrun."""

    ranks_per_node: int = 1
    """Processes: one for each GPU, or on a CPU as many as the layout asks for."""
    max_restarts: int = 0
    """How often torchrun starts all ranks again, from the last checkpoint, after one of them has died."""


SPLIT, NODES, JOB = "split", "nodes", "job"
"""Values of `executor.servers`."""


@dataclass
class SlurmSettings(TorchrunSettings):
    """A Slurm job: one torchrun agent on each of its nodes."""

    nodes: int = 1
    """Nodes of the job."""
    max_restarts: int = 3
    """How often torchrun starts all ranks again, from the last checkpoint, after one of them has died."""
    account: Optional[str] = None
    """Account that is charged; null: the user's default, if the cluster has one."""
    partition: Optional[str] = None
    """Partition; null: the cluster's default."""
    time: str = "01:00:00"
    """Time limit of one start of the job, [DAYS-]HOURS:MINUTES:SECONDS. A run may take longer: see `requeue`."""
    qos: Optional[str] = None
    """Quality of service."""
    gpus_per_node: Optional[int] = None
    """GPUs to ask for on each node; null asks for none."""
    cpus_per_node: Optional[int] = None
    """CPUs to ask for on each node; null: what Slurm gives to a single task, on most clusters one."""
    memory: Optional[str] = None
    """Memory to ask for on each node, as `200G`; 0 is all of it."""
    exclusive: bool = False
    """Share the nodes with no other job."""
    container_image: Optional[str] = None
    """Image to run in (needs Pyxis): a .sqsh file, or the address of one in a registry."""
    container_mounts: list[str] = field(default_factory=list)
    """Folders that the container sees, each `SOURCE:TARGET` or `SOURCE:TARGET:FLAGS`. `workdir` is always mounted."""
    requeue: bool = True
    """Queue the job again when it was stopped by SIGUSR1 or SIGTERM (time limit, preemption, `scancel --signal=USR1`)."""
    signal_lead_s: int = 300
    """Seconds before the time limit at which Slurm asks the run to stop: enough for one step, an evaluation and saving."""
    retries: int = 0
    """How often a failed job is queued again (every earlier start counts, whatever it was for)."""
    rendezvous_port: int = 29500
    """Port on the first node at which torchrun's agents meet; further jobs of the same launch take the following ones."""
    servers: Optional[str] = None
    """Where the rollout servers of a recipe with rollout.launch=true are: `split`, on each node of the run, on the GPUs that ranks
    leave; `nodes`, on further nodes of the same job; `job`, in a job of their own. null: beside the first rank, with one node."""
    server_nodes: int = 1
    """Nodes for servers, with servers=nodes or servers=job; each has `rollout.server.count` servers."""
    server_container_image: Optional[str] = None
    """Image that servers run in, with vLLM; null: that of the run."""
    setup: list[str] = field(default_factory=list)
    """Shell lines of the batch script before the run starts, as `module load cuda`."""
    sbatch_args: dict[str, str] = field(default_factory=dict)
    """Further sbatch options, `executor.sbatch_args={constraint: h100, reservation: mine}`."""
    srun_args: list[str] = field(default_factory=list)
    """Further srun options, `executor.srun_args=['--mpi=none']`."""


def job_nodes(executor: SlurmSettings) -> int:
    """Nodes of a run's job."""
    return executor.nodes + (executor.server_nodes if executor.servers == NODES else 0)


@dataclass
class LaunchSettings:
    """What the launcher itself understands; every other KEY=VALUE goes to the runs."""

    executor: ExecutorSettings = field(default_factory=ExecutorSettings)
    """local | torchrun | slurm."""
    seeds: list[int] = field(default_factory=list)
    """One run for each seed, side by side: NAME_seed1, NAME_seed2, ..."""
    stages: Any = None
    """Recipes (and shell commands, in quotes) to run one after the other, or `auto`: those that `init_from` leads back to."""


@cache
def register() -> None:
    """Tell Hydra of the dataclasses; conf/executor/*.yaml build on them."""
    store = ConfigStore.instance()
    store.store(name="launch_settings", node=LaunchSettings(executor=MISSING))
    for name, node in (("local", ExecutorSettings), ("torchrun", TorchrunSettings), ("slurm", SlurmSettings)):
        store.store(group="executor", name=f"{name}_settings", node=node)
    # Which executor it is, and the lists of a launch, are overrides on this.
    store.store(name="launch", node={"defaults": ["launch_settings", {"executor": "local"}, "_self_"]})
