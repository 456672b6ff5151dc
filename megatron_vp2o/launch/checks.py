"""What would fail on the cluster, said before anything is submitted."""

from __future__ import annotations

import difflib
import getpass
import importlib.util
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from megatron_vp2o.errors import ConfigError
from megatron_vp2o.launch.settings import (
    JOB,
    NODES,
    SPLIT,
    ExecutorSettings,
    SlurmSettings,
    TorchrunSettings,
    job_nodes,
)

_TIME = re.compile(r"(?:(\d+)-)?(\d+):([0-5]\d):([0-5]\d)")
_ENVIRONMENT = re.compile(r"[A-Za-z_]\w*")
_QUERY_S = 30.0


def check(executor: ExecutorSettings, *, submit: bool) -> None:
    """Refuse an executor that cannot work. Call before `make_jobs`, which starts from `workdir`.

    Args:
        submit: whether a Slurm must be here and know the partition and the account (false for a dry run).

    Raises:
        ConfigError: everything that is wrong, one line each.
    """
    problems = list(_settings(executor))
    if isinstance(executor, SlurmSettings):
        problems += [*_slurm(executor), *_container(executor)]
        if submit:
            problems += _cluster(executor)
    if importlib.util.find_spec("nemo_run") is None:
        problems.append(
            "nemo-run is not installed, and the launcher submits through it: pip install 'megatron-vp2o[nemo]'"
        )
    if problems:
        raise ConfigError("\n".join(problems))


