"""The planner's numbers, by hand, and its Stein bytes against the exchange itself."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from typing import Any

import pytest
import torch

from megatron_vp2o.config.compose import compose
from megatron_vp2o.config.register import recipe_names
from megatron_vp2o.config.schema import ModelConfig, TrainConfig
from megatron_vp2o.errors import ConfigError
from megatron_vp2o.parallel.exchange import ExpertExchange, Members, Unit
from megatron_vp2o.planning.estimate import plan, suggest
from megatron_vp2o.planning.hardware import Assumptions, hardware_of
from megatron_vp2o.planning.memory import memory, static_memory
from megatron_vp2o.planning.report import describe, layouts
from megatron_vp2o.planning.traffic import SteinTraffic, stein_traffic, traffic
from megatron_vp2o.planning.workload import CHARACTERS, workload
from megatron_vp2o.tasks.tokenizer import CharTokenizer
from tools import plan as command
from tools import simulate as simulate_command

LARGE = "vp2o_33b_a4b_countdown4_8k_64xh100"
EXPERTS = 4 * 16 * 3 * 128 * 64  # of the tiny model
DENSE = 4 * (128 * 32 * 12 + 16 * 128 + 2 * 128 + 2 * 32) + 128 + 2 * 128 * 128  # ... with 128 rows of embedding


def test_importing_the_planner_imports_no_torch() -> None:
    code = (
        "import sys, megatron_vp2o.planning.report, megatron_vp2o.planning.estimate; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_static_memory_of_the_tiny_model_on_one_rank() -> None:
    total = EXPERTS + DENSE
    expected = {"weights": 4 * total, "gradients": 4 * total, "optimizer": 8 * total}
    assert static_memory(compose("train"), 1, 128) == expected


def test_resident_memory_of_vp2o_with_sharded_bfloat16() -> None:
    overrides = ["algorithm=vp2o", "algorithm.kl_reference=initial", "model.precision=bf16"]
    overrides += ["parallel.expert_parallel=2", "parallel.distributed_optimizer=true"]
    config = compose("train", overrides)
    found = memory(config, 4, 128, workload(config, 4, Assumptions()), Assumptions()).resident
    total, owned = EXPERTS // 2 + DENSE, EXPERTS // 2 // 2 + DENSE // 4
    contexts = 4 * 1 * 1024  # logged for one update: four for each that is looked at
    assert found == {
        "weights": 2 * total,
        "gradients": 4 * total,
        "optimizer": 12 * owned,
        "actor weights": 2 * total,
        "Stein state": 4 * (2 * 16 * 16 + 16 * 129) * 4,
        "Stein chunk": 256 * 2**20,
        "KL reference": 2 * total,
        "anchor": 4 * 16 * 128 * 6,
        "contexts": 1024 * 4 * 128 * 2 + contexts * 4 * 16 * 4,
        "snapshot": 12 * owned,
    }


def test_what_a_rank_of_the_33b_recipe_does() -> None:
    """128 prompts x 8 over 32 data-parallel ranks, four minibatches of single rows."""
    work = workload(compose(LARGE), 64, Assumptions())
    assert (work.rows, work.decoded, work.updates, work.micro_batches, work.micro_rows) == (32, 32, 4, 32, 1)
    assert (work.tokens, work.longest, work.decoded_at_once) == (32 + 8192, 8224, 16)
    pretraining = workload(compose("vp2o_33b_a4b_indexed_pretraining_64xh100"), 64, Assumptions())
    assert (pretraining.rows, pretraining.tokens, pretraining.decoded, pretraining.evaluated_at_once) == (
        32,
        4096,
        0,
        0,
    )


def test_packed_rows_fill_micro_batches_up_to_their_tokens() -> None:
    short = Assumptions(response_share=0.125)  # rows of 32 + 1024 tokens on average, at most of 32 + 8192
    padded = workload(compose(LARGE), 64, short)
    packed = workload(compose(LARGE, ["algorithm.micro_batch_tokens=16384"]), 64, short)
    assert (padded.micro_batches, padded.micro_tokens, padded.passed) == (32, 8224, 32 * 1056)
    assert (packed.micro_batches, packed.micro_rows, packed.micro_tokens, packed.passed) == (4, 8, 16384, 32 * 1056)
    # a row beyond the budget has a micro-batch of its own
    small = workload(compose(LARGE, ["algorithm.micro_batch_tokens=2048"]), 64, short)
    assert (small.micro_rows, small.micro_tokens, small.micro_batches) == (1, 8224, 32)


def test_a_shared_prompt_is_work_once() -> None:
    """Eight rows of 512 + 1024 tokens: 8 x 1024 + 512 are computed in place of 8 x 1536."""
    assumed = Assumptions(prompt_tokens=512, response_share=0.125)
    budget = "algorithm.micro_batch_tokens=8704"
    apart = workload(compose(LARGE, [budget, "algorithm.prefix_sharing=off"]), 64, assumed)
    shared = workload(compose(LARGE, [budget, "algorithm.prefix_sharing=on"]), 64, assumed)
    assert (apart.computed, apart.passed, apart.pairs) == (1536, 32 * 1536, 1536**2)
    assert (shared.computed, shared.passed, shared.pairs) == (1088, 32 * 1088, 1024 * 1536 + 512**2 / 8)
    assert (apart.micro_rows, shared.micro_rows) == (5, 8)
    auto = [
        workload(compose(LARGE, [budget, f"model.implementation={kind}"]), 64, assumed).computed
        for kind in ("local", "auto")
    ]
    assert auto == [1088, 1536]  # auto may be transformer-engine, which shares nothing


def test_constants_are_those_of_the_program() -> None:
    from megatron_vp2o.planning import memory as planned
    from megatron_vp2o.session import LOGGED_PER_CONTEXT

    assert (CharTokenizer.vocab_size, LOGGED_PER_CONTEXT) == (CHARACTERS, planned.LOGGED_PER_CONTEXT)


class _Group:
    """A process group's size and place in it, for the layout of the exchange; nothing is sent."""

    def __init__(self, size: int) -> None:
        self._size = size

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return self._size


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_stein_bytes_are_those_of_the_exchange(ranks: int) -> None:
    model = ModelConfig()
    local, width = model.num_moe_experts // ranks, model.hidden_size * model.moe_ffn_hidden_size
    units = [
        Unit(layer, [torch.empty(columns, device="meta") for _ in range(local)], [[(0, columns)] for _ in range(local)])
        for layer in range(model.num_layers)
        for columns in (2 * width, width)
    ]
    group: Any = _Group(ranks)
    members = Members(group, list(range(ranks)), [0] * ranks)
    exchange = ExpertExchange(units, members, model.num_moe_experts, 256 * 2**20)
    found = stein_traffic(compose("train", ["algorithm=vp2o", f"parallel.expert_parallel={ranks}"]), ranks)
    assert found is not None
    assert found.exact_bytes == exchange.bytes_sent <= found.most_bytes
    if ranks > 1:
        assert found.most_bytes == 2 * EXPERTS // ranks * 4


