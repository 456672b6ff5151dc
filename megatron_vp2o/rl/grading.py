"""From generated token ids to verdicts."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_vp2o.parallel.groups import Groups, on_replica
from megatron_vp2o.rl.types import Problem, Rollouts, Task, Tokenizer, Verdict

NOT_TEXT = "\N{REPLACEMENT CHARACTER}"


def response_text(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """A response as the verifier sees it: without its end-of-sequence, and with padding that the model chose itself as a
    character that no answer has (decoding would drop it, and a broken answer could pass for a right one)."""
    if ids and ids[-1] in tokenizer.eos_ids:
        ids = ids[:-1]
    special = {tokenizer.pad_id, *tokenizer.eos_ids}
    return NOT_TEXT if special.intersection(ids) else tokenizer.decode(ids)


def grade(
    task: Task, problems: Sequence[Problem], rollouts: Rollouts, group_size: int, groups: Groups
) -> list[list[Verdict]]:
    """One verdict for each of a problem's `group_size` responses, problem by problem; the task gets all of them at once.

    Collective over the tensor- and pipeline-parallel ranks, of which one grades: a reward with a time limit could say
    different things to two of them.
    """
    texts = [response_text(task.tokenizer, rollouts.response(n)) for n in range(len(problems) * group_size)]
    asked = [problem for problem in problems for _ in range(group_size)]
    verdicts = on_replica(lambda: task.verify_all(asked, texts), groups)
    return [verdicts[p * group_size : (p + 1) * group_size] for p in range(len(problems))]
