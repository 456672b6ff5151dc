"""From generated token ids to verdicts."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_vp2o.rl.types import Problem, Rollouts, Task, Tokenizer, Verdict

NOT_TEXT = "\N{REPLACEMENT CHARACTER}"


def response_text(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """A response as the verifier sees it: without its end-of-sequence, and with padding that the model chose itself as a
    character that no answer has (decoding would drop it, and a broken answer could pass for a right one)."""
    if ids and ids[-1] == tokenizer.eos_id:
        ids = ids[:-1]
    special = {tokenizer.pad_id, tokenizer.eos_id}
    return NOT_TEXT if special.intersection(ids) else tokenizer.decode(ids)


def grade(task: Task, problems: Sequence[Problem], rollouts: Rollouts, group_size: int) -> list[list[Verdict]]:
    """One verdict for each of a problem's `group_size` responses, problem by problem."""
    return [
        [
            task.verify(problem, response_text(task.tokenizer, rollouts.response(p * group_size + g)))
            for g in range(group_size)
        ]
        for p, problem in enumerate(problems)
    ]
