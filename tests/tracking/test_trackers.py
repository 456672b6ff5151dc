"""Trackers get copies on one rank, and wandb stays off the network."""

import glob
import os
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import pytest

from megatron_vp2o.config.schema import LoggingConfig, WandbMode
from megatron_vp2o.errors import ConfigError
from megatron_vp2o.tracking.trackers import WANDB_ID_FILE, Trackers, make_trackers

OFF = LoggingConfig(wandb=WandbMode.disabled, tensorboard=False)


class Recorder:
    """A stub tracker."""

    def __init__(self):
        self.logged, self.closed = [], []

    def log(self, step, metrics):
        self.logged.append((step, dict(metrics)))

    def close(self, failed):
        self.closed.append(failed)


@pytest.fixture
def wandb(monkeypatch):
    """A stub of the module, which keeps the arguments of `init`."""
    for name in ("WANDB_MODE", "WANDB_SILENT", "WANDB_ERROR_REPORTING"):
        monkeypatch.setenv(name, "to be restored")
    stub = types.SimpleNamespace(calls=[], finished=[], logged=[], fail=None)

    class Error(Exception):
        pass

    def init(**arguments):
        if stub.fail:
            raise Error(stub.fail)
        stub.calls.append({**arguments, "environment": os.environ["WANDB_MODE"]})
        return types.SimpleNamespace(
            log=lambda metrics, step: stub.logged.append((step, metrics)),
            finish=lambda exit_code: stub.finished.append(exit_code),
        )

    stub.init, stub.Settings, stub.errors = init, lambda **settings: settings, types.SimpleNamespace(Error=Error)
    monkeypatch.setitem(sys.modules, "wandb", stub)
    return stub


def test_only_what_was_measured_is_handed_on():
    recorder = Recorder()
    with Trackers([recorder]) as trackers:
        trackers.log(3, {"step": 3, "a/b": 0.5, "c": None})
    assert recorder.logged == [(3, {"a/b": 0.5})]
    assert recorder.closed == [False]


def test_trackers_learn_of_a_failure_and_close_once():
    recorder = Recorder()
    with pytest.raises(RuntimeError), Trackers([recorder]) as trackers:
        raise RuntimeError
    trackers.close()
    assert recorder.closed == [True]


def test_nothing_is_written_unless_asked_for(tmp_path):
    with make_trackers(OFF, tmp_path / "run", {}, rank=0) as trackers:
        trackers.log(0, {"a": 1.0})
    assert list(tmp_path.rglob("*.tfevents.*")) == []


def test_other_ranks_write_nothing_and_import_nothing(tmp_path, wandb):
    logging = LoggingConfig(wandb=WandbMode.online, tensorboard=True)
    with make_trackers(logging, tmp_path / "run", {}, rank=1) as trackers:
        trackers.log(0, {"a": 1.0})
    assert wandb.calls == []
    assert not (tmp_path / "run").exists()


def read_events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_has_the_measured_values(tmp_path):
    logging = LoggingConfig(wandb=WandbMode.disabled, tensorboard=True)
    with make_trackers(logging, tmp_path, {}, rank=0) as trackers:
        trackers.log(0, {"step": 0, "eval/coverage": 0.25, "policy/loss": None})
        trackers.log(1, {"step": 1, "eval/coverage": None, "policy/loss": 0.5})
    assert read_events(tmp_path / "tensorboard") == {"eval/coverage": [(0, 0.25)], "policy/loss": [(1, 0.5)]}


def test_tensorboard_hides_what_a_resumed_run_repeats(tmp_path):
    logging = LoggingConfig(wandb=WandbMode.disabled, tensorboard=True)
    with make_trackers(logging, tmp_path, {}, rank=0) as trackers:
        for step in range(6):
            trackers.log(step, {"loss": float(step)})
    with make_trackers(logging, tmp_path, {}, rank=0, resumed_after=3) as trackers:
        for step in range(4, 8):
            trackers.log(step, {"loss": 10.0 + step})
    found = dict(read_events(tmp_path / "tensorboard")["loss"])
    assert found == {0: 0.0, 1: 1.0, 2: 2.0, 3: 3.0, 4: 14.0, 5: 15.0, 6: 16.0, 7: 17.0}


