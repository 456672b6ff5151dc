"""Every rule: what it refuses, that it quotes value, bound and fix, and what it lets through just beside."""

import importlib.util
import math
from pathlib import Path

import pytest

from megatron_vp2o.config import validate as module
from megatron_vp2o.config.ranges import Range, numbers
from megatron_vp2o.config.schema import (
    Algorithm,
    ControlMode,
    DataSource,
    Dispatcher,
    GRPOConfig,
    Implementation,
    KLEstimator,
    KLReference,
    PolicyLoss,
    PrefixSharing,
    Resume,
    RouterScore,
    ShortestPathTaskConfig,
    SoftmaxType,
    SupervisedConfig,
    TrainConfig,
)
from megatron_vp2o.config.validate import data_parallel_size, validate, validate_prompts
from megatron_vp2o.config.validate_algorithm import optimizer_steps
from megatron_vp2o.errors import ConfigError
from tests.config.configured import configured, problems
from tests.config.configured import empty_folder as empty_folder


def test_the_defaults_are_valid():
    validate(configured({}))
    validate(configured({}, supervised=True))
    validate(configured({}, vp2o=True))


# settings, processes, what the message quotes, settings that mend it
RULES = [
    (
        {"parallel.expert_parallel": 3},
        3,
        ["num_moe_experts=16", "expert_parallel=3", "1, 2, 4, 8, 16"],
        {"parallel.expert_parallel": 1, "algorithm.prompts_per_step": 33},
    ),
    ({"parallel.pipeline_parallel": 3}, 3, ["num_layers=4", "pipeline_parallel=3", "1, 2, 4"], {"model.num_layers": 6}),
    (
        {"parallel.tensor_parallel": 3},
        3,
        ["num_attention_heads=4", "tensor_parallel=3", "1, 2, 4"],
        {"model.num_attention_heads": 6, "model.num_query_groups": 3},
    ),
    (
        {"parallel.tensor_parallel": 4},
        4,
        ["num_query_groups=2", "tensor_parallel=4", "1, 2"],
        {"model.num_query_groups": 4},
    ),
    (
        {"parallel.tensor_parallel": 2, "model.moe_shared_expert_intermediate_size": 33},
        2,
        ["moe_shared_expert_intermediate_size=33", "tensor_parallel=2"],
        {"model.moe_shared_expert_intermediate_size": 34},
    ),
    (
        {"parallel.expert_tensor_parallel": 2, "model.moe_ffn_hidden_size": 33},
        2,
        ["moe_ffn_hidden_size=33", "expert_tensor_parallel=2", "1, 3, 11, 33"],
        {"model.moe_ffn_hidden_size": 34},
    ),
    (
        {"parallel.tensor_parallel": 2},
        3,
        ["3 processes", "2 * 1 * 1 = 2", "multiple of 2"],
        {"parallel.tensor_parallel": 1, "algorithm.prompts_per_step": 33},
    ),
    (
        {"parallel.expert_parallel": 4},
        6,
        ["6 processes", "4 * 1 * 1 = 4", "multiple of 4"],
        {"parallel.expert_parallel": 2, "algorithm.prompts_per_step": 36},
    ),
    (
        {"parallel.expert_parallel": 2, "parallel.expert_tensor_parallel": 2},
        2,
        ["2 processes", "2 * 2 * 1 = 4"],
        {"parallel.expert_tensor_parallel": 1},
    ),
    (
        {"parallel.tensor_parallel": 2, "parallel.sequence_parallel": False},
        2,
        ["sequence_parallel=false", "tensor_parallel=2", "null or set it to true"],
        {"parallel.sequence_parallel": True},
    ),
    (
        {"parallel.sequence_parallel": True},
        1,
        ["sequence_parallel=true", "tensor_parallel=1", "leave it null"],
        {"parallel.sequence_parallel": None},
    ),
    (
        {"parallel.overlap_param_gather": True, "parallel.overlap_grad_reduce": True},
        1,
        ["overlap_param_gather=true", "distributed_optimizer=true", "they are false and true"],
        {"parallel.distributed_optimizer": True},
    ),
    (
        {"parallel.pipeline_parallel": 2, "model.moe_token_dispatcher_type": Dispatcher.allgather},
        2,
        ["allgather", "pipeline_parallel=2", "alltoall"],
        {"model.moe_token_dispatcher_type": Dispatcher.alltoall},
    ),
    (
        {"algorithm.micro_batch_tokens": 4096, "model.window_size": 128},
        1,
        ["micro_batch_tokens=4096", "window_size=128", "no path for packed rows", "micro_batch_tokens=null"],
        {"model.window_size": None},
    ),
    (
        {"algorithm.micro_batch_tokens": 4096, "model.softmax_type": SoftmaxType.learnable},
        1,
        ["micro_batch_tokens=4096", "softmax_type=learnable", "micro_batch_tokens=null"],
        {"algorithm.micro_batch_tokens": None},
    ),
    (
        {"algorithm.micro_batch_tokens": 4096, "model.moe_token_dispatcher_type": Dispatcher.allgather},
        1,
        ["micro_batch_tokens=4096", "allgather", "use alltoall"],
        {"model.moe_token_dispatcher_type": Dispatcher.alltoall},
    ),
    (
        {"algorithm.prefix_sharing": PrefixSharing.on},
        1,
        ["prefix_sharing=on", "micro_batch_tokens=null", "prefix_sharing=auto"],
        {"algorithm.micro_batch_tokens": 4096},
    ),
    (
        {
            "algorithm.micro_batch_tokens": 4096,
            "algorithm.prefix_sharing": PrefixSharing.on,
            "parallel.context_parallel": 2,
        },
        2,
        ["prefix_sharing=on", "context_parallel=2", "prefix_sharing=off"],
        {"parallel.context_parallel": 1},
    ),
    (
        {"parallel.context_parallel": 2, "model.window_size": 4},
        2,
        ["context_parallel=2", "window_size=4", "choose 1"],
        {"parallel.context_parallel": 1},
    ),
    (
        {"parallel.context_parallel": 2, "model.softmax_type": SoftmaxType.learnable},
        2,
        ["context_parallel=2", "softmax_type=learnable", "choose 1"],
        {"model.softmax_type": SoftmaxType.vanilla},
    ),
    (
        {"parallel.context_parallel": 4},
        2,
        ["2 processes", "1 * 1 * 4 = 4", "multiple of 4"],
        {"parallel.context_parallel": 2},
    ),
    (
        {"model.num_attention_heads": 5},
        1,
        ["num_attention_heads=5", "num_query_groups=2", "1, 5"],
        {"model.num_query_groups": 5},
    ),
    ({"model.kv_channels": 31}, 1, ["kv_channels=31", "even"], {"model.kv_channels": 30}),
    (
        {"model.moe_router_topk": 17},
        1,
        ["moe_router_topk=17", "num_moe_experts=16", "at most 16"],
        {"model.moe_router_topk": 16},
    ),
    (
        {"model.moe_router_topk": 1},
        1,
        ["moe_router_topk=1", "moe_router_pre_softmax=true"],
        {"model.moe_router_pre_softmax": True},
    ),
    (
        {"model.moe_router_enable_expert_bias": True},
        1,
        ["moe_router_enable_expert_bias=true", "sigmoid", "softmax"],
        {"model.moe_router_score_function": RouterScore.sigmoid},
    ),
    ({"algorithm.group_size": 1}, 1, ["group_size=1", "zero", "at least 2"], {"algorithm.group_size": 2}),
    (
        {"algorithm.prompts_per_step": 33},
        2,
        ["prompts_per_step=33", "2 data-parallel ranks", "multiple of 2"],
        {"algorithm.prompts_per_step": 34},
    ),
    (
        {"algorithm.minibatches": 3, "algorithm.prompts_per_step": 4},
        2,
        ["minibatches=3", "16 rollouts", "divisor of 16"],
        {"algorithm.minibatches": 4},
    ),
    (
        {"algorithm.kl_coef": 0.1},
        1,
        ["kl_coef=0.1", "kl_reference=none", "kl_reference=initial"],
        {"algorithm.kl_reference": KLReference.initial},
    ),
    (
        {"algorithm.name": Algorithm.supervised},
        1,
        ["algorithm.name=supervised", "algorithm=supervised"],
        {"algorithm.name": Algorithm.grpo},
    ),
    (
        {"rollout.sampling.temperature": 0.0},
        1,
        ["temperature=0", "greedy", "above 0"],
        {"rollout.sampling.temperature": 0.1},
    ),
    (
        {"rollout.sampling.max_new_tokens": 64},
        1,
        ["max_new_tokens=64", "max_sequence_length=64", "at most 63"],
        {"rollout.sampling.max_new_tokens": 63},
    ),
    ({"optimizer.min_lr": 0.1}, 1, ["min_lr=0.1", "lr=0.001", "at most 0.001"], {"optimizer.min_lr": 0.001}),
    (
        {"optimizer.lr_warmup_steps": 100},
        1,
        ["lr_warmup_steps=100", "100 optimizer steps", "at most 99"],
        {"optimizer.lr_warmup_steps": 99},
    ),
    ({"evaluation.pass_at": [1, 17]}, 1, ["pass_at has 17", "samples=16"], {"evaluation.samples": 17}),
    ({"evaluation.pass_at": [0]}, 1, ["evaluation.pass_at[0]=0", "at least 1"], {"evaluation.pass_at": []}),
    (
        {"evaluation.problems": 101},
        1,
        ["problems=101", "validation_size=100", "at most 100"],
        {"task.validation_size": 101},
    ),
    ({"name": ""}, 1, ["name='' is empty"], {"name": "x"}),
    ({"resume": Resume.must}, 1, ["resume=must", "runs/run", "resume=auto"], {"resume": Resume.auto}),
    ({"init_from": "runs/none"}, 1, ["init_from=runs/none", "does not exist"], {"init_from": None}),
    (
        {"init_from": "runs/countdown_tiny_supervised"},
        1,
        ["does not exist", "--config-name countdown_tiny_supervised"],
        {"init_from": None},
    ),
]
SUPERVISED_RULES = [
    (
        {"algorithm.global_batch_size": 63},
        2,
        ["global_batch_size=63", "2 data-parallel ranks", "multiple of 2"],
        {"algorithm.global_batch_size": 62},
    ),
    (
        {"algorithm.sequence_length": 65},
        1,
        ["sequence_length=65", "max_sequence_length=64", "at most 64"],
        {"algorithm.sequence_length": 64},
    ),
    (
        {"algorithm.data.source": DataSource.jsonl},
        1,
        ["source=jsonl", "data.path", "null"],
        {"algorithm.data.source": DataSource.task},
    ),
    (
        {"algorithm.data.source": DataSource.indexed, "algorithm.data.path": "here"},
        1,
        ["path=here", "here.bin"],
        {"algorithm.data.source": DataSource.task},
    ),
    (
        {"algorithm.data.tokenizer": "gone"},
        1,
        ["tokenizer=gone", "not a folder", "null"],
        {"algorithm.data.tokenizer": None},
    ),
]


