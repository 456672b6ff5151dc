"""What is to run: one job for each stage and seed, which of them wait for which, and the command line of each."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_vp2o.config.compose import compose
from megatron_vp2o.config.register import recipe_names
from megatron_vp2o.config.schema import Resume, TrainConfig
from megatron_vp2o.config.validate import validate
from megatron_vp2o.errors import ConfigError
from megatron_vp2o.launch.request import AUTO, Request
from megatron_vp2o.launch.settings import JOB, NODES, SPLIT, SlurmSettings, TorchrunSettings


@dataclass(frozen=True)
class Job:
    """One job.

    Attributes:
        name: unique in the launch, of letters, digits, `_`, `-` and `.`.
        arguments: of `python -m megatron_vp2o.train`; empty where there is a `shell` command.
        shell: a command line for one process on one node.
        run_dir: of the run, or of the one before a shell command.
        after: names of the jobs that must have succeeded.
        servers: arguments of `python -m megatron_vp2o.serve` for servers that run beside it in the same job; empty for none.
        serves: it is a job of servers alone: `arguments` are those of `python -m megatron_vp2o.serve`.
        served_by: name of the job of servers that must have started.
        meeting: folder where this run and servers of another job find each other.
    """

    name: str
    arguments: tuple[str, ...]
    run_dir: str
    shell: str | None = None
    after: tuple[str, ...] = ()
    servers: tuple[str, ...] = ()
    serves: bool = False
    served_by: str | None = None
    meeting: str = ""


def make_jobs(request: Request) -> list[Job]:
    """The jobs of a request, in an order in which each comes after those that it waits for.

    Raises:
        ConfigError: where a recipe does not compose or validate for the ranks that it will have, or jobs would collide.
    """
    stages = _stages(request)
    strangers = request.stage_overrides.keys() - set(stages)
    if strangers:
        name = sorted(strangers)[0]
        raise ConfigError(f"{name}:{request.stage_overrides[name][0]}: {name!r} is no stage; there are: {stages}")
    jobs: list[Job] = []
    with contextlib.chdir(request.executor.workdir or "."):
        seeds: list[int] | list[None] = request.settings.seeds or [None]
        for seed in seeds:
            jobs.extend(_chain(request, stages, seed))
    placed = _servers_setting(request)
    if placed is not None and not any(job.servers or job.serves for job in jobs):
        raise ConfigError(
            f"executor.servers={placed}, and no recipe of this launch starts servers: set rollout=vllm rollout.launch=true, or "
            "leave it out"
        )
    folders: dict[str, str] = {}
    for job in jobs:
        if job.shell is None and not job.serves and folders.setdefault(job.run_dir, job.name) != job.name:
            raise ConfigError(
                f"{folders[job.run_dir]} and {job.name} would both write to run_dir={job.run_dir}: give `name` or `run_dir` "
                "to one stage only, STAGE:name=..."
            )
    return jobs


def world_size(request: Request) -> int:
    """Processes of a run."""
    executor = request.executor
    ranks = executor.ranks_per_node if isinstance(executor, TorchrunSettings) else 1
    return ranks * executor.nodes if isinstance(executor, SlurmSettings) else ranks


def _stages(request: Request) -> list[str]:
    if request.stages is not None:
        return request.stages
    assert request.recipe is not None
    stages = [request.recipe]
    while request.settings.stages == AUTO:
        config = compose(stages[0], _overrides(request, stages[0]), config_dir=request.config_dir)
        if config.init_from is None:
            break
        # The runs of our recipes are in folders of their names, `init_from` tells the one before.
        before = Path(config.init_from).name
        known = {*recipe_names(), *(path.stem for path in (request.config_dir or Path()).glob("*.yaml"))}
        if before not in known or before in stages:
            raise ConfigError(
                f"stages=auto: {stages[0]} starts from init_from={config.init_from}, and there is no recipe {before!r} "
                "that makes it: list the stages"
            )
        stages.insert(0, before)
    return stages


def _overrides(request: Request, stage: str) -> list[str]:
    return [*request.overrides, *request.stage_overrides.get(stage, [])]


def _chain(request: Request, stages: list[str], seed: int | None) -> list[Job]:
    """The stages of one seed, each waiting for the one before."""
    jobs: list[Job] = []
    made: dict[str, str] = {}  # what a recipe of this chain would call its folder, and what it is called here
    suffix = "" if seed is None else f"_seed{seed}"
    for number, stage in enumerate(stages):
        after = (jobs[-1].name,) if jobs else ()
        if re.search(r"\s", stage):
            if not jobs:
                raise ConfigError(f"stages begins with a shell command, {stage!r}: begin with a recipe")
            run_dir = jobs[-1].run_dir
            name = f"command{number}{suffix}"
            jobs.append(Job(name, (), run_dir, stage.replace("{run_dir}", run_dir), after))
            continue
        overrides = _overrides(request, stage)
        config = compose(stage, overrides, config_dir=request.config_dir)
        usual = {compose(stage, config_dir=request.config_dir).run_dir, config.run_dir}
        if seed is not None:
            overrides += [f"seed={seed}", _override("name", config.name + suffix)]
            overrides.append(_override("run_dir", config.run_dir + suffix))
        from_before = config.init_from in made
        if from_before and config.init_from is not None and made[config.init_from] != config.init_from:
            overrides.append(_override("init_from", made[config.init_from]))
        config = compose(stage, overrides, config_dir=request.config_dir)
        if config.rollout.launch and (hosts := _hosts(request)):
            overrides.append(f"rollout.server.hosts={hosts}")
            config = compose(stage, overrides, config_dir=request.config_dir)
        _validate(request, config, from_before=from_before)
        made.update(dict.fromkeys(usual, config.run_dir))
        arguments = ["--config-name", stage]
        if request.config_dir is not None:
            arguments += ["--config-dir", str(request.config_dir)]
        name = re.sub(r"[^\w.-]+", "_", config.name)
        jobs.extend(_with_servers(request, config, Job(name, (*arguments, *overrides), config.run_dir, after=after)))
    names = [job.name for job in jobs]
    if len(set(names)) < len(names):
        raise ConfigError(f"stages have the same name ({', '.join(names)}): STAGE:name=... gives one another")
    return jobs


def _servers_setting(request: Request) -> str | None:
    executor = request.executor
    return executor.servers if isinstance(executor, SlurmSettings) else None


def _hosts(request: Request) -> int:
    """Nodes that have servers, where the launcher places them."""
    executor, placed = request.executor, _servers_setting(request)
    if not isinstance(executor, SlurmSettings) or placed is None:
        return 0
    return executor.nodes if placed == SPLIT else executor.server_nodes


def _with_servers(request: Request, config: TrainConfig, job: Job) -> list[Job]:
    """The jobs of a run, its own the last: one, or two where servers have a job of their own."""
    executor, placed = request.executor, _servers_setting(request)
    if not config.rollout.launch or placed is None or not isinstance(executor, SlurmSettings):
        return [job]
    if placed == SPLIT:
        return [replace(job, servers=("--ranks", str(executor.ranks_per_node), *job.arguments))]
    if placed == NODES:
        return [replace(job, servers=job.arguments)]
    meeting = str(Path(config.rollout.server.meeting_dir or Path(config.run_dir) / "servers").resolve())
    name = f"{job.name}-servers"
    servers = Job(name, job.arguments, job.run_dir, after=job.after, serves=True, meeting=meeting)
    return [servers, replace(job, after=(), served_by=name, meeting=meeting)]


def _server_problems(executor: SlurmSettings, config: TrainConfig) -> Iterator[str]:
    """What does not fit of a run's servers and the nodes of its job."""
    server, gpus = config.rollout.server, executor.gpus_per_node
    if not config.rollout.launch:
        return
    if executor.servers is None and executor.nodes > 1 and not server.hosts:
        yield (
            f"rollout.launch=true on executor.nodes={executor.nodes}: the first rank's servers could not be reached from other "
            "nodes; choose executor.servers=split, nodes or job"
        )
    ranks = 0 if executor.servers in (NODES, JOB) else executor.ranks_per_node
    needed = ranks + server.count * server.tensor_parallel
    if gpus is not None and needed > gpus:
        yield (
            f"a node would have {ranks} ranks and rollout.server.count={server.count} servers of "
            f"rollout.server.tensor_parallel={server.tensor_parallel}, which need {needed} GPUs, and "
            f"executor.gpus_per_node={gpus}: start fewer of them"
        )


def _validate(request: Request, config: TrainConfig, *, from_before: bool) -> None:
    executor = request.executor
    try:
        # What a stage before will make is not there yet.
        checked = replace(config, init_from=None) if from_before else config
        validate(checked, world_size(request), elsewhere=isinstance(executor, SlurmSettings))
        if isinstance(executor, SlurmSettings) and (problems := list(_server_problems(executor, config))):
            raise ConfigError("\n".join(problems))
    except ConfigError as error:
        lines = [f"{config.name}: {line}" for line in str(error).splitlines()]
        if request.settings.stages is None:
            hint = "; stages=auto launches what makes it, too"
            lines = [line + hint if "makes it)" in line else line for line in lines]
        raise ConfigError("\n".join(lines)) from error
    again = isinstance(executor, TorchrunSettings) and executor.max_restarts > 0
    again = again or (isinstance(executor, SlurmSettings) and (executor.requeue or executor.retries > 0))
    if config.resume is not Resume.auto and again:
        raise ConfigError(
            f"{config.name}: resume={config.resume.name} does not go with starting a run again: choose resume=auto, or "
            "executor.requeue=false executor.retries=0 executor.max_restarts=0"
        )


def _override(key: str, value: str) -> str:
    if re.fullmatch(r"[\w./-]+", value):
        return f"{key}={value}"
    escaped = value.replace("\\", "\\\\").replace("'", "\\'")
    return f"{key}='{escaped}'"
