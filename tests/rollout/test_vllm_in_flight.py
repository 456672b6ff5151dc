"""A real vLLM server that gets other weights while it generates: each token has the log-probability that the weights of its
version give it after all tokens before, also those of other weights, as transformers computes it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from megatron_vp2o.rl.types import SamplingParams
from tests.rollout.test_vllm import END, PYTHON, VLLMHarness

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not PYTHON.is_file(), reason=f"no vLLM at {PYTHON}: make test-vllm makes its environment"),
]


@pytest.mark.parametrize("cached", [False, True])
def test_requests_in_flight_go_on_with_new_weights(tmp_path: Path, cached: bool) -> None:
    """Three updates during one batch; with the prefix cache, which must not serve keys and values of other weights."""
    arguments = ["--enable-prefix-caching" if cached else "--no-enable-prefix-caching"]
    harness = VLLMHarness(tmp_path, arguments=arguments, in_flight_updates=True)
    pool = harness.engine
    try:
        pool.update_weights(harness.weights(0), 1, harness.probe(0))
        models, start = {1: 0, 2: 1, 3: 0, 4: 1}, [7, 9, 11, 13] * 8  # two blocks that all prompts share
        sampling = SamplingParams(1.0, 1.0, 160, seed=0)
        pool.generate([[*start, 5]], [0], SamplingParams(1.0, 1.0, 8, seed=0), 4)  # the first one is slow
        begun = pool.begin([[*start, 3 + n, 8] for n in range(40)], range(40), sampling, 8)
        seconds = []
        for version in (2, 3, 4):
            time.sleep(0.4)
            if begun.future.done():
                break
            at = time.monotonic()
            pool.update_weights(harness.weights(models[version]), version, harness.probe(models[version]))
            seconds.append(time.monotonic() - at)
        rollouts = begun.result()
        versions_NS = rollouts.versions_NS
        assert versions_NS is not None and len(rollouts.total_len_N) == 320
        found: dict[int, int] = {}
        largest, mixed = 0.0, 0
        for n in range(320):
            first, total = int(rollouts.prompt_len_N[n]), int(rollouts.total_len_N[n])
            tokens, made = rollouts.tokens_NS[n, :total].tolist(), versions_NS[n, first:total].tolist()
            assert made == sorted(made) and (tokens[-1] == END or len(made) == 160)
            mixed += len(set(made)) > 1
            if n % 4 and len(set(made)) < 2:
                continue
            for version in set(made):
                wanted = harness.log_probs(models[version], tokens, 1.0)[first - 1 :]
                pairs = zip(rollouts.logprobs_NS[n, first:total].tolist(), wanted, made, strict=True)
                differences = [abs(said - want) for said, want, of in pairs if of == version]
                found[version] = found.get(version, 0) + len(differences)
                largest = max(largest, *differences)
        print(
            f"tokens by version {found}, {mixed} of 320 responses mixed, largest difference {largest:.2g}, syncs {seconds}"
        )
        assert largest < harness.tolerance and len(found) >= 2 and mixed > 20
    finally:
        pool.close()
    assert not harness.process.running