VP2O_RULES = [
    (
        {"algorithm.stein.neighbours": None},
        ["neighbours=None", "coactivation_threshold=None", "exactly one"],
        {"algorithm.stein.neighbours": 2},
    ),
    (
        {"algorithm.stein.coactivation_threshold": 0.1},
        ["neighbours=4", "coactivation_threshold=0.1", "exactly one"],
        {"algorithm.stein.neighbours": None},
    ),
    (
        {"algorithm.stein.chunk_mib": 1e-5},
        ["chunk_mib=1e-05", "16 experts", "at least"],
        {"algorithm.stein.chunk_mib": 1},
    ),
    (
        {"algorithm.trust_region.delta": 2.0},
        ["delta=2.0", "never be exceeded", "less than 2"],
        {"algorithm.trust_region.delta": 1.9},
    ),
    (
        {"algorithm.trust_region.drift_share": 0.0, "algorithm.trust_region.max_policy_drift": 0.3},
        ["max_policy_drift=0.3", "drift_share=0", "above 0, or null"],
        {"algorithm.trust_region.max_policy_drift": None},
    ),
    (
        {"algorithm.trust_region.drift_share": 0.0, "algorithm.trust_region.delta_nats": 0.05},
        ["delta_nats=0.05", "drift_share=0", "above 0, or null"],
        {"algorithm.trust_region.drift_share": 0.1},
    ),
    (
        {"algorithm.budget.min_ess": 1 / 512},
        ["min_ess=0.00195", "256 rollouts", "at least 0.00391"],
        {"algorithm.budget.min_ess": 0.01},
    ),
    (
        {"algorithm.trust_region.mode": ControlMode.monitor, "algorithm.budget.mode": ControlMode.off},
        ["objective=vp2o is unclipped", "nothing bounds a step", "objective=grpo"],
        {"algorithm.objective": PolicyLoss.grpo},
    ),
]


