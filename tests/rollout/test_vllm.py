"""Against a real vLLM server on this machine: `make test-vllm` makes its environment and runs these.

The contract of engines, with transformers as the independent reference; faults of syncs and of processes; and GRPO and VP2O
trained through servers, beside the embedded engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_vp2o.config.schema import WeightTransfer
from megatron_vp2o.errors import SyncError
from megatron_vp2o.rollout.answers import RoutesAsked
from megatron_vp2o.rollout.api import GENERATE, Server
from megatron_vp2o.rollout.contract import PROMPTS, SAMPLING, ClosingContract, EngineContract, check_form
from megatron_vp2o.rollout.launch import ServerProcess, free_port, vllm_command, vllm_environment
from megatron_vp2o.rollout.members import Member
from megatron_vp2o.rollout.pool import ServerPool
from megatron_vp2o.rollout.pool_settings import PoolSettings
from megatron_vp2o.rollout.protocol import Probe
from megatron_vp2o.rollout.pulse import Pulse
from megatron_vp2o.rollout.transfer import BroadcastTransfer
from megatron_vp2o.rollout.weight_files import WeightSet
from megatron_vp2o.tracking.record import read
from tests.rollout.test_pool import alive, descendants, wait_for

ROOT = Path(__file__).resolve().parents[2]
PYTHON = Path(os.environ.get("VP2O_VLLM_PYTHON", ROOT / ".venv-vllm" / "bin" / "python"))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(not PYTHON.is_file(), reason=f"no vLLM at {PYTHON}: make test-vllm makes its environment"),
]

VOCABULARY, END, PAD = 64, 2, 0


class VLLMHarness:
    """Two tiny Qwen3-MoE models, and a server that holds either; with `routes` it says where tokens went. `broadcast`: weights come
    by it, in buckets of 100 kB, to `workers` of the server."""

    vocabulary, end, tolerance = VOCABULARY, END, 2e-5

    def __init__(
        self,
        folder: Path,
        routes: RoutesAsked | None = None,
        arguments: Sequence[str] = (),
        in_flight_updates: bool = False,
        broadcast: bool = False,
        workers: int = 1,
    ) -> None:
        self.models = [_model(seed) for seed in (0, 1)]
        limits: dict[str, Any] = {"dtype": "float32", "max_model_len": 256, "max_num_seqs": 64}
        command = vllm_command(
            str(PYTHON),
            **limits,
            cpu=True,
            arguments=list(arguments),
            tensor_parallel=workers,
            routes=routes is not None,
            transfer=WeightTransfer.broadcast if broadcast else WeightTransfer.files,
        )
        self.process = ServerProcess(command, vllm_environment(cpu=True), free_port(), folder / "server.log")
        self.engine = ServerPool(
            [Member(self.process.url, self.process)],
            shapes={name: tuple(tensor.shape) for name, tensor in self.weights(0)},
            describe=lambda where: self.models[0].config.save_pretrained(where),
            folder=folder / "weights",
            ends=[END],
            vocabulary=VOCABULARY,
            pad_id=PAD,
            settings=PoolSettings(
                startup_s=400.0, request_timeout_s=120.0, batch_timeout_s=600.0, in_flight_updates=in_flight_updates
            ),
            routes=routes,
            transfer=BroadcastTransfer(torch.device("cpu"), bucket_bytes=10**5) if broadcast else None,
        )

    def weights(self, model: int) -> Iterator[tuple[str, Tensor]]:
        """In the names of checkpoints, in which experts are apart."""
        for name, tensor in self.models[model].state_dict().items():
            if name.endswith("mlp.experts.gate_up_proj"):
                stem = name.removesuffix("gate_up_proj")
                for expert, both in enumerate(tensor):
                    gate, up = both.chunk(2)
                    yield f"{stem}{expert}.gate_proj.weight", gate
                    yield f"{stem}{expert}.up_proj.weight", up
            elif name.endswith("mlp.experts.down_proj"):
                stem = name.removesuffix("down_proj")
                for expert, down in enumerate(tensor):
                    yield f"{stem}{expert}.down_proj.weight", down
            else:
                yield name, tensor

    @torch.no_grad()
    def log_probs(self, model: int, tokens: Sequence[int], temperature: float) -> list[float]:
        logits = self.models[model](torch.tensor([list(tokens)])).logits[0].float()
        logp_SV = (logits / temperature).log_softmax(-1)
        return [float(logp_SV[s, token]) for s, token in enumerate(tokens[1:])]

    def probe(self, model: int) -> Probe:
        tokens = [[5, 6, 7, 9, 11], [8, 3, 2, 40]]
        return Probe(tokens, [self.log_probs(model, row, 1.0) for row in tokens], self.tolerance)

    def check(self, model: int) -> None:
        """Whole groups, with the log-probabilities of a model."""
        rollouts = self.engine.generate(PROMPTS, range(4), SAMPLING, group_size=4)
        check_form(rollouts, [prompt for prompt in PROMPTS for _ in range(4)], SAMPLING, self)
        for n in range(0, 16, 5):
            length, total = int(rollouts.prompt_len_N[n]), int(rollouts.total_len_N[n])
            wanted = self.log_probs(model, rollouts.tokens_NS[n, :total].tolist(), 1.0)[length - 1 :]
            assert rollouts.model_logprobs_NS[n, length:total].tolist() == pytest.approx(wanted, abs=self.tolerance)


def _model(seed: int) -> Any:
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        moe_intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,  # vLLM has no attention of 16 on CPUs
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        pad_token_id=PAD,
        eos_token_id=END,
        decoder_sparse_step=1,
        initializer_range=0.12,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        model.lm_head.weight[END] += 0.02  # a few percent of the tokens
    model.config.architectures = ["Qwen3MoeForCausalLM"]
    return model


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VLLMHarness]:
    made = VLLMHarness(tmp_path_factory.mktemp("vllm"))
    yield made
    made.engine.close()
    assert not made.process.running


class TestVLLM(EngineContract):
    """The contract, by the module's server."""