def test_stein_bytes_with_sharded_gradients() -> None:
    """33B on 64 GPUs: 48 layers of 128 experts of 3 x 2048 x 832, every rank one of 16 x 4."""
    found = stein_traffic(compose(LARGE), 64)
    assert found == SteinTraffic(64, 64, 2 * (48 * 128 * 3 * 2048 * 832) // 64 * 4, None)
    assert stein_traffic(compose(LARGE.replace("vp2o", "grpo")), 64) is None


def test_only_what_a_layout_needs_is_sent() -> None:
    config = compose("train")
    assert traffic(config, 1, 128, workload(config, 1, Assumptions())) == {}
    two = traffic(config, 2, 128, workload(config, 2, Assumptions()))
    assert {name: stream.bytes for name, stream in two.items()} == {
        "gradients (dense)": DENSE * 4,  # an all-reduce over two sends all once
        "gradients (experts)": EXPERTS * 4,
    }


@pytest.mark.parametrize("name", recipe_names())
def test_recipes_fit_their_hardware(name: str) -> None:
    made = plan(compose(name), *hardware_of(name))
    assert made.fits, describe(made)
    assert made.knobs == []
    assert 0 < made.step_seconds < 1200
    assert json.loads(json.dumps(made.as_dict()))["peak"] == made.memory.peak


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [("33b_a4b", 33.0, 4.0), ("qwen3_30b_a3b", 30.5, 3.3), ("mixtral_8x7b", 46.7, 12.9), ("gpt_oss_20b", 20.9, 4.2)],
)
def test_recipes_have_the_size_of_their_name(name: str, total: float, active: float) -> None:
    """gpt-oss-20b is published as 3.6B active, which leaves its embedding (0.58B) out."""
    (recipe,) = [found for found in recipe_names() if found.startswith(f"vp2o_{name}_countdown4_8k")]
    count = plan(compose(recipe), *hardware_of(recipe)).parameters
    assert count.total == pytest.approx(total * 1e9, rel=0.02)
    assert count.active == pytest.approx(active * 1e9, rel=0.03)


