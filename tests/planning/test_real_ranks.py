"""Plan and simulation against what two real ranks do."""

from __future__ import annotations

import pytest

from megatron_vp2o.config.compose import compose
from megatron_vp2o.planning.memory import static_memory as planned_memory
from megatron_vp2o.planning.simulate import trace
from megatron_vp2o.planning.traffic import stein_traffic
from megatron_vp2o.planning.workload import padded_vocabulary
from tests.distributed import run_distributed

IDS = 104


@pytest.mark.distributed
@pytest.mark.parametrize("sharded", [False, True])
def test_bytes_of_the_stein_exchange_are_exact(sharded: bool) -> None:
    """Counted at torch's all-to-all in a real step on two ranks, against plan and simulation; memory, too."""
    overrides = ["algorithm=vp2o", f"parallel.distributed_optimizer={str(sharded).lower()}"]
    overrides += [] if sharded else ["parallel.expert_parallel=2"]
    config = compose("train", overrides)
    real = run_distributed("tests.planning.rank_job:stein", 2, overrides)
    planned = stein_traffic(config, 2)
    assert planned is not None
    for rank, found in enumerate(real):
        simulated = trace(config, rank, 2, width=16, rows=4, vocab_size=IDS)
        assert simulated.stein is not None
        assert found["sent"] == simulated.stein.bytes_sent
        assert found["memory"] == simulated.memory
        if not sharded:  # sharded over two replicas, each rank mixes just the columns that it owns
            assert found["sent"] == planned.exact_bytes != 0
            assert found["memory"] == planned_memory(config, 2, padded_vocabulary(config))
        assert found["sent"] <= planned.most_bytes


@pytest.mark.distributed
def test_overlapped_gathers_bring_all_parameters() -> None:
    """The simulation showed that experts' parameters were not gathered before they were used."""
    plain = run_distributed("tests.planning.rank_job:losses", 2, ["parallel.distributed_optimizer=true"], 3)
    overlap = ["parallel.distributed_optimizer=true", "parallel.overlap_grad_reduce=true"]
    overlapped = run_distributed(
        "tests.planning.rank_job:losses", 2, [*overlap, "parallel.overlap_param_gather=true"], 3
    )
    assert overlapped == plain