@pytest.mark.parametrize(
    ("victim", "moment"),
    [
        ("api_server", "generating"),
        ("EngineCore", "generating"),
        ("api_server", "syncing"),
        ("EngineCore", "syncing"),
    ],
)
def test_a_process_is_killed(harness: VLLMHarness, monkeypatch: pytest.MonkeyPatch, victim: str, moment: str) -> None:
    """kill -9 with requests in flight, or between two files of a sync: the server is restarted with the present weights, and lost
    prompts run again."""
    kill_and_look(harness, monkeypatch, victim, moment)


def test_a_worker_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of the two processes among which a server splits its layers."""
    made = VLLMHarness(tmp_path, workers=2)
    try:
        kill_and_look(made, monkeypatch, "Worker", "generating")
    finally:
        made.engine.close()


def kill_and_look(harness: VLLMHarness, monkeypatch: pytest.MonkeyPatch, victim: str, moment: str) -> None:
    pool = harness.engine
    pool.update_weights(harness.weights(0), 1, harness.probe(0))
    restarts, guard = pool.restarts, harness.process._guard
    assert guard is not None
    processes = descendants(guard.pid)
    assert len(processes) >= 2
    post = Server._post
    began: list[str] = []
    killed: list[bool] = []

    async def kill_meanwhile(server: Server, path: str, *arguments: Any, **named: Any) -> Any:
        asked = asyncio.ensure_future(post(server, path, *arguments, **named))
        if not began and path == (GENERATE if moment == "generating" else "/update_weights"):
            began.append(path)
            await asyncio.sleep(0.02)
            killed.append(asked.done())
            os.kill(next(pid for pid in processes if victim in _command_line(pid)), signal.SIGKILL)
        return await asked

    if moment == "syncing":
        monkeypatch.setattr(Server, "_post", kill_meanwhile)
    pool.update_weights(harness.weights(1), 2, harness.probe(1))
    if moment == "generating":
        monkeypatch.setattr(Server, "_post", kill_meanwhile)
    harness.check(1)
    assert len(killed) == 1 and (moment == "syncing" or killed == [False]), "it was killed with the request in flight"
    assert pool.restarts == restarts + 1
    assert not any(alive(pid) for pid in processes)


@pytest.mark.parametrize("victim", ["api_server", "EngineCore"])
def test_a_server_is_dead_before_it_is_asked(harness: VLLMHarness, victim: str) -> None:
    """The front is stopped and stays, or the engine is killed, while nobody asks for anything: looks at its health find it out long
    before a request would, and the next update finds a server that works."""
    pool = harness.engine
    pool.update_weights(harness.weights(0), 1, harness.probe(0))
    restarts, guard = pool.restarts, harness.process._guard
    assert guard is not None
    processes = descendants(guard.pid)
    number = signal.SIGSTOP if victim == "api_server" else signal.SIGKILL
    os.kill(next(pid for pid in processes if victim in _command_line(pid)), number)
    start = time.monotonic()
    wait_for(lambda: pool.restarts == restarts + 1, 100)
    print(f"{victim}: replaced after {time.monotonic() - start:.0f} s")
    wait_for(lambda: pool.members[0].mends == 1, 400)  # an update before that removes the weights from which it starts
    pool.update_weights(harness.weights(1), 2, harness.probe(1))
    harness.check(1)
    assert pool.restarts == restarts + 1 and not any(alive(pid) for pid in processes)


def test_a_busy_server_is_left_alone(harness: VLLMHarness) -> None:
    """Generation takes several times as long as the server may be silent."""
    pool = harness.engine
    pool.update_weights(harness.weights(0), 1, harness.probe(0))
    restarts, pulse = pool.restarts, pool._pulses[harness.process.url]
    quick = Pulse(pulse._server, 3.0, every_s=0.5)
    pool._pulses[harness.process.url] = quick
    pool._do(pool._unwatch_all())
    pool._do(pool._watch_all())
    looks: list[float] = []
    look = quick.look

    async def counted() -> str:
        looks.append(time.monotonic())
        return await look()

    quick.look = counted  # type: ignore[method-assign]
    try:
        start = time.monotonic()
        while time.monotonic() < start + 12:
            prompts = [[3 + number % 60, 5] for number in range(32)]
            rollouts = pool.generate(prompts, range(32), replace(SAMPLING, max_new_tokens=240), group_size=8)
            assert len(rollouts.total_len_N) == 256
        assert len([at for at in looks if at > start]) >= 6
        assert pool.restarts == restarts and not quick.why
    finally:
        pool._pulses[harness.process.url] = pulse
        pool._do(pool._unwatch_all())
        pool._do(pool._watch_all())


def _truncated(weights: WeightSet) -> WeightSet:
    path = weights.folder / weights.files[-1].name
    os.truncate(path, path.stat().st_size // 2)
    return weights


def _without_files(weights: WeightSet) -> WeightSet:
    return WeightSet(weights.folder, ())


def _half_of_it(weights: WeightSet) -> WeightSet:
    """A set that is whole by its own account, and half a model."""
    return WeightSet(weights.folder, weights.files[: len(weights.files) // 2])


@pytest.mark.parametrize("spoil", [_truncated, _without_files, _half_of_it])
def test_a_sync_that_is_not_whole(harness: VLLMHarness, monkeypatch: pytest.MonkeyPatch, spoil: Any) -> None:
    """Three tries fail, the last after a restart; a whole good set puts all right again."""
    from megatron_vp2o.rollout import transfer

    harness.engine.update_weights(harness.weights(0), 1, harness.probe(0))
    write = transfer.write_weights
    monkeypatch.setattr(
        transfer, "write_weights", lambda *args, **more: spoil(write(*args, **more | {"bucket_bytes": 10**5}))
    )
    with pytest.raises(SyncError, match="no server took version 2"):
        harness.engine.update_weights(harness.weights(1), 2, harness.probe(1))
    monkeypatch.setattr(transfer, "write_weights", write)
    harness.engine.update_weights(harness.weights(1), 3, harness.probe(1))
    harness.check(1)


def test_weights_of_another_model(harness: VLLMHarness) -> None:
    with pytest.raises(SyncError, match="log-probabilities differ from the trainer's by up to"):
        harness.engine.update_weights(harness.weights(1), 1, harness.probe(0))
    harness.engine.update_weights(harness.weights(0), 2, harness.probe(0))
    harness.check(0)


class TestVLLMEnd(ClosingContract):
    """Last: it closes the module's server."""


