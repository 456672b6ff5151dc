"""The text of a job: what each node runs, what the batch script does, and what NeMo-Run makes of both."""

from __future__ import annotations

import re
import shlex
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from megatron_vp2o.launch.jobs import Job
from megatron_vp2o.launch.scripts import batch_lines, local_script, node_script, servers_step, step
from megatron_vp2o.launch.settings import ExecutorSettings, SlurmSettings, TorchrunSettings, job_nodes

ROOT = Path(__file__).resolve().parents[2]
JOB = Job("name", ("--config-name", "recipe", "notes='a b'", "evaluation.pass_at=[1,4]"), "runs/name")
needs_nemo_run = pytest.mark.skipif(find_spec("nemo_run") is None, reason="nemo-run is not installed (extra [nemo])")


def words(script: str) -> list[str]:
    """The last command of a script, as its shell would read it."""
    return shlex.split(script.replace("\\\n", " ").strip().splitlines()[-1])


def test_one_process(tmp_path: Path) -> None:
    script = local_script(JOB, ExecutorSettings(environment={"A": "b c; d"}), {"name": "/job"})
    run = script.splitlines()[2]
    assert shlex.split(run) == [sys.executable, "-u", "-m", "megatron_vp2o.train", *JOB.arguments]
    assert "export A='b c; d'\n" in script
    assert "export MEGATRON_VP2O_STOPPED=/job/stopped\n" in script


def test_torchrun_on_this_machine() -> None:
    script = node_script(JOB, TorchrunSettings(ranks_per_node=4, max_restarts=2, python="py"), stopped="/job/stopped")
    assert words(script) == [
        *("py", "-m", "megatron_vp2o.launch.node", "--nproc-per-node=4", "--max-restarts=2", "--standalone"),
        *("-m", "megatron_vp2o.train", *JOB.arguments),
    ]


def test_a_node_of_a_slurm_job() -> None:
    executor = SlurmSettings(nodes=8, ranks_per_node=8, container_image="image")
    found = words(node_script(JOB, executor, stopped="/job/stopped", port=29501))
    assert found[:4] == ["exec", "python", "-m", "megatron_vp2o.launch.node"]  # the image's python
    assert {"--nnodes=8", "--nproc-per-node=8", "--max-restarts=3", "--rdzv-backend=c10d"} <= set(found)
    assert "--rdzv-endpoint=$head_node_ip:29501" in found
    assert found[-len(JOB.arguments) :] == list(JOB.arguments)


def test_a_shell_stage_runs_as_it_stands() -> None:
    job = Job("command1", (), "runs/name", shell="python eval.py | tee log")
    assert node_script(job, SlurmSettings(), stopped="/job/stopped") == "python eval.py | tee log\n"


def test_on_this_machine_a_stage_runs_only_after_success(tmp_path: Path) -> None:
    folders = {name: str(tmp_path / name) for name in ("first", "second")}
    for folder in folders.values():
        Path(folder).mkdir()

    def run(shell: str, name: str, after: tuple[str, ...] = ()) -> int:
        script = local_script(Job(name, (), "", shell=shell, after=after), ExecutorSettings(), folders)
        return subprocess.run(["bash", "-c", script], capture_output=True).returncode

    later = (f"touch {tmp_path}/ran", "second", ("first",))
    assert run("false", "first") == 1 and run(*later) == 1  # it failed
    stopped = Path(folders["first"]) / "stopped"
    assert run(f"touch {stopped}", "first") == 0 and run(*later) == 1  # it was stopped early
    assert not (tmp_path / "ran").exists()
    stopped.unlink()
    assert run("true", "first") == 0 and run(*later) == 0
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("requeue", [True, False])
def test_the_batch_script_is_good_bash(tmp_path: Path, requeue: bool) -> None:
    text = batch_lines(
        SlurmSettings(requeue=requeue, setup=["module() { :; }", "module load x"]), stopped="/a b/stopped"
    )
    subprocess.run(["bash", "-n", "-c", text], check=True)
    assert ("scontrol requeue" in text) is requeue


