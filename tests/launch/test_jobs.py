"""From the launcher's command line to jobs: seeds, stages, the command line of each run, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_vp2o.config.reference import section
from megatron_vp2o.errors import ConfigError
from megatron_vp2o.launch.jobs import Job, make_jobs, world_size
from megatron_vp2o.launch.request import read
from megatron_vp2o.launch.settings import ExecutorSettings, SlurmSettings, TorchrunSettings

WARM_UP, GRPO = "countdown_tiny_supervised", "countdown_tiny_grpo"


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def jobs(recipe: str | None, *overrides: str, config_dir: Path | None = None) -> list[Job]:
    return make_jobs(read(recipe, None if config_dir is None else str(config_dir), overrides))


def refusal(recipe: str | None, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        jobs(recipe, *overrides)
    return str(caught.value)


def test_executors_and_their_settings() -> None:
    assert type(read(WARM_UP, None, []).executor) is ExecutorSettings
    torchrun = read(WARM_UP, None, ["executor=torchrun", "executor.max_restarts=2"]).executor
    assert isinstance(torchrun, TorchrunSettings)
    assert (torchrun.ranks_per_node, torchrun.max_restarts) == (2, 2)
    request = read(
        WARM_UP,
        None,
        [
            *("executor=slurm", "executor.nodes=8", "executor.ranks_per_node=8"),
            "executor.environment={NCCL_DEBUG: INFO, http_proxy: 'a b'}",
            *("executor.environment.X=1", "executor.sbatch_args={constraint: h100}"),
        ],
    )
    slurm = request.executor
    assert isinstance(slurm, SlurmSettings)
    assert slurm.environment == {"NCCL_DEBUG": "INFO", "http_proxy": "a b", "X": "1"}
    assert slurm.sbatch_args == {"constraint": "h100"}
    assert world_size(request) == 64
    assert world_size(read(WARM_UP, None, [])) == 1


def test_an_executor_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "mine" / "executor").mkdir(parents=True)
    (tmp_path / "mine" / "executor" / "cluster.yaml").write_text(
        "defaults: [slurm, _self_]\naccount: us\npartition: h100\nenvironment: {NCCL_DEBUG: WARN}\n"
    )
    executor = read(WARM_UP, str(tmp_path / "mine"), ["executor=cluster", "executor.nodes=2"]).executor
    assert isinstance(executor, SlurmSettings)
    assert (executor.account, executor.partition, executor.nodes) == ("us", "h100", 2)
    assert executor.environment == {"NCCL_DEBUG": "WARN"}


def test_the_command_line_of_a_run_is_what_was_given() -> None:
    (job,) = jobs(WARM_UP, "algorithm.steps=60", "model=micro", "evaluation.pass_at=[1,4]")
    assert job.arguments == (
        *("--config-name", WARM_UP),
        *("algorithm.steps=60", "model=micro", "evaluation.pass_at=[1,4]"),
    )
    assert (job.name, job.run_dir, job.after) == (WARM_UP, f"runs/{WARM_UP}", ())


def test_seeds_side_by_side() -> None:
    found = jobs(WARM_UP, "seeds=[3,5]")
    assert [(job.name, job.run_dir, job.after) for job in found] == [
        (f"{WARM_UP}_seed3", f"runs/{WARM_UP}_seed3", ()),
        (f"{WARM_UP}_seed5", f"runs/{WARM_UP}_seed5", ()),
    ]
    assert "seed=3" in found[0].arguments and "seed=5" in found[1].arguments


def test_stages_start_from_those_before_them() -> None:
    warm_up, grpo, command = jobs(
        None,
        f"stages=[{WARM_UP},{GRPO},'python eval.py {{run_dir}}/hf']",
        *("model=micro", f"{GRPO}:algorithm.steps=7", f"{WARM_UP}:name=first"),
    )
    assert (warm_up.name, warm_up.run_dir, warm_up.after) == ("first", "runs/first", ())
    assert (grpo.after, command.after) == (("first",), (GRPO,))
    # The recipe says runs/countdown_tiny_supervised; here that stage has another name.
    assert "init_from=runs/first" in grpo.arguments
    assert "model=micro" in warm_up.arguments and "model=micro" in grpo.arguments
    assert "algorithm.steps=7" in grpo.arguments and "algorithm.steps=7" not in warm_up.arguments
    assert command.shell == f"python eval.py runs/{GRPO}/hf"


def test_stages_are_found_by_init_from_and_seeds_have_chains_of_their_own() -> None:
    found = jobs(GRPO, "stages=auto", "seeds=[1,2]")
    assert [(job.name, job.after) for job in found] == [
        (f"{WARM_UP}_seed1", ()),
        (f"{GRPO}_seed1", (f"{WARM_UP}_seed1",)),
        (f"{WARM_UP}_seed2", ()),
        (f"{GRPO}_seed2", (f"{WARM_UP}_seed2",)),
    ]
    assert f"init_from=runs/{WARM_UP}_seed2" in found[3].arguments


@pytest.mark.parametrize(
    ("recipe", "overrides", "expected"),
    [
        (None, [], "name a recipe with --config-name, or several with stages=[...]; --help lists them"),
        (WARM_UP, ["stages=[a]"], f"--config-name {WARM_UP} and stages=['a']: give one of them"),
        (WARM_UP, ["countdown"], "cannot read 'countdown': write KEY=VALUE, and the recipe as --config-name countdown"),
        ("nope", [], "--config-name nope: there is no such recipe"),
        (WARM_UP, ["executor=slrm"], "executor=slrm: there is no such executor; there are: local, slurm, torchrun"),
        (WARM_UP, ["executor=slurm", "executor.node=2"], "no setting 'executor.node'; did you mean 'executor.nodes'?"),
        (WARM_UP, ["executor.nodes=2"], "there is no setting 'executor.nodes'; executor=local has: workdir, python,"),
        (WARM_UP, ["executor=slurm", "executor.nodes=two"], "executor.nodes: "),
        (WARM_UP, ["seeds=[1,1]"], "seeds=[1, 1] must be different numbers"),
        (WARM_UP, ["stages=3"], "stages=3 must be auto or a list"),
        (WARM_UP, [f"{GRPO}:algorithm.steps=3"], f"{GRPO}:algorithm.steps=3: '{GRPO}' is no stage"),
        (None, ["stages=['touch a b']"], "stages begins with a shell command, 'touch a b'"),
        (None, [f"stages=[{WARM_UP},{GRPO}]", "run_dir=x"], f"{WARM_UP} and {GRPO} would both write to run_dir=x"),
        (None, [f"stages=[{WARM_UP},{GRPO}]", "name=x"], "stages have the same name (x, x)"),
        (
            GRPO,
            ["stages=auto", "init_from=runs/strange"],
            "stages=auto: countdown_tiny_grpo starts from init_from=runs/",
        ),
        (GRPO, [], f"{GRPO}: init_from=runs/{WARM_UP} does not exist"),
        (GRPO, [], "or set null; stages=auto launches what makes it, too"),
        (
            WARM_UP,
            ["executor=slurm", "executor.nodes=3", "parallel.expert_parallel=2"],
            f"{WARM_UP}: 3 processes are not divisible by expert * expert-tensor * pipeline parallelism = 2 * 1 * 1 = 2",
        ),
        (WARM_UP, ["executor=slurm", "resume=never"], "resume=never does not go with starting a run again"),
    ],
)
def test_what_cannot_be_launched_is_refused_in_one_line(
    recipe: str | None, overrides: list[str], expected: str
) -> None:
    message = refusal(recipe, *overrides)
    assert expected in message
    assert "\n" not in message


def test_what_is_installed_here_does_not_matter_on_a_cluster() -> None:
    arguments = ("model.implementation=transformer_engine",)
    assert len(jobs(WARM_UP, "executor=slurm", *arguments)) == 1
    if not _has_transformer_engine():
        assert "needs transformer-engine" in refusal(WARM_UP, *arguments)


def _has_transformer_engine() -> bool:
    from importlib.util import find_spec

    return find_spec("transformer_engine") is not None


def test_paths_are_those_of_the_folder_that_the_run_starts_in(tmp_path: Path) -> None:
    other = tmp_path / "elsewhere"
    (other / "runs" / WARM_UP).mkdir(parents=True)
    (job,) = jobs(GRPO, f"executor.workdir={other}")
    assert job.run_dir == f"runs/{GRPO}"
    assert Path.cwd() == tmp_path


def test_the_page_lists_the_settings_as_they_are() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "launching.md").read_text(encoding="utf-8")
    table = section("`executor=slurm`", "executor.", SlurmSettings, level=3)
    assert table in page, f"docs/launching.md should end with\n\n{table}"


SERVED = ["init_from=null", "rollout=vllm", "rollout.launch=true"]


@pytest.mark.parametrize(("nodes", "placed"), [(1, "job"), (2, "split"), (8, "nodes")])
def test_servers_know_the_run_and_the_run_its_hosts(nodes: int, placed: str) -> None:
    slurm = ["executor=slurm", f"executor.nodes={nodes}", f"executor.servers={placed}", "executor.server_nodes=3"]
    *others, run = jobs(GRPO, *slurm, *SERVED, "executor.ranks_per_node=2")
    hosts = nodes if placed == "split" else 3
    assert f"rollout.server.hosts={hosts}" in run.arguments
    if placed == "job":
        (servers,) = others
        assert servers.serves and servers.arguments == run.arguments and run.served_by == servers.name
        assert run.meeting == servers.meeting == str(Path(f"runs/{GRPO}/servers").resolve())
    else:
        ranks = ("--ranks", "2") if placed == "split" else ()
        assert others == [] and run.servers == (*ranks, *run.arguments)


def test_only_stages_that_generate_have_servers() -> None:
    """The servers' job waits for the stage before, and the next stage for the run alone."""
    slurm = ["executor=slurm", "executor.servers=job"]
    chain = jobs(
        None, f"stages=[{WARM_UP},{GRPO},'touch x']", *slurm, f"{GRPO}:rollout=vllm", f"{GRPO}:rollout.launch=true"
    )
    assert [(job.name, job.after, job.served_by) for job in chain] == [
        (WARM_UP, (), None),
        (f"{GRPO}-servers", (WARM_UP,), None),
        (GRPO, (), f"{GRPO}-servers"),
        ("command2", (GRPO,), None),
    ]


def test_servers_that_nobody_could_reach_or_place_are_refused() -> None:
    slurm = ["executor=slurm", "executor.nodes=2"]
    assert "rollout.launch=true on executor.nodes=2: the first rank's servers could not be reached" in refusal(
        GRPO, *slurm, *SERVED
    )
    assert "executor.servers=nodes, and no recipe of this launch starts servers" in refusal(
        WARM_UP, *slurm, "executor.servers=nodes"
    )
    full = [*slurm, *SERVED, "executor.servers=split", "executor.gpus_per_node=6", "executor.ranks_per_node=4"]
    said = "a node would have 4 ranks and rollout.server.count=3 servers of rollout.server.tensor_parallel=1, which need 7 GPUs"
    assert said in refusal(GRPO, *full, "rollout.server.count=3")
    assert jobs(GRPO, *full, "rollout.server.count=2")