def test_a_killed_trainer_leaves_no_server(tmp_path: Path) -> None:
    """kill -9 of a run with requests in flight."""
    arguments = train_arguments("countdown_tiny_grpo", tmp_path / "run", "init_from=null", "algorithm.steps=1000")
    run = subprocess.Popen(
        [sys.executable, "-m", "megatron_vp2o.train", *arguments, *SERVED],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(lambda: len(_steps(tmp_path / "run")) > 2 or run.poll() is not None, 400)
        assert run.poll() is None
        left = descendants(run.pid)
        assert len(left) >= 3
    finally:
        run.kill()
        run.wait()
    wait_for(lambda: not any(alive(pid) for pid in left))


def test_a_run_outlives_its_servers(tmp_path: Path) -> None:
    """rollout.launch=true: two ranks, and front and engine of their server are killed in turn, at any moment; all steps are there,
    and all rollouts came from weights that the trainer knows."""
    run_dir, killed = tmp_path / "run", 0
    arguments = train_arguments("countdown_tiny_grpo", run_dir, "init_from=null", "algorithm.steps=12")
    with (tmp_path / "output.txt").open("wb") as output:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        run = subprocess.Popen(
            [*torchrun, "-m", "megatron_vp2o.train", *arguments, *SERVED],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        for steps, victim in ((2, "api_server"), (6, "EngineCore")):
            wait_for(lambda n=steps: len(_steps(run_dir)) >= n or run.poll() is not None, 400)  # type: ignore[misc]
            assert run.poll() is None, (tmp_path / "output.txt").read_text()[-3000:]
            mine = [
                pid
                for pid in descendants(run.pid)
                if victim in _command_line(pid) and "guard.py" not in _command_line(pid)
            ]
            os.kill(mine[0], signal.SIGKILL)
            killed += 1
        assert run.wait(600) == 0, (tmp_path / "output.txt").read_text()[-3000:]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
        run.wait()
    assert killed == 2 and _steps(run_dir)[-1] == 12
    assert (run_dir / "server0.log").read_text(errors="replace").count("--- start ") == 3
    assert max(measured(run_dir, "policy/logprob_mismatch")) <= 1e-4


def _command_line(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    return ""


SERVED = ["rollout=vllm", "rollout.launch=true", f"rollout.server.python={PYTHON}"]
MICRO = [
    "model=micro",
    "task.validation_size=100",
    "task.test_size=8",
    "evaluation.problems=100",
    "evaluation.samples=8",
    "evaluation.pass_at=[1,8]",
    "evaluation.interval=0",
    "evaluation.final_split=false",
    "logging.tensorboard=false",
    "threads=1",
]


def train_arguments(recipe: str, run_dir: Path, *more: str) -> list[str]:
    return ["--config-name", recipe, f"run_dir={run_dir}", *MICRO, *more]


def _steps(run_dir: Path) -> list[Any]:
    with contextlib.suppress(OSError, ValueError, KeyError):
        return list(read(run_dir)["step"]) if (run_dir / "metrics.jsonl").is_file() else []
    return []


def train(recipe: str, run_dir: Path, *more: str) -> Path:
    done = subprocess.run(
        [sys.executable, "-m", "megatron_vp2o.train", *train_arguments(recipe, run_dir, *more)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return run_dir


@pytest.fixture(scope="module")
def warm_up(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train("countdown_tiny_supervised", tmp_path_factory.mktemp("warm-up") / "run", "algorithm.steps=250")


def measured(run_dir: Path, key: str) -> list[float]:
    return [float(value) for value in read(run_dir)[key] if value is not None]


@pytest.mark.parametrize("recipe", ["countdown_tiny_grpo", "countdown_tiny_vp2o"])
def test_training_through_a_server(warm_up: Path, recipe: str) -> None:
    """30 steps beside the embedded engine: equal log-probabilities after each sync, and as much learnt."""
    shared = [f"init_from={warm_up}", "algorithm.steps=30", "algorithm.prompts_per_step=64", "algorithm.minibatches=2"]
    start = time.monotonic()
    served = train(recipe, warm_up.parent / f"{recipe}_served", *shared, *SERVED)
    seconds = time.monotonic() - start
    embedded = train(recipe, warm_up.parent / f"{recipe}_embedded", *shared)
    assert max(measured(served, "policy/logprob_mismatch")) <= 1e-4
    assert max(measured(served, "mismatch/kl")) <= 1e-8
    refreshes = int(measured(served, "actor/refreshes")[-1])
    assert refreshes == 30 if "grpo" in recipe else 1 <= refreshes <= 30
    accuracy = {run: measured(run, "eval/pass@1") for run in (served, embedded)}
    assert accuracy[served][0] == accuracy[embedded][0], "both start from the same weights"
    gained = {run: values[-1] - values[0] for run, values in accuracy.items()}
    syncs = measured(served, "time/sync_s")
    later = sorted(seconds for seconds in syncs[1:] if seconds > 0.01)
    print(
        f"{recipe}: {seconds:.0f} s, {refreshes} refreshes, sync median {later[len(later) // 2] if later else 0:.2f} s, "
        f"first {syncs[0]:.0f} s, mismatch at most {max(measured(served, 'policy/logprob_mismatch')):.1e}, pass@1 "
        f"{accuracy[served]} served, {accuracy[embedded]} embedded"
    )
    assert abs(gained[served] - gained[embedded]) < 0.06, accuracy
