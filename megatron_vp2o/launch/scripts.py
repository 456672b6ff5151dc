"""The shell text of a job: what each node runs, and what the batch script does around it."""

from __future__ import annotations

import shlex
import sys

from megatron_vp2o.config.status import STOPPED_FILE
from megatron_vp2o.launch.jobs import Job
from megatron_vp2o.launch.settings import NODES, ExecutorSettings, SlurmSettings, TorchrunSettings

TRAIN = "megatron_vp2o.train"
SERVE = "megatron_vp2o.serve"
NODE = "megatron_vp2o.launch.node"
STOPPED, DONE = "stopped", "done"  # files in a job's folder
SERVERS_JOB = "slurm_job"  # file in the meeting folder: the number of the servers' job
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
    lines = [f"export {STOPPED_FILE}={shlex.quote(stopped)}"] if job.shell is None and not job.serves else []
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
    if job.serves:
        return f"exec {python} -u {shlex.join(['-m', SERVE, *job.arguments])}"
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


def servers_step(job: Job, executor: SlurmSettings, *, workdir: str, log: str) -> str:
    """The srun of servers beside a run in the same job: on its nodes, or on the last ones.

    Args:
        log: of all of them, as srun's --output has it.
    """
    nodes, first = (executor.server_nodes, executor.nodes) if executor.servers == NODES else (executor.nodes, 0)
    where = [f"--chdir={workdir}"]
    if (image := executor.server_container_image or executor.container_image) is not None:
        mounts = ",".join([f"{workdir}:{workdir}", *executor.container_mounts])
        where = [f"--container-image={image}", f"--container-mounts={mounts}", f"--container-workdir={workdir}"]
        where += [f"--container-env={','.join(executor.environment)}"] if executor.environment else []
    cpus = [] if executor.cpus_per_node is None else [f"--cpus-per-task={executor.cpus_per_node}"]
    flags = [*step(nodes, first), *where, *cpus, "--kill-on-bad-exit=1", *executor.srun_args]
    run = [interpreter(executor), "-u", "-m", SERVE, *job.servers]
    # srun fills in its own %j; the shell the number of starts.
    return f'command srun --output="{log}" {shlex.join([*flags, *run])}'


def step(nodes: int, first: int = 0) -> list[str]:
    """srun's options of one task on each of `nodes` nodes, of which the step beside it may use the same."""
    return ["--overlap", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", f"--relative={first}"]


def batch_lines(executor: SlurmSettings, *, stopped: str, job: Job | None = None, servers: str = "") -> str:
    """Lines of the batch script before the run starts, on the first node and outside of any container.

    Args:
        stopped: the file by which the run tells that it was stopped early, as this script sees it.
        servers: see `servers_step`; empty for none.
    """
    if job is not None and job.serves:
        number = shlex.quote(f"{job.meeting}/{SERVERS_JOB}")
        known = [f"mkdir -p {shlex.quote(job.meeting)}", f'echo "$SLURM_JOB_ID" > {number}']
        return "\n".join([*executor.setup, "unset SLURM_UNBUFFEREDIO", *exports(executor), *known])
    other = f"{job.meeting}/{SERVERS_JOB}" if job is not None and job.served_by else ""
    return "\n".join(
        [
            *executor.setup,
            f"export {HEAD_NODE}=${{{HEAD_NODE}%% *}}  # a node may have several addresses",
            "unset SLURM_UNBUFFEREDIO  # it would give the run a terminal, and the log its progress bar",
            *exports(executor),
            *(_REQUEUE.format(stopped=shlex.quote(stopped)).splitlines() if executor.requeue else []),
            *(_SERVERS_JOB.format(job=shlex.quote(other)).splitlines() if other else []),
            *(_FORWARD if not servers else _BESIDE_SERVERS.replace("SERVERS_STEP", servers)).splitlines(),
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

_SERVERS_JOB = """
# The job of the servers is queued again together with this one, waits for it while it is started again after a failure, and ends
# with it otherwise.
servers_job={job}
with_servers() {{
    local status=$? number
    number=$(cat "$servers_job") || return "$status"
    if [ -n "${{stopped:-}}" ] && [ -e "$stopped" ]; then
        scontrol requeue "$number"
        again
    elif [ "$status" -eq 0 ] || [ "$TORCHX_MAX_RETRIES" -le "${{SLURM_RESTART_COUNT:-0}}" ]; then
        scancel "$number"
    fi
}}
trap with_servers EXIT"""

_BESIDE_SERVERS = """
# Signals to this script go on to the run (servers ignore this one), and what ends with an error ends the other.
trap 'signalled=yes; scancel --signal=USR1 "$SLURM_JOB_ID"' USR1 TERM
srun() {
    SERVERS_STEP &
    local servers=$!
    command srun "$@" &
    local run=$! status
    while kill -0 "$run" 2>/dev/null && kill -0 "$servers" 2>/dev/null; do sleep 1; done
    if kill -0 "$run" 2>/dev/null; then
        wait "$servers"
        status=$?
        if [ "$status" -ne 0 ]; then
            echo "error: the rollout servers ended with status $status, see their log: the run ends, too" >&2
            # Each step by itself: scancel would end the whole job by this signal, and slowly.
            for step in $(squeue --noheader --steps --jobs="$SLURM_JOB_ID" --format=%i | grep '[.][0-9]*$'); do
                scancel --signal=KILL "$step"
            done
            wait "$run"
            return "$status"
        fi
    fi
    while :; do
        signalled=
        wait "$run"
        status=$?
        [ -n "$signalled" ] || break
    done
    kill "$servers" 2>/dev/null  # they have ended already where the run said goodbye
    return "$status"
}"""

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