def _alone(config: TrainConfig) -> TrainConfig:
    parallel = dataclasses.replace(config.parallel, expert_parallel=2)
    return dataclasses.replace(config, parallel=parallel)


def test_what_does_not_fit_names_what_helps() -> None:
    made = plan(_alone(compose(LARGE)), 64, "h100")
    text = describe(made)
    assert not made.fits and "DOES NOT FIT" in text
    assert "parallel.expert_parallel=4: " in text and "algorithm.trust_region.snapshot_on_host=true: " in text
    peaks = [float(knob.partition(": ")[2].split()[0]) for knob in made.knobs]
    assert peaks == sorted(peaks) and peaks[-1] < made.memory.peak / 2**30


def test_suggested_layouts_fit_and_come_fastest_first() -> None:
    found = suggest(compose("vp2o_33b_a4b_countdown4_16k_64xh100"), 64, "h100")
    assert found and all(made.fits for _, made in found)
    times = [made.step_seconds for _, made in found]
    assert times == sorted(times)
    assert all(layout.tensor_parallel <= 8 for layout, _ in found)
    assert layouts(found).count("\n") == 11
    assert suggest(compose("vp2o_33b_a4b_countdown4_16k_64xh100"), 2, "h100") == []
    assert "no layout fits" in layouts([])


def test_assumptions_can_be_changed() -> None:
    slow, fast = (plan(compose(LARGE), 64, "h100", assumed=Assumptions(mfu=mfu)) for mfu in (0.2, 0.4))
    assert slow.times["forward and backward"] == pytest.approx(2 * fast.times["forward and backward"])
    assert Assumptions().override(["mfu=0.5", "prompt_tokens=100"]).prompt_tokens == 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([LARGE, "--gpus", "24"], "24 processes are not divisible"),
        ([LARGE, "--gpus", "0"], "--gpus=0 must be at least 1"),
        (["no_such_recipe"], "there is no such recipe"),
        ([LARGE, "--assume", "mfuu=1"], "mfuu is not assumed; there are: mfu"),
        ([LARGE, "--assume", "mfu=fast"], "'fast' is not a number"),
        ([LARGE, "--vocab-size", "129"], "vocab_size=129"),
    ],
)
def test_bad_plans_are_one_error(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([*arguments, "--no-build"]) == 2
    assert message in capsys.readouterr().err


def test_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([LARGE, "--no-build", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["gpus"], found["device"], found["vocab_size"]) == (64, "h100", 151936)
    assert command.main([LARGE, "--no-build", "parallel.expert_parallel=2"]) == 1
    assert "DOES NOT FIT" in capsys.readouterr().out
    assert command.main([LARGE, "--suggest", "--gpus", "32"]) == 0
    assert "TP  CP  PP  EP ETP" in capsys.readouterr().out
    assert simulate_command.main([LARGE, "--rank", "64"]) == 2
    assert "--rank=64 is not in a world of 64" in capsys.readouterr().err


def test_a_small_vocabulary_is_refused() -> None:
    from megatron_vp2o.config.validate import validate_vocabulary

    with pytest.raises(ConfigError, match=r"model.vocab_size=100 is less than the 104 ids"):
        validate_vocabulary(compose("train", ["model.vocab_size=100"]), 104)
