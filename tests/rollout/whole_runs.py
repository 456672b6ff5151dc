"""Whole runs against servers that sample for any model (`any_model_server.py`)."""

from __future__ import annotations

import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_vp2o.rollout.launch import free_port
from megatron_vp2o.tasks.tokenizer import CharTokenizer
from tests.rollout.test_pool import wait_for

ROOT = Path(__file__).resolve().parents[2]
SERVER = "tests.rollout.any_model_server"
OVERLAPPED = [
    *("--config-name", "train", "model=micro", "task.train_size=200", "task.validation_size=4", "task.test_size=4"),
    *("evaluation.problems=4", "evaluation.samples=2", "evaluation.pass_at=[1]", "evaluation.interval=3"),
    *("evaluation.final_split=false", "logging.tensorboard=false", "threads=1", "algorithm.prompts_per_step=4"),
    *("algorithm.group_size=2", "algorithm.filter_uniform_groups=false", "algorithm.entropy_coef=0.1"),
    *("rollout.sampling.max_new_tokens=8", "checkpoint.interval=2", "optimizer.lr=3e-3", "optimizer.lr_warmup_steps=1"),
    *("rollout=vllm", "rollout.ahead=1", "rollout.server.probe_tolerance=1000", "algorithm.mismatch.stop_kl=null"),
]


def answers(url: str, path: str = "/health") -> Any:
    """Whether it does, or what it says."""
    try:
        with urllib.request.urlopen(url + path, timeout=2) as answer:
            return answer.read() or True
    except OSError:
        return False


@contextmanager
def servers(seconds: float = 0.0, count: int = 1, token_s: float = 0.0) -> Iterator[list[str]]:
    """Addresses of such servers, which somebody else started as far as a run knows. A token takes `token_s` more."""
    paced = {**os.environ, "VP2O_FAKE_TOKEN_S": str(token_s)}
    tokenizer = CharTokenizer()
    urls, processes = [], []
    try:
        for _ in range(count):
            port = free_port()
            command = [SERVER, tokenizer.vocab_size, tokenizer.eos_id, seconds, port]
            processes.append(subprocess.Popen([sys.executable, "-m", *map(str, command)], cwd=ROOT, env=paced))
            urls.append(f"http://127.0.0.1:{port}")
        for url in urls:
            wait_for(lambda url=url: answers(url))  # type: ignore[misc]
        yield urls
    finally:
        for process in processes:
            process.kill()
            process.wait()


def command(run_dir: Path, urls: list[str], *more: str, ranks: int = 1) -> list[str]:
    """A run, as a user starts it."""
    torchrun = [] if ranks == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    named = [f"run_dir={run_dir}", *([f"rollout.urls=[{','.join(urls)}]"] if urls else [])]
    return [sys.executable, *torchrun, "-m", "megatron_vp2o.train", *OVERLAPPED, *named, *more]


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "2000"}


def train(run_dir: Path, urls: list[str], *more: str, ranks: int = 1) -> str:
    """Run to the end. Returns what it printed."""
    done = subprocess.run(
        command(run_dir, urls, *more, ranks=ranks),
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr
