"""The shell text of a job: what each node runs, and what the batch script does around it."""

from __future__ import annotations

import shlex
import sys

from megatron_vp2o.config.status import STOPPED_FILE
from megatron_vp2o.launch.jobs import Job
from megatron_vp2o.launch.settings import ExecutorSettings, SlurmSettings, TorchrunSettings

TRAIN = "megatron_vp2o.train"
NODE = "megatron_vp2o.launch.node"
STOPPED, DONE = "stopped", "done"  # files in a job's folder
HEAD_NODE = "head_node_ip"  # the batch script of NeMo-Run sets it


def interpreter(executor: ExecutorSettings) -> str:
    """The Python that runs the job."""
    if executor.python is not None:
        return executor.python
    in_container = isinstance(executor, SlurmSettings) and executor.container_image is not None
    return "python" if in_container else sys.executable


def node_script(job: Job, executor: ExecutorSettings, *, stopped: str, port: int = 0) -> str:
    """What runs on each node of the job (in the container, if there is one).

    Args:
        stopped: the file by which the run tells that it was stopped early, as the run sees it.
        port: of the agents' rendezvous, on the first node.
    """
    lines = [f"export {STOPPED_FILE}={shlex.quote(stopped)}"] if job.shell is None else []
    return "\n".join([*lines, _command(job, executor, port), ""])


def local_script(job: Job, executor: ExecutorSettings, folders: dict[str, str]) -> str:
    """The same on this machine, where nothing but the script itself waits for the success of earlier jobs.

    Args:
        folders: of the jobs' files, by name.
    """
    stopped, done = (shlex.quote(f"{folders[job.name]}/{name}") for name in (STOPPED, DONE))
    waits = [
        f"[ -e {shlex.quote(f'{folders[name]}/{DONE}')} ] || {{ echo {shlex.quote(f'{name} has not succeeded')} >&2; exit 1; }}"
        for name in job.after
    ]
    run = (
        f"({job.shell})"
        if job.shell is not None
        else node_script(job, executor, stopped=f"{folders[job.name]}/{STOPPED}")
    )
    after = ["status=$?", f'[ "$status" -ne 0 ] || [ -e {stopped} ] || touch {done}', 'exit "$status"']
    return "\n".join([*exports(executor), *waits, run.rstrip(), *after, ""])


def _command(job: Job, executor: ExecutorSettings, port: int) -> str:
    if job.shell is not None:
        return job.shell
    python = shlex.quote(interpreter(executor))
    run = shlex.join(["-m", TRAIN, *job.arguments])
    if not isinstance(executor, TorchrunSettings):
        return f"{python} -u {run}"
    agent = [f"--nproc-per-node={executor.ranks_per_node}", f"--max-restarts={executor.max_restarts}"]
    if isinstance(executor, SlurmSettings) and executor.nodes > 1:
        agent += [
            f"--nnodes={executor.nodes}",
            "--rdzv-backend=c10d",
            f'--rdzv-endpoint="${HEAD_NODE}:{port}"',
            '--rdzv-id="$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}"',
        ]
    else:
        agent.append("--standalone")
    # In place of its shell it gets the signals of Slurm.
    begin = f"exec {python}" if isinstance(executor, SlurmSettings) else python
    return " \\\n    ".join([f"{begin} -m {NODE}", *agent, run])


def exports(executor: ExecutorSettings) -> list[str]:
    """Lines that set the environment."""
    return [f"export {name}={shlex.quote(value)}" for name, value in executor.environment.items()]


def batch_lines(executor: SlurmSettings, *, stopped: str) -> str:
    """Lines of the batch script before the run starts, on the first node and outside of any container.

    Args:
        stopped: the file by which the run tells that it was stopped early, as this script sees it.
    """
    return "\n".join(
        [
            *executor.setup,
            f"export {HEAD_NODE}=${{{HEAD_NODE}%% *}}  # a node may have several addresses",
            "unset SLURM_UNBUFFEREDIO  # it would give the run a terminal, and the log its progress bar",
            *exports(executor),
            *(_REQUEUE.format(stopped=shlex.quote(stopped)).splitlines() if executor.requeue else []),
            *_FORWARD.splitlines(),
        ]
    )


# A cancelled job is not RUNNING any more when its script ends, so it stays cancelled.
_REQUEUE = """
# A run that was asked to stop leaves this file when it has saved: queue the job again, unless it was cancelled.
stopped={stopped}
rm -f "$stopped"
again() {{
    if [ -e "$stopped" ] && [ "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)" = RUNNING ]; then
        scontrol requeue "$SLURM_JOB_ID"
    fi
}}
trap again EXIT"""

_FORWARD = """
# Signals to this script go on to the run. For that srun must not keep the shell waiting: wait can be interrupted.
trap 'signalled=yes; scancel --signal=USR1 "$SLURM_JOB_ID"' USR1 TERM
srun() {
    command srun "$@" &
    local run=$! status
    while :; do
        signalled=
        wait "$run"
        status=$?
        [ -n "$signalled" ] || return "$status"
    done
}"""