@pytest.mark.parametrize(("settings", "quoted", "mended"), VP2O_RULES)
def test_vp2o_rule(settings, quoted, mended):
    found = problems(configured(settings, vp2o=True))
    assert any(all(part in line for part in quoted) for line in found), found
    assert problems(configured({**settings, **mended}, vp2o=True)) == []


def test_the_anchor_is_no_reference_of_grpo():
    (found,) = problems(configured({"algorithm.kl_reference": KLReference.anchor}))
    assert "kl_reference=anchor" in found and "algorithm=vp2o" in found
    assert (
        problems(
            configured(
                {"algorithm.kl_reference": KLReference.anchor, "algorithm.kl_estimator": KLEstimator.k2}, vp2o=True
            )
        )
        == []
    )


@pytest.mark.parametrize(
    ("settings", "world_size", "quoted", "mended", "supervised"),
    [(*rule, False) for rule in RULES] + [(*rule, True) for rule in SUPERVISED_RULES],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_rule(settings, world_size, quoted, mended, supervised):
    found = problems(configured(settings, supervised), world_size)
    assert any(all(part in line for part in quoted) for line in found), found
    assert problems(configured({**settings, **mended}, supervised), world_size) == []


_VP2O_ONLY = ("algorithm.trust_region.", "algorithm.budget.")


def ranges() -> dict[str, Range | None]:
    """Range of every number of every kind of run."""
    runs = [configured({}), configured({}, supervised=True), configured({}, vp2o=True)]
    paths = TrainConfig(task=ShortestPathTaskConfig())
    return {name: allowed for config in (*runs, paths) for name, _, allowed in numbers(config)}


def test_every_number_has_a_range_with_two_ends():
    without = [name for name, found in ranges().items() if found is None or not math.isfinite(found.high - found.low)]
    assert without == []
    assert len(ranges()) > 100


@pytest.mark.parametrize("name", [name for name in ranges() if "[" not in name])
def test_range(name):
    allowed = ranges()[name]
    assert allowed is not None
    supervised = name in ("algorithm.global_batch_size", "algorithm.sequence_length")
    for bound, side, step in ((allowed.low, "low", -1), (allowed.high, "high", 1)):
        if abs(bound) < float("inf"):
            wrong = bound if side in allowed.open_ends else bound + step
            found = problems(configured({name: wrong}, supervised, name.startswith(_VP2O_ONLY)))
            assert found == ([f"{name}={wrong} must be {allowed}"] if wrong not in allowed.also else [])
    for wrong in (float("nan"), float("inf"), -float("inf")):
        assert problems(configured({name: wrong}, supervised, name.startswith(_VP2O_ONLY)))


def test_range_ends():
    assert 0 not in Range(low=0, open_ends=("low",)) and 1e-9 in Range(low=0, open_ends=("low",))
    assert 1 in Range(high=1) and 1 not in Range(high=1, open_ends=("high",))
    assert None in Range(low=1) and float("inf") not in Range(low=1)
    assert str(Range(low=0, high=1, open_ends=("low",))) == "above 0 and at most 1"


def test_everything_wrong_is_reported_at_once():
    found = problems(configured({"algorithm.group_size": 1, "model.moe_router_topk": 17, "optimizer.min_lr": 1.0}))
    assert len(found) == 3


@pytest.mark.parametrize(
    ("settings", "world_size"),
    [
        ({"parallel.expert_parallel": 2}, 2),
        ({"parallel.expert_parallel": 4}, 4),
        ({"parallel.tensor_parallel": 2, "parallel.expert_parallel": 2}, 4),
        ({"parallel.tensor_parallel": 2, "parallel.expert_parallel": 2}, 2),
        ({"parallel.tensor_parallel": 2, "parallel.expert_tensor_parallel": 2}, 2),
        ({"parallel.pipeline_parallel": 2, "parallel.expert_parallel": 2}, 4),
        ({"parallel.pipeline_parallel": 2, "parallel.tensor_parallel": 2}, 4),
        ({"parallel.distributed_optimizer": True}, 4),
    ],
)
def test_layouts_that_run_are_let_through(settings, world_size):
    validate(configured(settings), world_size)


def test_what_needs_a_gpu(monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    config = configured({"model.implementation": Implementation.transformer_engine})
    assert any(
        "implementation=transformer_engine needs transformer-engine, which is not installed" in line
        for line in problems(config, 2)
    )
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: importlib.util.spec_from_loader(name, None))
    assert problems(config, 2) == []
    assert problems(config, 2, cuda_devices=2, local_world_size=2) == []
    assert problems(config, 2, cuda_devices=0) == [
        "model.implementation=transformer_engine needs a GPU, and this machine has none: use model.implementation=auto"
    ]
    assert "4 processes on a node with 2 GPUs" in problems(configured({}), 4, cuda_devices=2, local_world_size=4)[0]


def test_a_model_that_this_machine_cannot_hold():
    large = configured({"model.hidden_size": 2**17, "model.moe_ffn_hidden_size": 2**17})
    validate(large)  # elsewhere perhaps
    (found,) = problems(large, cuda_devices=0)
    assert "parameters on each rank" in found and "GiB of this machine's" in found
    validate(configured({}), cuda_devices=0)


def test_prompts_and_responses_fit_together():
    config = configured({"model.max_sequence_length": 40, "rollout.sampling.max_new_tokens": 24})
    validate_prompts(config, 16)
    with pytest.raises(
        ConfigError, match=r"up to 17 tokens.*max_new_tokens=24 .*max_sequence_length=40: raise .* to 41"
    ):
        validate_prompts(config, 17)


def test_counts():
    config = configured({"parallel.tensor_parallel": 2, "parallel.pipeline_parallel": 2})
    assert data_parallel_size(config, 12) == 3
    assert optimizer_steps(GRPOConfig(steps=10, epochs=2, minibatches=3)) == 60
    assert optimizer_steps(SupervisedConfig(steps=10)) == 10


def test_data_files_that_exist_are_enough():
    for name in ("a.jsonl", "b.bin", "b.idx"):
        Path(name).touch()
    for source, path in ((DataSource.jsonl, "a.jsonl"), (DataSource.indexed, "b")):
        validate(configured({"algorithm.data.source": source, "algorithm.data.path": path}, supervised=True))


@pytest.mark.parametrize(
    ("settings", "quoted"),
    [
        ({"task.name": "countdwn"}, "task.name=countdwn is unknown: did you mean countdown?"),
        ({"task.name": "sudoku"}, "task.name=sudoku is unknown: there are countdown, "),
        ({"task.name": "shortest_path"}, "does not go with the settings of countdown: choose the group, task=shortest"),
        ({"task.min_number": 10}, "task.min_number=10 and task.max_number=9: choose the smaller first"),
        ({"task.rows": 1, "task.columns": 1}, "task.rows=1 and task.columns=1: choose at least two cells"),
    ],
)
def test_task_settings_are_checked_against_the_task(settings, quoted):
    (found,) = problems(configured(settings))
    assert quoted in found


def test_prompts_of_a_task_that_is_not_trained_on_may_be_long():
    Path("text").touch()
    data = {"algorithm.data.source": DataSource.jsonl, "algorithm.data.path": "text", "model.max_sequence_length": 24}
    config = configured(data, supervised=True)
    validate(config)
    validate_prompts(config, 16)


def test_what_a_list_of_numbers_holds_is_a_number():
    for wrong in ("x", [1], None):
        found = problems(configured({"evaluation.pass_at": [1, wrong]}))
        assert found == [f"evaluation.pass_at[1]={wrong} must be a number"]
    (found_line,) = problems(configured({"algorithm.steps": 10**400}))
    assert "(401 characters) must be at least 1" in found_line and len(found_line) < 200
