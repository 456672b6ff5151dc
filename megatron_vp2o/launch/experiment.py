"""A launch as a NeMo-Run experiment: its executors, its jobs, and what a dry run prints. The one module that imports it."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from megatron_vp2o.config.status import PREEMPTED
from megatron_vp2o.errors import ConfigError
from megatron_vp2o.launch.jobs import Job
from megatron_vp2o.launch.scripts import (
    DONE,
    NODE,
    STOPPED,
    TRAIN,
    batch_lines,
    local_script,
    node_script,
    servers_step,
    step,
)
from megatron_vp2o.launch.settings import ExecutorSettings, SlurmSettings, job_nodes

JOB_FOLDER = "/nemo_run"
"""The job's folder as NeMo-Run mounts it into containers; without one it puts the real path in its place."""
FAILED = 1


def launch(jobs: Sequence[Job], executor: ExecutorSettings, *, title: str, dryrun: bool) -> int:
    """Print what would run, or run or submit it.

    Returns the exit status: 0; 1 where a job on this machine failed; PREEMPTED where one was stopped early and saved.

    Raises:
        ConfigError: where Slurm refuses a job, in its own words.
    """
    if executor.log_dir is not None:
        os.environ["NEMORUN_HOME"] = str(Path(executor.log_dir).resolve())
    # NeMo-Run's import takes seconds and tells of clouds that are not used here.
    logging.getLogger("torchx").setLevel(logging.WARNING)
    import nemo_run
    from invoke.exceptions import UnexpectedExit
    from nemo_run.config import get_nemorun_home

    title = re.sub(r"[^\w-]+", "-", title)
    identifier = f"{title}_{time.time_ns()}"
    folder = Path(get_nemorun_home()) / "experiments" / title / identifier
    here = not dryrun and not isinstance(executor, SlurmSettings)
    with contextlib.chdir(executor.workdir or "."), _handing_on_signals() if here else contextlib.nullcontext():
        try:
            with nemo_run.Experiment(
                title,
                id=identifier,
                log_level="WARNING",
                clean_mode=True,
                enable_goodbye_message=False,
                skip_status_at_exit=True,
                serialize_metadata_for_scripts=False,
            ) as experiment:
                names: dict[str, str] = {}
                folders = {job.name: str(folder / job.name) for job in jobs}
                for number, job in enumerate(jobs):
                    names[job.name] = experiment.add(
                        nemo_run.Script(inline=_script(job, executor, number, folders)),
                        executor=_executor(nemo_run, job, executor, folder),
                        name=job.name,
                        dependencies=[names[other] for other in _waits_for(job)] or None,
                        tail_logs=True,
                    )
                if dryrun:
                    experiment.dryrun(log=False, delete_exp_dir=False)
                    for job in jobs:
                        _print_scripts(job, executor, folder)
                    shutil.rmtree(folder)
                    return 0
                if isinstance(executor, SlurmSettings):
                    experiment.run(detach=True)
                    _tell(experiment, jobs, folder)
                    return 0
                experiment.run(tail_logs=True)  # the end of the experiment's context waits
        except UnexpectedExit as error:
            reason = " ".join((error.result.stderr or error.result.stdout).split())
            raise ConfigError(f"Slurm refused a job: {reason}") from error
    return _outcome(jobs, folder)


def _waits_for(job: Job) -> tuple[str, ...]:
    return (job.served_by,) if job.served_by is not None else job.after


def _script(job: Job, executor: ExecutorSettings, number: int, folders: dict[str, str]) -> str:
    if isinstance(executor, SlurmSettings):
        return node_script(job, executor, stopped=f"{JOB_FOLDER}/{STOPPED}", port=executor.rendezvous_port + number)
    return local_script(job, executor, folders)