@pytest.mark.parametrize("mode", [WandbMode.offline, WandbMode.online])
def test_wandb_gets_the_mode_whatever_the_environment_says(tmp_path, wandb, monkeypatch, mode):
    monkeypatch.setenv("WANDB_MODE", "online" if mode is WandbMode.offline else "offline")
    config = {"name": "a run", "optimizer": {"lr": 1e-3}}
    logging = LoggingConfig(wandb=mode, wandb_project="project", tensorboard=False)
    with make_trackers(logging, tmp_path, config, rank=0) as trackers:
        trackers.log(2, {"step": 2, "loss": 0.5, "x": None})
    (call,) = wandb.calls
    assert call["mode"] == call["environment"] == mode.value
    assert (call["project"], call["name"], call["config"]) == ("project", "a run", config)
    assert call["dir"] == str(tmp_path)
    assert call["settings"]["silent"] is True
    assert os.environ["WANDB_SILENT"] == "true"
    assert wandb.logged == [(2, {"loss": 0.5})]
    assert wandb.finished == [0]


def test_wandb_reports_no_crashes_when_offline(tmp_path, wandb):
    with make_trackers(LoggingConfig(wandb=WandbMode.offline, tensorboard=False), tmp_path, {}, rank=0):
        assert os.environ["WANDB_ERROR_REPORTING"] == "false"


def test_wandb_run_keeps_its_id_over_restarts(tmp_path, wandb):
    logging = LoggingConfig(wandb=WandbMode.online, tensorboard=False)
    for folder in ("a", "a", "b"):
        make_trackers(logging, tmp_path / folder, {}, rank=0).close(failed=True)
    first, again, other = (call["id"] for call in wandb.calls)
    assert first == again != other
    assert (tmp_path / "a" / WANDB_ID_FILE).read_text().strip() == first
    assert [call["resume"] for call in wandb.calls] == ["allow"] * 3
    assert wandb.finished == [1, 1, 1]


def test_a_refusal_of_wandb_says_what_to_do(tmp_path, wandb):
    wandb.fail = "No API key configured"
    with pytest.raises(ConfigError, match=r"logging\.wandb=online: .*No API key.*logging\.wandb=offline"):
        make_trackers(LoggingConfig(wandb=WandbMode.online, tensorboard=False), tmp_path, {}, rank=0)


@pytest.mark.parametrize(
    ("package", "logging", "message"),
    [
        ("tensorboard", LoggingConfig(tensorboard=True), "logging.tensorboard=true needs the package tensorboard"),
        ("wandb", LoggingConfig(wandb=WandbMode.offline), "logging.wandb=offline needs the package wandb"),
    ],
)
def test_a_missing_package_is_named(tmp_path, monkeypatch, package, logging, message):
    for name in ("WANDB_MODE", "WANDB_SILENT", "WANDB_ERROR_REPORTING"):
        monkeypatch.setenv(name, "to be restored")
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, package, None)  # Python's own way to say that there is none
    with pytest.raises(ConfigError, match=message):
        make_trackers(logging, tmp_path, {}, rank=0)


def test_real_wandb_offline_writes_a_run_and_opens_no_socket(tmp_path):
    """The real package, in a process of its own where Python's own look-ups and connections to the network fail."""
    code = textwrap.dedent(
        """
        import socket, sys
        real = socket.socket.connect
        def connect(self, address):
            if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
                raise SystemExit(f"connects to {address}")
            return real(self, address)
        def look_up(host, *rest, **more):
            raise SystemExit(f"looks up {host}")
        socket.socket.connect, socket.getaddrinfo = connect, look_up
        from megatron_vp2o.config.schema import LoggingConfig, WandbMode
        from megatron_vp2o.tracking.trackers import make_trackers
        logging = LoggingConfig(wandb=WandbMode.offline, tensorboard=False)
        with make_trackers(logging, sys.argv[1], {"name": "n", "a": {"b": 1}}, rank=0) as trackers:
            trackers.log(0, {"eval/pass@1": 0.5, "x": float("nan")})
        """
    )
    environment = {**os.environ, "WANDB_MODE": "online", "WANDB_API_KEY": "x" * 40}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "" and done.stderr == ""
    identity = (tmp_path / WANDB_ID_FILE).read_text().strip()
    (binary,) = glob.glob(str(tmp_path / "wandb" / f"offline-run-*-{identity}" / f"run-{identity}.wandb"))
    assert b"eval/pass@1" in Path(binary).read_bytes()