class Batch:
    """The end of a batch script under stand-ins for Slurm's commands."""

    def __init__(self, folder: Path, *, state: str) -> None:
        self.folder, self.stopped = folder, folder / "stopped"
        for name, does in {
            "squeue": f"echo {state}",
            "scontrol": f'echo "$@" >> {folder}/scontrol.log',
            "scancel": f'echo "$@" >> {folder}/scancel.log; touch {folder}/asked',
            # A run: it ends when it was asked to, and leaves the file.
            "srun": f"until [ -e {folder}/asked ]; do sleep 0.05; done; touch {self.stopped}; exit 0",
        }.items():
            file = folder / name
            file.write_text(f"#!/bin/bash\n{does}\n")
            file.chmod(0o755)

    def run(self, end: str) -> str:
        """What was asked of scontrol."""
        lines = batch_lines(SlurmSettings(), stopped=str(self.stopped))
        script = f"set -ev\nset +e\n{lines}\n{end}\nsrun bash x\nexitcode=$?\nset -e\nexit $exitcode\n"
        environment = {"PATH": f"{self.folder}:/usr/bin:/bin", "SLURM_JOB_ID": "7", "head_node_ip": "10.0.0.1 10.1.0.1"}
        done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, timeout=30)
        assert done.returncode == 0, done.stderr
        asked = self.folder / "scontrol.log"
        return asked.read_text() if asked.exists() else ""


def test_a_stopped_run_is_queued_again_and_a_cancelled_one_is_not(tmp_path: Path) -> None:
    for state, expected in (("RUNNING", "requeue 7\n"), ("COMPLETING", "")):
        folder = tmp_path / state
        folder.mkdir()
        batch = Batch(folder, state=state)
        # A signal to the script itself, while srun runs.
        assert batch.run("(sleep 0.3; kill -USR1 $$) &") == expected
        assert (folder / "scancel.log").read_text() == "--signal=USR1 7\n"


@needs_nemo_run
def test_the_dry_run_prints_the_scripts_that_would_run(tmp_path: Path) -> None:
    image, data = tmp_path / "image.sqsh", tmp_path / "data"
    image.touch()
    data.mkdir()
    done = subprocess.run(
        [
            *(sys.executable, "-m", "megatron_vp2o.launch"),
            *("stages=[countdown_tiny_supervised,countdown_tiny_grpo]", "--dryrun", "executor=slurm"),
            *("executor.nodes=2", "executor.ranks_per_node=2", "parallel.expert_parallel=2"),
            *("executor.account=us", "executor.partition=h100", "executor.time=04:00:00", "executor.gpus_per_node=2"),
            *(f"executor.container_image={image}", f"executor.container_mounts=['{data}:/data:ro']"),
            *("executor.environment={NCCL_DEBUG: INFO, TEXT: 'a b'}", "executor.signal_lead_s=120"),
            *(
                "executor.sbatch_args={constraint: h100}",
                "executor.srun_args=['--mpi=none']",
                "executor.cpus_per_node=16",
            ),
            *("executor.retries=1", f"executor.log_dir={tmp_path}/launches", "executor.python=python3.12"),
        ],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    first, second = re.split(r"^##### countdown_tiny_grpo: the batch script", done.stdout, flags=re.MULTILINE)
    for line in (
        "#SBATCH --account=us",
        "#SBATCH --partition=h100",
        "#SBATCH --nodes=2",
        "#SBATCH --ntasks-per-node=1",
        "#SBATCH --gpus-per-node=2",
        "#SBATCH --cpus-per-task=16",
        "#SBATCH --time=04:00:00",
        "#SBATCH --signal=USR1@120",
        "#SBATCH --constraint=h100",
        "# Run with: sbatch --requeue --parsable",
        "export TORCHX_MAX_RETRIES=1",
        "export NCCL_DEBUG=INFO",
        "export TEXT='a b'",
        "trap again EXIT",
    ):
        assert line in first.splitlines(), line
    (srun,) = (line for line in first.splitlines() if line.startswith("srun --output"))
    cwd = ROOT
    for part in (
        f"--container-image {image}",
        f"{cwd}:{cwd},{data}:/data:ro,",
        f"--container-workdir={cwd}",
        "--container-env NCCL_DEBUG,TEXT",
        "--kill-on-bad-exit=1",
        "--cpus-per-task=16 --mpi=none bash /nemo_run/scripts/countdown_tiny_supervised.sh",
    ):
        assert part in srun, part
    assert "export MEGATRON_VP2O_STOPPED=/nemo_run/stopped" in first  # in the container
    assert re.search(rf"^stopped={tmp_path}/launches/\S+/countdown_tiny_supervised/stopped$", first, re.MULTILINE)
    assert "exec python3.12 -m megatron_vp2o.launch.node" in first
    assert '--rdzv-endpoint="$head_node_ip:29500"' in first
    assert "--config-name countdown_tiny_supervised parallel.expert_parallel=2\n" in first
    assert second.startswith(", after countdown_tiny_supervised (--dependency=afterok)\n")
    assert "#SBATCH --kill-on-invalid-dep=yes" in second and '--rdzv-endpoint="$head_node_ip:29501"' in second
    for script in re.findall(r"^#!/bin/bash\n.*?(?=^#####)", done.stdout, flags=re.MULTILINE | re.DOTALL):
        subprocess.run(["bash", "-n", "-c", script], check=True)
    assert list((tmp_path / "launches").rglob("*.sh")) == []  # a dry run leaves nothing


@needs_nemo_run
@pytest.mark.distributed
@pytest.mark.slow
def test_a_launch_on_this_machine_is_interrupted_and_goes_on(tmp_path: Path) -> None:
    """Two stages under torchrun, with arguments that a shell would take apart."""
    command = [
        *(sys.executable, "-m", "megatron_vp2o.launch", "executor=torchrun", "seeds=[1]"),
        "stages=[countdown_tiny_supervised,'test -e {run_dir}/metrics.jsonl && echo one two > {run_dir}/told']",
        *(f"run_dir={tmp_path}/run", f"executor.log_dir={tmp_path}/launches"),
        *("model=micro", "task.train_size=20", "task.validation_size=4", "task.test_size=4", "evaluation.problems=4"),
        *("evaluation.samples=2", "evaluation.pass_at=[1,2]", "evaluation.interval=0", "algorithm.steps=40"),
        *("optimizer.lr_warmup_steps=1", "algorithm.global_batch_size=8", "algorithm.micro_batch_size=4"),
        *("logging.tensorboard=false", "threads=1", "notes='a; b'", "parallel.expert_parallel=2"),
    ]
    run, record = tmp_path / "run_seed1", tmp_path / "run_seed1" / "metrics.jsonl"
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as first:
        deadline = time.monotonic() + 200
        while not (record.exists() and '"step": 2,' in record.read_text()):
            assert first.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        first.send_signal(signal.SIGINT)
        output = first.communicate(timeout=100)[0]
    assert first.returncode == 75, output
    assert "countdown_tiny_supervised_seed1 was stopped early and has saved" in output
    assert (run / "checkpoints" / "latest").exists() and not (run / "told").exists()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (run / "told").read_text() == "one two\n"
    assert (run / "checkpoints" / "latest").read_text().strip() == "step_000040"


SERVED = Job("name", ("--config-name", "recipe"), "runs/name", servers=("--ranks", "4", "--config-name", "recipe"))


@pytest.mark.parametrize("nodes", [1, 2, 8])
@pytest.mark.parametrize("placed", ["split", "nodes"])
def test_servers_and_ranks_have_the_nodes_that_are_theirs(nodes: int, placed: str) -> None:
    """Together all nodes of the job; each as often as the placement says."""
    executor = SlurmSettings(nodes=nodes, servers=placed, server_nodes=3, ranks_per_node=4, environment={"A": "b"})
    found = shlex.split(servers_step(SERVED, executor, workdir="/w", log="/l/%j"))
    assert found[:3] == ["command", "srun", "--output=/l/%j"] and "--chdir=/w" in found
    assert found[-6:] == ["-m", "megatron_vp2o.serve", *SERVED.servers]

    def nodes_of(flags: list[str]) -> set[int]:
        options = dict(flag.lstrip("-").split("=") for flag in flags if "=" in flag)
        assert options["ntasks"] == options["nodes"] and "--overlap" in flags
        return set(range(int(options["relative"]), int(options["relative"]) + int(options["nodes"])))

    servers, ranks = nodes_of([word for word in found if word != "A=b"]), nodes_of(step(nodes))
    assert servers | ranks == set(range(job_nodes(executor)))
    assert ranks == set(range(nodes)) and (servers == ranks if placed == "split" else not servers & ranks)
    image = SlurmSettings(
        container_image="run", server_container_image="vllm", container_mounts=["/d:/d"], environment={"A": "b"}
    )
    inside = shlex.split(servers_step(SERVED, image, workdir="/w", log="/l"))
    assert {
        "--container-image=vllm",
        "--container-mounts=/w:/w,/d:/d",
        "--container-workdir=/w",
        "--container-env=A",
    } <= set(inside)
    assert inside[inside.index("-u") - 1] == "python"


def _beside(folder: Path, servers: str, run: str) -> tuple[int, str, float]:
    """Status, output and seconds of a batch script whose steps do that; `gone` is written by steps that scancel kills."""
    cancel = f'echo "$@" >> {folder}/scancel.log; touch {folder}/killed'
    for name, does in {"scancel": cancel, "squeue": "printf '7.batch\\n7.0\\n7.12\\n'", "srun": run}.items():
        (folder / name).write_text(f"#!/bin/bash\n{does}\n")
        (folder / name).chmod(0o755)
    lines = batch_lines(SlurmSettings(requeue=False), stopped=str(folder / "s"), servers=servers)
    script = f"{lines}\nsrun bash x\nexit $?\n"
    environment = {"PATH": f"{folder}:/usr/bin:/bin", "SLURM_JOB_ID": "7", "head_node_ip": "10.0.0.1"}
    begin = time.monotonic()
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stderr, time.monotonic() - begin


@pytest.mark.parametrize(
    ("servers", "run", "status", "told"),
    [
        ("sleep 1", "sleep 3; exit 4", 4, False),  # goodbye: the run goes on to its own end
        ("sleep 600", "sleep 1; exit 0", 0, False),  # the end of the run ends them
        ("sleep 600", "sleep 1; exit 3", 3, False),
        ("bash -c 'sleep 1; exit 9'", "until [ -e {folder}/killed ]; do sleep 0.1; done; exit 137", 9, True),
    ],
)
def test_servers_and_run_of_a_job_end_together(tmp_path: Path, servers: str, run: str, status: int, told: bool) -> None:
    code, output, seconds = _beside(tmp_path, servers, run.format(folder=tmp_path))
    assert code == status and seconds < 30
    assert ("error: the rollout servers ended with status 9" in output) is told
    log = tmp_path / "scancel.log"
    killed = log.read_text().splitlines() if log.exists() else []
    assert killed == (["--signal=KILL 7.0", "--signal=KILL 7.12"] if told else [])


@pytest.mark.parametrize(
    ("status", "stopped", "retries", "asked"),
    [
        (0, False, 0, ["cancel 41"]),
        (1, False, 0, ["cancel 41"]),
        (1, False, 2, []),  # Slurm starts the run again, and the servers wait
        (0, True, 0, ["requeue 41", "requeue 7"]),
    ],
)
def test_a_job_of_servers_shares_the_fate_of_its_run(
    tmp_path: Path, status: int, stopped: bool, retries: int, asked: list[str]
) -> None:
    (tmp_path / "slurm_job").write_text("41\n")
    job = Job("name", (), "runs/name", served_by="name-servers", meeting=str(tmp_path))
    for name, does in {
        "scancel": f'echo "cancel $@" >> {tmp_path}/log',
        "scontrol": f'echo "$@" >> {tmp_path}/log',
        "squeue": "echo RUNNING",
        "srun": f"{'touch ' + str(tmp_path / 'stopped') if stopped else 'true'}; exit {status}",
    }.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{does}\n")
        (tmp_path / name).chmod(0o755)
    lines = batch_lines(SlurmSettings(), stopped=str(tmp_path / "stopped"), job=job)
    environment = {
        "PATH": f"{tmp_path}:/usr/bin:/bin",
        "SLURM_JOB_ID": "7",
        "head_node_ip": "x",
        "TORCHX_MAX_RETRIES": str(retries),
    }
    done = subprocess.run(["bash", "-c", f"{lines}\nsrun bash x\nexit $?"], env=environment, timeout=30)
    assert done.returncode == status
    log = tmp_path / "log"
    assert (log.read_text().splitlines() if log.exists() else []) == asked


@needs_nemo_run
@pytest.mark.parametrize(("nodes", "placed"), [(1, "split"), (2, "nodes"), (8, "job")])
def test_the_dry_run_prints_servers(tmp_path: Path, nodes: int, placed: str) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "megatron_vp2o.launch", "--config-name", "countdown_tiny_grpo", "--dryrun"),
            *("init_from=null", "rollout=vllm", "rollout.launch=true", "executor=slurm", f"executor.nodes={nodes}"),
            *(f"executor.servers={placed}", "executor.server_nodes=2", f"executor.log_dir={tmp_path}/launches"),
        ],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    scripts = re.findall(r"^#!/bin/bash\n.*?(?=^#####)", done.stdout, flags=re.MULTILINE | re.DOTALL)
    assert len(scripts) == (2 if placed == "job" else 1)
    for script in scripts:
        subprocess.run(["bash", "-n", "-c", script], check=True)
    sizes = {"split": ["1"], "nodes": ["4"], "job": ["2", "8"]}[placed]
    assert re.findall(r"^#SBATCH --nodes=(\d+)", done.stdout, flags=re.MULTILINE) == sizes
    hosts = 1 if placed == "split" else 2
    starts = [line for line in done.stdout.splitlines() if "-m megatron_vp2o.serve " in line]
    assert len(starts) == 1 and f"rollout.server.hosts={hosts}" in starts[0]
    if placed == "job":
        assert starts[0].startswith("exec ")
        assert "after countdown_tiny_grpo-servers (--dependency=after)" in done.stdout
        assert "trap with_servers EXIT" in done.stdout
    else:
        assert "command srun" in starts[0] and "log-servers_%j" in starts[0]
        (main,) = (line for line in done.stdout.splitlines() if line.startswith("srun --output"))
        assert f"--overlap --nodes={nodes} --ntasks={nodes} --ntasks-per-node=1 --relative=0 bash" in main
