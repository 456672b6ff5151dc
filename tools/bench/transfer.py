"""Seconds of a weight sync by files and by broadcast: two vLLM servers on this machine, one for each, updated in turn.

    python -m tools.bench transfer --python .venv-vllm/bin/python [--layers 8 --experts 16 --rounds 7]

A Qwen3-MoE with random weights in float32, 6.3 MB an expert and layer, so that bytes and not requests are most of it. The probe is
left out: it is the same for both. Medians, and for each way how long the first rank takes the weights before servers are asked.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from megatron_vp2o.config.schema import WeightTransfer
from megatron_vp2o.rollout.launch import ServerProcess, free_port, vllm_command, vllm_environment
from megatron_vp2o.rollout.members import Member
from megatron_vp2o.rollout.pool import ServerPool
from megatron_vp2o.rollout.transfer import BroadcastTransfer, FileTransfer, Transfer
from megatron_vp2o.tasks.tokenizer import CharTokenizer
from tools.bench.rollouts import Model


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="tools.bench transfer", description=__doc__)
    parser.add_argument("--python", default=".venv-vllm/bin/python")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args(arguments)
    model = Model(
        hidden_size=512, moe_intermediate_size=1024, num_hidden_layers=options.layers, num_experts=options.experts
    )
    shared = Path("/dev/shm")  # where files go by default
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as scratch:
        pools = {way: _pool(options.python, way, model, Path(scratch) / way.value) for way in WeightTransfer}
        try:
            _measure(pools, model, options.rounds)
        finally:
            for pool in pools.values():
                pool.close()
    return 0


def _pool(python: str, way: WeightTransfer, model: Model, folder: Path) -> ServerPool:
    limits: dict[str, Any] = {"dtype": "float32", "max_model_len": 256, "max_num_seqs": 16}
    command = vllm_command(python, **limits, cpu=True, arguments=[], transfer=way)
    process = ServerProcess(command, vllm_environment(cpu=True), free_port(), folder / "server.log")
    transfer: Transfer = FileTransfer() if way is WeightTransfer.files else BroadcastTransfer(torch.device("cpu"))
    return ServerPool(
        [Member(process.url, process)],
        shapes={name: tuple(tensor.shape) for name, tensor in model.weights()},
        describe=model.describe,
        folder=folder / "weights",
        ends=[],
        vocabulary=CharTokenizer.vocab_size,
        pad_id=CharTokenizer.pad_id,
        transfer=transfer,
    )


def _measure(pools: dict[WeightTransfer, ServerPool], model: Model, rounds: int) -> None:
    whole: dict[WeightTransfer, list[float]] = {way: [] for way in pools}
    taking: dict[WeightTransfer, list[float]] = {way: [] for way in pools}
    for way, pool in pools.items():
        pool.transfer.take = _timed(pool.transfer.take, taking[way])  # type: ignore[method-assign]
        pool.update_weights(model.weights(), 0)  # starts it
        pool.update_weights(model.weights(), 1)  # the first one is slow
        taking[way].clear()
    for version in range(2, 2 + rounds):
        for way, pool in pools.items():
            started = time.perf_counter()
            receipt = pool.update_weights(model.weights(), version)
            whole[way].append(time.perf_counter() - started)
    print(f"{receipt.tensors} tensors, {receipt.bytes / 2**20:.0f} MiB, medians of {rounds} syncs each, in turn")
    for way in pools:
        median, first = statistics.median(whole[way]), statistics.median(taking[way])
        print(
            f"{way.value}: {median:.2f} s ({receipt.bytes / 1e9 / median:.2f} GB/s), of these {first:.2f} s taking them"
        )


def _timed(action: Any, seconds: list[float]) -> Any:
    def timed(*arguments: Any) -> Any:
        started = time.perf_counter()
        try:
            return action(*arguments)
        finally:
            seconds.append(time.perf_counter() - started)

    return timed