def seconds(time: str) -> int | None:
    """Seconds of a Slurm time limit, [DAYS-]HOURS:MINUTES:SECONDS; None for something else."""
    match = _TIME.fullmatch(time)
    if match is None:
        return None
    days, hours, minutes, rest = (int(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + rest


def _settings(executor: ExecutorSettings) -> Iterator[str]:
    if executor.workdir is not None and not Path(executor.workdir).is_dir():
        yield f"executor.workdir={executor.workdir} is not a folder: name the one that the run is to start in"
    in_container = isinstance(executor, SlurmSettings) and executor.container_image is not None
    if executor.python is not None and not in_container and shutil.which(executor.python) is None:
        yield f"executor.python={executor.python} is no program: name a Python interpreter, or null for this one"
    for name in executor.environment:
        if not _ENVIRONMENT.fullmatch(name):
            yield f"executor.environment has {name!r}, which is no name of a variable: letters, digits and _ only"
    if isinstance(executor, TorchrunSettings):
        yield from _at_least(executor, 1, "ranks_per_node")
        yield from _at_least(executor, 0, "max_restarts")


def _at_least(executor: ExecutorSettings, low: int, *names: str) -> Iterator[str]:
    for name in names:
        value = getattr(executor, name)
        if value is not None and value < low:
            yield f"executor.{name}={value} must be at least {low}"


def _slurm(executor: SlurmSettings) -> Iterator[str]:
    yield from _at_least(executor, 1, "nodes", "gpus_per_node", "cpus_per_node", "server_nodes")
    yield from _at_least(executor, 0, "retries", "signal_lead_s")
    if not 1024 <= executor.rendezvous_port <= 65000:
        yield f"executor.rendezvous_port={executor.rendezvous_port} must be between 1024 and 65000"
    if executor.gpus_per_node is not None and executor.ranks_per_node > executor.gpus_per_node:
        yield (
            f"executor.ranks_per_node={executor.ranks_per_node} exceeds executor.gpus_per_node={executor.gpus_per_node}: "
            "a rank needs a GPU of its own"
        )
    if executor.servers == "colocated":
        yield (
            "executor.servers=colocated: servers that share GPUs with ranks would have to give them back for each training step "
            "(vLLM's sleep mode), which vLLM has on GPUs only and nobody has tried here: choose split, nodes or job"
        )
    elif executor.servers not in (None, SPLIT, NODES, JOB):
        yield f"executor.servers={executor.servers} is none of {SPLIT}, {NODES}, {JOB} and null: choose one"
    limit = seconds(executor.time)
    if limit is None:
        yield f"executor.time={executor.time} is no time limit: write [DAYS-]HOURS:MINUTES:SECONDS, as 04:00:00"
    elif executor.signal_lead_s >= limit:
        yield (
            f"executor.signal_lead_s={executor.signal_lead_s} is not below the {limit} s of executor.time={executor.time}: "
            "the run would be asked to stop when it starts"
        )


def _container(executor: SlurmSettings) -> Iterator[str]:
    image = executor.container_image
    if image is None:
        if executor.container_mounts:
            yield f"executor.container_mounts={executor.container_mounts} without a container: set executor.container_image"
        return
    # A path is told from an address in a registry (nvcr.io/nvidia/nemo:25.04, docker://...) by how it begins or ends.
    if image.startswith(("/", "./", "../", "~")) or image.endswith(".sqsh"):
        path = Path(image).expanduser()
        if not path.is_file():
            yield f"executor.container_image={image}: there is no such file; correct the path, or name an image of a registry"
    for mount in executor.container_mounts:
        source, _, target = mount.partition(":")
        if not source or not target:
            yield f"executor.container_mounts has {mount!r}: write SOURCE:TARGET"
        elif not Path(source).exists():
            yield f"executor.container_mounts has {mount!r}, and {source} does not exist here: correct the source"


def _cluster(executor: SlurmSettings) -> Iterator[str]:
    if shutil.which("sbatch") is None:
        yield (
            "executor=slurm: there is no sbatch on this machine, so no Slurm to submit to: launch from a login node of the "
            "cluster, print the script with --dryrun, or use executor=torchrun"
        )
        return
    found = _ask("sinfo", "--noheader", "--format=%R %D")
    if found is None:
        yield "executor=slurm: sinfo gets no answer, so no Slurm controller can be reached from this machine"
        return
    most = max(job_nodes(executor), executor.server_nodes if executor.servers == JOB else 0)
    what = f"executor.nodes={executor.nodes}"
    if most > executor.nodes:
        what += f" with executor.server_nodes={executor.server_nodes}"
    sizes: dict[str, int] = {}
    for name, nodes in (line.split() for line in found.splitlines() if line.strip()):
        sizes[name] = sizes.get(name, 0) + int(nodes)
    if executor.partition is not None:
        if executor.partition not in sizes:
            near = difflib.get_close_matches(executor.partition, sizes, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(sorted(sizes))}"
            yield f"executor.partition={executor.partition}: this cluster has no such partition; {hint}"
        elif most > sizes[executor.partition]:
            yield (
                f"{what} exceeds the {sizes[executor.partition]} nodes of "
                f"executor.partition={executor.partition}: ask for fewer"
            )
    elif most > max(sizes.values(), default=0):
        yield f"{what} exceeds the nodes of every partition ({sizes}): ask for fewer"
    yield from _account(executor)
    if executor.container_image is not None and "--container-image" not in (_ask("srun", "--help") or ""):
        yield (
            f"executor.container_image={executor.container_image}: this cluster's srun has no --container-image, so Pyxis is "
            "not installed: ask for it, or run without a container"
        )


def _account(executor: SlurmSettings) -> Iterator[str]:
    """Where the cluster's accounting wants one, an account that the user has."""
    settings = _ask("scontrol", "show", "config") or ""
    enforced = re.search(r"^AccountingStorageEnforce\s*=\s*(.*)$", settings, re.MULTILINE)
    if enforced is None or not {"associations", "limits", "qos", "safe"} & set(enforced[1].strip().split(",")):
        return
    user = getpass.getuser()
    listed = _ask("sacctmgr", "-nP", "show", "assoc", f"user={user}", "format=account")
    if listed is None:
        return  # then sbatch decides
    accounts = sorted({line.strip() for line in listed.splitlines()} - {""})
    if executor.account is not None:
        if executor.account not in accounts:
            yield f"executor.account={executor.account} is none of the accounts of {user}: {', '.join(accounts) or '(none)'}"
    elif not (_ask("sacctmgr", "-nP", "show", "user", user, "format=defaultaccount") or "").strip():
        yield (
            f"executor.account is not set, this cluster charges an account, and {user} has no default one: choose of "
            f"{', '.join(accounts) or '(none; ask for one)'}"
        )


def _ask(*command: str) -> str | None:
    """What a Slurm command prints; None where it fails, or is not there."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_QUERY_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout
