"""The frame of the command line: status, one-line errors, sweeps, ranks, and no torch before it is needed."""

import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_vp2o import cli
from megatron_vp2o.config.schema import TrainConfig
from megatron_vp2o.errors import CheckpointError


class Run:
    """A command line that has ended."""

    def __init__(self, status: int, configs: list[TrainConfig], output: str, errors: str) -> None:
        self.status, self.configs, self.output, self.errors = status, configs, output, errors


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Calls main_with_config in this process, in an empty folder, with the given arguments."""
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "HYDRA_FULL_ERROR"):
        monkeypatch.delenv(name, raising=False)
    root = logging.getLogger()
    handlers, level, own_level = root.handlers[:], root.level, logging.getLogger("megatron_vp2o").level

    def call(*arguments: str, action=lambda config: 0) -> Run:
        monkeypatch.setattr(sys, "argv", ["train", *arguments])
        configs = []

        def run(config: TrainConfig) -> int:
            configs.append(config)
            return action(config)

        try:
            cli.main_with_config(run)
            status = 0
        except SystemExit as ended:
            assert isinstance(ended.code, int)
            status = ended.code
        captured = capsys.readouterr()
        return Run(status, configs, captured.out, captured.err)

    yield call
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.getLogger("megatron_vp2o").setLevel(own_level)


def test_a_recipe_runs_by_name_and_leaves_the_folder_alone(command, tmp_path):
    result = command("--config-name", "countdown_tiny_supervised", "algorithm.steps=51")
    assert (result.status, result.errors) == (0, "")
    (config,) = result.configs
    assert (config.name, config.algorithm.steps) == ("countdown_tiny_supervised", 51)
    assert list(tmp_path.iterdir()) == []


def test_the_status_of_the_run_is_the_status_of_the_process(command):
    assert command(action=lambda config: 75).status == 75


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["algorithm.grup_size=4"],
            ["there is no setting 'algorithm.grup_size'; did you mean 'algorithm.group_size'?"],
        ),
        (["--config-name", "nope"], ["--config-name nope: there is no such recipe"]),
        (["--config-dir", "nowhere"], ["--config-dir nowhere is not a folder"]),
        (["--cfg", "job", "foo=1"], ["there is no setting 'foo'"]),
        (["--multirun", "foo=1,2"], ["there is no setting 'foo'"]),
        (["run_dir=${nope}"], ["run_dir: Interpolation key 'nope' not found"]),
        (
            ["algorithm.group_size=1", "model.moe_router_topk=17"],
            ["model.moe_router_topk=17", "algorithm.group_size=1"],
        ),
    ],
)
def test_a_mistake_ends_with_status_2_and_a_line_each(command, tmp_path, arguments, expected):
    result = command(*arguments)
    assert (result.status, result.configs) == (2, [])
    lines = result.errors.strip().split("\n")
    assert len(lines) == len(expected)
    for line, part in zip(lines, expected, strict=True):
        assert line.startswith("error: ") and part in line
    assert list(tmp_path.iterdir()) == [] or "--multirun" in arguments
    assert "HYDRA_FULL_ERROR" not in os.environ


def test_a_users_error_in_the_run_has_no_traceback(command):
    def action(config):
        raise CheckpointError("checkpoint x is damaged: remove it")

    result = command(action=action)
    assert (result.status, result.errors) == (2, "error: checkpoint x is damaged: remove it\n")


def test_a_defect_keeps_its_traceback(command):
    def action(config):
        raise ValueError("a defect")

    result = command(action=action)
    assert result.status == 1
    assert "Traceback" in result.errors and "ValueError: a defect" in result.errors


def test_tracebacks_on_request(command, monkeypatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(Exception, match="grup_size"):
        command("algorithm.grup_size=4")
    assert os.environ["HYDRA_FULL_ERROR"] == "1"


def test_a_users_folder_comes_first(command, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "countdown_tiny_grpo.yaml").write_text("defaults: [train, _self_]\nname: mine\n")
    result = command("--config-dir", "mine", "--config-name", "countdown_tiny_grpo")
    assert [config.name for config in result.configs] == ["mine"]


def test_every_job_of_a_sweep_has_a_folder_of_its_own(command, tmp_path):
    result = command("--multirun", "algorithm.group_size=4,8", "algorithm.steps=3", "name=x")
    assert result.status == 0
    assert [config.algorithm.group_size for config in result.configs] == [4, 8]
    assert [config.run_dir for config in result.configs] == [
        "runs/x/algorithm.group_size=4",
        "runs/x/algorithm.group_size=8",
    ]
    assert [config.name for config in result.configs] == ["x,algorithm.group_size=4", "x,algorithm.group_size=8"]
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()] == [
        "runs/x/multirun.yaml"
    ]


def test_a_sweep_over_paths_and_one_value_only(command):
    result = command("--multirun", "notes=a/b,c")
    assert [config.run_dir for config in result.configs] == ["runs/run/notes=a_b", "runs/run/notes=c"]
    assert [config.run_dir for config in command("--multirun", "seed=3").configs] == ["runs/run/0"]


def test_a_sweep_ends_at_the_first_job_that_fails(command):
    result = command("--multirun", "seed=1,2", action=lambda config: 70 + config.seed)
    assert (result.status, [config.seed for config in result.configs]) == (71, [1])


def test_only_rank_0_keeps_the_record_of_a_sweep(command, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = command("--multirun", "seed=1,2")
    assert [config.run_dir for config in result.configs] == ["runs/run/seed=1", "runs/run/seed=2"]
    assert list(tmp_path.iterdir()) == []


def test_the_world_is_taken_from_the_environment(command, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert "3 processes" in command("parallel.tensor_parallel=2").errors


def test_other_ranks_let_rank_0_speak_first(command, monkeypatch):
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = command("algorithm.grup_size=4")
    assert waited == [cli._FIRST_WORD_SECONDS]  # torchrun has ended this rank by then, if rank 0 has failed too
    assert result.errors.startswith("error: rank 1: there is no setting")


def test_verbose_shows_debug_messages_and_else_only_ours(command):
    def action(config):
        logging.getLogger("megatron_vp2o.x").info("ours")
        logging.getLogger("elsewhere").info("theirs")
        logging.getLogger("elsewhere").debug("detail")
        return 0

    quiet = command(action=action).errors
    assert "ours" in quiet and "theirs" not in quiet
    verbose = command("hydra.verbose=true", action=action).errors
    assert "ours" in verbose and "theirs" in verbose and "detail" in verbose


def test_cfg_job_prints_the_composed_configuration(command):
    result = command("--cfg", "job", "-p", "optimizer", "optimizer.lr=0.5")
    assert (result.status, result.configs) == (0, [])
    assert "lr: 0.5\n" in result.output


def test_help_lists_recipes_groups_and_settings(command):
    result = command("--help")
    assert result.status == 0
    for part in ("countdown_tiny_grpo", "model: ", "micro, ", "max_sequence_length: 64", "docs/configuration.md"):
        assert part in result.output


@pytest.mark.parametrize("arguments", [["--help"], ["--cfg", "job"], ["algorithm.group_size=1"]])
def test_the_entry_point_imports_nothing_heavy_before_the_run(tmp_path, arguments):
    program = (
        "import atexit, runpy, sys\n"
        "heavy = ('torch', 'megatron.core', 'transformers', 'numpy')\n"
        "atexit.register(lambda: print('HEAVY', [name for name in heavy if name in sys.modules]))\n"
        "runpy.run_module('megatron_vp2o.train', run_name='__main__', alter_sys=True)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        timeout=60,
    )
    assert "HEAVY []" in done.stdout, done.stderr


def test_a_fixed_setting_does_not_enter_the_folders_of_a_sweep_however_it_is_spelt(command):
    fixed = ["model.recompute=false", "optimizer.lr=1e-3", "logging.wandb_project='a b'", "evaluation.pass_at=[1, 4]"]
    result = command("--multirun", *fixed, "seed=1,2")
    assert [config.run_dir for config in result.configs] == ["runs/run/seed=1", "runs/run/seed=2"]


def test_overrides_may_stand_on_both_sides_of_an_option(command):
    result = command(
        "seed=1,2", "--multirun", "algorithm.steps=51", "--config-name", "countdown_tiny_supervised", "name=x"
    )
    assert (result.status, result.errors) == (0, "")
    assert [(config.seed, config.algorithm.steps, config.name) for config in result.configs] == [
        (1, 51, "x,seed=1"),
        (2, 51, "x,seed=2"),
    ]
    result = command("optimizer.lr=0.5", "--cfg", "job", "-p", "optimizer", "optimizer.min_lr=0.1")
    assert "lr: 0.5\n" in result.output and "min_lr: 0.1\n" in result.output


def test_a_sweep_over_many_settings_has_folders_that_a_file_system_takes(command, tmp_path):
    swept = [
        "algorithm.trust_region.max_consecutive_rejections=7,8",
        "algorithm.stein.initial_power_iterations=33,34",
        "algorithm.specialization.orthogonality_token_fraction=0.5",
        "algorithm.trust_region.contexts_per_rank=77",
        f"notes={'y' * 300},{'z' * 300}",
    ]

    def action(config):
        Path(config.run_dir).mkdir(parents=True)
        return 0

    result = command("algorithm=vp2o", "--multirun", *swept, action=action)
    folders = [path.name for path in (tmp_path / "runs" / "run").iterdir() if path.is_dir()]
    assert (result.status, len(folders)) == (0, 8)
    assert all("max_consecutive_rejections=" in name and "contexts" not in name for name in folders)


@pytest.mark.parametrize("name", ["2026_11_26", "1e3", "007", "true", "0x10"])
def test_a_name_that_looks_like_a_number_stays_as_it_is(command, tmp_path, name):
    assert [config.run_dir for config in command(f"name={name}").configs] == [f"runs/{name}"]
    (tmp_path / "mine.yaml").write_text(f"defaults: [train, _self_]\nname: {name}\n")
    assert [config.name for config in command("--config-dir", ".", "--config-name", "mine").configs] == [name]
    swept = command("--multirun", f"name={name},other")
    assert [config.name for config in swept.configs] == [f"{name},name={name}", "other,name=other"]
