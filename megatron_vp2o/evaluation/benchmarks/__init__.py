"""The benchmarks there are, and the suites that are made of them."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_vp2o.errors import ConfigError
from megatron_vp2o.evaluation.benchmark import Benchmark
from megatron_vp2o.evaluation.benchmarks import aime, codeforces, gpqa, instructions, min_thinking, mmlu_pro

BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        aime.AIME_2024,
        aime.AIME_2025,
        gpqa.GPQA_DIAMOND,
        mmlu_pro.MMLU_PRO,
        codeforces.CODEFORCES,
        instructions.IFBENCH,
        instructions.IFEVAL,
        min_thinking.LEVEL_1,
        min_thinking.LEVEL_2,
    )
}
SUITES: dict[str, tuple[str, ...]] = {
    "paper": tuple(BENCHMARKS),
    "table1": ("aime24", "aime25", "gpqa", "mmlu_pro", "codeforces", "ifbench"),
    "table2": ("aime25", "codeforces", "ifeval", "min_thinking_1", "min_thinking_2"),
}


def chosen(names: Sequence[str]) -> list[Benchmark]:
    """Benchmarks of these suites and names, each once, in the paper's order.

    Raises:
        ConfigError: a name that is neither.
    """
    wanted: set[str] = set()
    for name in names:
        if name not in SUITES and name not in BENCHMARKS:
            raise ConfigError(
                f"{name!r} is neither a suite ({', '.join(SUITES)}) nor a benchmark ({', '.join(BENCHMARKS)})"
            )
        wanted |= set(SUITES.get(name, (name,)))
    return [benchmark for name, benchmark in BENCHMARKS.items() if name in wanted]
