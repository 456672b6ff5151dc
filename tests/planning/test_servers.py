"""The plan of rollout servers: against arithmetic by hand, and against files of weights that are really written."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import pytest
import torch

from megatron_vp2o.config.compose import compose
from megatron_vp2o.config.register import recipe_names
from megatron_vp2o.config.schema import TrainConfig
from megatron_vp2o.errors import ConfigError, RolloutError
from megatron_vp2o.hf.families import architecture
from megatron_vp2o.hf.settings import hf_config
from megatron_vp2o.planning.estimate import GENERATION, SYNC, plan
from megatron_vp2o.planning.hardware import DEVICES, Assumptions, hardware_of
from megatron_vp2o.planning.report import describe
from megatron_vp2o.planning.servers import ServerPlan, plan_servers
from megatron_vp2o.planning.workload import padded_vocabulary
from megatron_vp2o.rollout.launch import gpu_shares
from megatron_vp2o.rollout.weight_files import write_weights
from tools import plan as command

QWEN = "grpo_qwen3_30b_a3b_countdown4_8k_64xh100"
MODELS = [name for name in recipe_names() if name.startswith("grpo_") and name.find("_countdown4_8k_") > 0]
SERVED = ["rollout=vllm", "rollout.launch=true"]
GIB = 2**30


def servers_of(*overrides: str, recipe: str = QWEN, assumed: Assumptions | None = None) -> ServerPlan:
    config = compose(recipe, [*SERVED, *overrides])
    found = plan_servers(config, padded_vocabulary(config), DEVICES["h100"], assumed or Assumptions())
    assert found is not None
    return found


def test_memory_of_a_server_by_hand() -> None:
    """Qwen3-30B-A3B: 48 layers, 4 heads of 128 keys and values, bfloat16."""
    count = plan(compose(QWEN), 64, "h100").parameters
    for split in (1, 2, 4, 8):
        found = servers_of(f"rollout.server.tensor_parallel={split}", "rollout.server.count=2")
        a_token = 2 * 48 * max(1, 4 // split) * 128 * 2
        assert found.sequence == a_token * compose(QWEN).model.max_sequence_length
        whole = count.norms + count.router
        assert found.weights == pytest.approx(2 * ((count.total - whole) / split + whole), abs=2)
        assert found.cache == max(0, int(0.92 * 79 * GIB) - 4 * GIB - found.weights)
        assert (found.gpus, found.asked) == (2 * split, 64)
        assert found.held == min(64, found.cache // (a_token * (32 + 8192)))
    assert servers_of().transferred == 2 * count.total


def test_more_gpus_sequences_and_servers_are_faster_and_never_free() -> None:
    one = servers_of("rollout.server.count=8", "rollout.server.tensor_parallel=2")
    two = servers_of("rollout.server.count=8", "rollout.server.tensor_parallel=4")
    assert one.tokens_per_second < two.tokens_per_second < 2 * one.tokens_per_second
    assert servers_of("rollout.server.count=16", "rollout.server.tensor_parallel=2").seconds < one.seconds
    few = servers_of("rollout.server.count=8", "rollout.server.tensor_parallel=2", "rollout.server.max_num_seqs=8")
    assert few.tokens_per_second < one.tokens_per_second and few.seconds > one.seconds
    # As many launches as layers and tokens, whatever else is free.
    free = Assumptions(memory_efficiency=1e9, mfu=1e9, network_efficiency=1e9)
    assert servers_of("rollout.server.count=128", assumed=free).seconds == pytest.approx(8192 * 48 * 50e-6, rel=1e-6)


def test_experts_are_read_only_if_a_token_meets_them() -> None:
    """On average over balanced routes: drawn at random here."""
    from megatron_vp2o.planning.servers import _read_weights

    config = compose(QWEN)
    count = plan(config, 64, "h100").parameters
    draw = random.Random(0)
    for batch in (1, 5, 40):
        met = [len({e for _ in range(batch) for e in draw.sample(range(128), 8)}) for _ in range(400)]
        share = sum(met) / len(met) / 128
        expected = count.dense - count.embedding + count.experts * share
        assert _read_weights(config.model, count, batch) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("recipe", MODELS)
def test_servers_that_do_not_fit_are_refused_with_what_would(recipe: str) -> None:
    """The smallest split that is named fits, and half of it does not."""
    small = Assumptions(server_share=0.4)
    tried = servers_of("rollout.server.tensor_parallel=1", recipe=recipe, assumed=small)
    assert tried.problems
    (problem,) = tried.problems
    assert "GiB of each GPU" in problem and "choose rollout.server.tensor_parallel=" in problem
    split = int(problem.rpartition("=")[2])
    for size, good in ((split, True), (split // 2, False)):
        assert (
            servers_of(f"rollout.server.tensor_parallel={size}", recipe=recipe, assumed=small).problems == ()
        ) is good


def test_the_plan_shares_gpus_and_counts_the_servers_time(capsys: pytest.CaptureFixture[str]) -> None:
    overrides = [*SERVED, "rollout.server.count=16", "rollout.server.tensor_parallel=2"]
    made, alone = plan(compose(QWEN, overrides), 64, "h100"), plan(compose(QWEN), 32, "h100")
    assert (made.gpus, made.ranks, made.fits) == (64, 32, True) and made.servers is not None
    assert made.rank == alone.rank and made.flops.decoding == 0
    assert made.times[GENERATION] == made.servers.seconds and "decoding" not in made.times
    assert made.times[SYNC] == made.sync_seconds >= 4 * made.servers.transferred / 1e9
    assert alone.flops.scoring == 0 < made.flops.scoring  # servers' rollouts are recomputed, unless that is turned off
    unmeasured = plan(compose(QWEN, [*overrides, "algorithm.mismatch.measure=false"]), 64, "h100")
    assert unmeasured.times["forward and backward"] == alone.times["forward and backward"]
    replayed = [*overrides, "algorithm.mismatch.measure=false", "rollout.router_replay=R2"]
    assert plan(compose(QWEN, replayed), 64, "h100").flops.scoring == made.flops.scoring
    training = made.step_seconds - made.times[GENERATION] - made.times[SYNC]
    assert made.overlapped_seconds == pytest.approx(max(training, made.times[GENERATION]) + made.times[SYNC])
    assert made.step_seconds == made.synchronous_seconds == sum(made.times.values())
    ahead = plan(compose(QWEN, [*overrides, "rollout.ahead=1"]), 64, "h100")
    assert ahead.step_seconds == ahead.overlapped_seconds == made.overlapped_seconds < made.step_seconds
    slow = plan(compose(QWEN, [*overrides, "rollout.refresh_interval=4"]), 64, "h100")
    assert slow.times[SYNC] == made.times[SYNC] / 4
    assert "32 ranks train, 32 GPUs are the servers'" in describe(made)
    assert command.main([QWEN, "--no-build", "--json", *overrides]) == 0
    assert json.loads(capsys.readouterr().out)["servers"]["servers"] == 16


def test_servers_that_do_not_fit_end_the_plan_with_a_status(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = "grpo_mixtral_8x7b_countdown4_8k_64xh100"  # 93 GB of weights
    assert command.main([recipe, "--no-build", *SERVED, "rollout.server.count=32"]) == 1
    assert "SERVERS DO NOT FIT: a server with rollout.server.tensor_parallel=1 needs" in capsys.readouterr().out
    assert command.main([recipe, "--no-build", *SERVED, "rollout.server.count=64"]) == 2
    assert "take 64 of 64 GPUs, which leaves none to train on" in capsys.readouterr().err
    assert command.main([recipe, "--no-build", *SERVED, "rollout.server.tensor_parallel=3"]) == 2
    assert (
        "model.num_attention_heads=32 is not divisible by rollout.server.tensor_parallel=3" in capsys.readouterr().err
    )
    few = ["rollout.server.count=16", "rollout.server.tensor_parallel=2", "rollout.server.max_num_seqs=512"]
    assert command.main([recipe, "--no-build", *SERVED, *few, "algorithm.prompts_per_step=1024"]) == 0
    assert "warning: a server is asked for 512 sequences at once" in capsys.readouterr().out


def test_servers_by_url_take_no_gpus_of_the_run() -> None:
    urls = ["rollout=vllm", "rollout.urls=[http://a:1,http://b:1]", "rollout.server.weights_dir=/shared"]
    made = plan(compose(QWEN, urls), 64, "h100")
    assert made.ranks == 64 and made.servers is not None and (made.servers.servers, made.servers.gpus) == (2, 0)


@pytest.mark.parametrize(
    "name", [name for name in recipe_names() if "_countdown4_8k_" in name or "_countdown4_16k_" in name]
)
def test_long_recipes_fit_on_half_of_their_gpus(name: str) -> None:
    gpus, device = hardware_of(name)
    made = plan(compose(name), gpus // 2, device)
    assert made.fits, describe(made)


def test_gpus_of_a_node_are_dealt_without_overlap() -> None:
    draw = random.Random(1)
    for _ in range(200):
        ranks, servers, each = draw.randrange(5), draw.randrange(1, 4), draw.choice([1, 2, 4])
        visible = [f"GPU-{n}" for n in draw.sample(range(100), draw.randrange(1, 12))]
        if ranks + servers * each > len(visible):
            with pytest.raises(
                RolloutError, match=f"need {ranks + servers * each} GPUs, and {len(visible)} are visible"
            ):
                gpu_shares(visible, ranks, servers, each)
            continue
        shares = [share.split(",") for share in gpu_shares(visible, ranks, servers, each)]
        assert [len(share) for share in shares] == [each] * servers
        assert visible[ranks : ranks + servers * each] == [name for share in shares for name in share]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_synchronisation_is_as_many_bytes_as_planned(tmp_path: Path, precision: str) -> None:
    """Files of the tiny model's whole weights, in Hugging Face names; and their time within a factor of four of what the speed of
    half as many bytes says."""
    config = compose("train", [*SERVED, f"model.precision={precision}", "model.vocab_size=128"])
    shapes = architecture(hf_config(config.model, 128, eos_id=1, pad_id=0)).hf_tensors()
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    tensors = {name: torch.zeros(shape, dtype=dtype) for name, shape in shapes.items()}
    found = plan_servers(config, 128, DEVICES["h100"], Assumptions())
    assert found is not None
    written = write_weights(tmp_path / "all", tensors.items(), shapes, describe=lambda _: None, bucket_bytes=2**20)
    assert written.bytes == found.transferred


def test_a_synchronisation_takes_as_long_as_its_bytes(tmp_path: Path) -> None:
    config = compose("train", [*SERVED])

    def seconds(count: int) -> tuple[float, int]:
        tensors = {f"w{number}": torch.zeros(512, 512) for number in range(count)}
        shapes = {name: (512, 512) for name in tensors}
        begin = time.process_time()
        made = write_weights(tmp_path / "set", tensors.items(), shapes, describe=lambda _: None, bucket_bytes=2**22)
        return time.process_time() - begin, made.bytes

    seconds(4)
    first, size = min(seconds(8) for _ in range(3))
    speed = size / 1e9 / first
    second, twice = min(seconds(32) for _ in range(3))
    found = plan_servers(config, 128, DEVICES["h100"], Assumptions(file_gbs=speed))
    assert found is not None
    predicted = found.write_seconds * twice / found.transferred
    print(f"{speed:.2f} GB/s; predicted {predicted * 1e3:.1f} ms, measured {second * 1e3:.1f} ms")
    assert predicted / 4 < second < predicted * 4


def test_broadcasts_go_to_one_server_after_another() -> None:
    """By the plan's own account; files are read side by side."""
    for count in (1, 3):
        found = {}
        for way in ("files", "broadcast"):
            words = [*SERVED, f"rollout.server.count={count}", f"rollout.server.transfer={way}"]
            found[way] = plan_servers(
                compose("train", words), 128, DEVICES["h100"], Assumptions(file_gbs=1, broadcast_gbs=4)
            )
        files, sent = found["files"], found["broadcast"]
        assert files is not None and sent is not None and files.transferred == sent.transferred > 0
        assert sent.write_seconds == pytest.approx(files.write_seconds / 4)
        assert sent.read_seconds == pytest.approx(files.read_seconds * count / 4)


def test_nothing_is_planned_without_servers() -> None:
    config: TrainConfig = compose(QWEN)
    assert plan_servers(config, 151936, DEVICES["h100"], Assumptions()) is None
    with pytest.raises(ConfigError, match="leaves none to train on"):
        plan(compose(QWEN, [*SERVED, "rollout.server.count=8"]), 8, "h100")