def _executor(nemo_run: Any, job: Job, executor: ExecutorSettings, folder: Path) -> Any:
    if not isinstance(executor, SlurmSettings):
        return nemo_run.LocalExecutor()
    workdir = str(Path.cwd())
    # Given after NeMo-Run's own, which would have the run start in its record of the job.
    where = [f"--chdir={workdir}"]
    mounts: list[str] = []
    if executor.container_image is not None:
        where = [f"--container-workdir={workdir}"]
        mounts = [f"{workdir}:{workdir}", *executor.container_mounts]
    # srun does not take the number of CPUs from its job.
    cpus = [] if executor.cpus_per_node is None else [f"--cpus-per-task={executor.cpus_per_node}"]
    nodes = 1 if job.shell is not None else executor.server_nodes if job.serves else job_nodes(executor)
    beside, image = "", executor.container_image
    if job.servers:
        log = f"{folder / job.name}/log-servers_%j_${{SLURM_RESTART_COUNT:-0}}.out"
        beside = servers_step(job, executor, workdir=workdir, log=log)
        where += step(executor.nodes)
    if job.serves:
        image = executor.server_container_image or image
    return nemo_run.SlurmExecutor(
        account=executor.account,
        partition=executor.partition,
        qos=executor.qos,
        time=executor.time,
        nodes=nodes,
        ntasks_per_node=1,  # torchrun's agent, which starts the ranks
        gpus_per_node=executor.gpus_per_node,
        cpus_per_task=executor.cpus_per_node,
        mem=executor.memory,
        exclusive=executor.exclusive or None,
        signal=f"USR1@{executor.signal_lead_s}"
        if job.shell is None and not job.serves and executor.signal_lead_s
        else None,
        job_name_prefix="vp2o-",
        container_image=image,
        container_mounts=mounts,
        # Else the image's values of these would win.
        container_env=list(executor.environment) or None,
        srun_args=[*where, *cpus, *executor.srun_args],
        additional_parameters={
            **({"kill_on_invalid_dep": "yes"} if job.after else {}),
            **executor.sbatch_args,
        },
        retries=executor.retries,
        setup_lines=batch_lines(executor, stopped=str(folder / job.name / STOPPED), job=job, servers=beside),
        dependency_type="after" if job.served_by is not None else "afterok",
        tunnel=nemo_run.LocalTunnel(job_dir=str(folder.parents[1])),
        packager=nemo_run.Packager(),
        poll_estimated_start_time=False,
    )


def _print_scripts(job: Job, executor: ExecutorSettings, folder: Path) -> None:
    if isinstance(executor, SlurmSettings):
        kind = "after" if job.served_by is not None else "afterok"
        after = f", after {', '.join(_waits_for(job))} (--dependency={kind})" if _waits_for(job) else ""
        print(f"##### {job.name}: the batch script{after}")
        print((folder / f"{job.name}_sbatch.sh").read_text().rstrip())
        print(f"##### {job.name}: what srun starts on each node")
    else:
        print(f"##### {job.name}" + (f", after {', '.join(job.after)}" if job.after else ""))
    print((folder / job.name / "scripts" / f"{job.name}.sh").read_text().rstrip() + "\n")


def _tell(experiment: Any, jobs: Sequence[Job], folder: Path) -> None:
    for job, submitted in zip(jobs, experiment.jobs, strict=True):
        number = submitted.handle.partition("://")[2].split("/")[1]
        after = f", after {', '.join(_waits_for(job))}" if _waits_for(job) else ""
        print(f"submitted {job.name} as Slurm job {number}{after}")
        print(f"  run: {job.run_dir}")
        print(f"  logs: {folder / job.name}/log-*_{number}_*.out")


def _outcome(jobs: Sequence[Job], folder: Path) -> int:
    for job in jobs:
        if (folder / job.name / STOPPED).exists():
            print(f"{job.name} was stopped early and has saved: the same command goes on from there")
            return PREEMPTED
    failed = [job.name for job in jobs if not (folder / job.name / DONE).exists()]
    if failed:
        print(f"error: not done: {', '.join(failed)} (logs: {folder / failed[0]})", file=sys.stderr)
    return FAILED if failed else 0


@contextlib.contextmanager
def _handing_on_signals() -> Iterator[None]:
    """Ctrl-C, SIGTERM and SIGUSR1 ask the runs on this machine to save and stop; the second one kills them."""
    asked = False

    def hand_on(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        print(
            "\nstopping: the run ends its step and saves; once more kills it" if not asked else "\nkilled",
            file=sys.stderr,
        )
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if asked:
                    process.kill()
                elif {NODE, TRAIN} & set(process.cmdline()) and "TORCHELASTIC_RUN_ID" not in process.environ():
                    process.send_signal(signal.SIGUSR1)
        asked = True

    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = [signal.signal(number, hand_on) for number in signals]
    try:
        yield
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)
