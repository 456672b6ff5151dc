"""Verifiable instructions: IFEval's 25 and IFBench's 58 kinds, by the checkers of `if-verifiable`.

A row has `instruction_id_list` and `kwargs`, one entry for each instruction, as both benchmarks have them. Nothing is
downloaded: what NLTK lacks is named with the command that brings it.
"""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Mapping
from typing import Any

from megatron_vp2o.config.reward import InstructionsConfig, InstructionScore
from megatron_vp2o.errors import RewardError
from megatron_vp2o.rewards.grade import Grade, RowError, right
from megatron_vp2o.rewards.graders.base import Grader

NEEDED = {"tokenizers/punkt_tab": "sentences and words", "corpora/stopwords": "stop words"}
"""NLTK data that many checkers read."""
TAGGER = "taggers/averaged_perceptron_tagger_eng"
NEEDS_TAGGER = frozenset(("words:start_verb",))
"""Kinds that need the tagger, which no package index has."""
GET = "python tools/nltk_data.py, or where the network can be reached: python -m nltk.downloader"


class Instructions(Grader):
    """1 where every instruction is followed, or the share that is. An empty answer follows none."""

    def __init__(self, config: InstructionsConfig) -> None:
        self._config = config
        self._checkers, self._evaluate = _load()

    def grade(self, prompt: str, response: str, row: Mapping[str, Any]) -> Grade:
        names, arguments = instructions_of(row)
        followed = self.followed(str(row.get("prompt", prompt)), response, names, arguments)
        failed = [name for name, passed in zip(names, followed, strict=True) if not passed]
        if not failed:
            return right(None)
        share = 1 - len(failed) / len(names)
        value = share if self._config.score is InstructionScore.share else 0.0
        return Grade(value, f"not followed: {', '.join(failed)}", None, False)

    def followed(
        self, prompt: str, response: str, names: list[str], arguments: list[dict[str, Any]], loose: bool | None = None
    ) -> list[bool]:
        """Whether each instruction is followed; exactly one answer for each, whatever the response is.

        Raises:
            RowError: an instruction that is unknown, or whose checker lacks its data.
        """
        for name in names:
            if name not in self._checkers:
                raise RowError(f"its instruction {name!r} is unknown; IFEval's and IFBench's are known")
            if name in NEEDS_TAGGER and not _has(TAGGER):
                raise RowError(
                    f"its instruction {name!r} needs NLTK's {TAGGER.split('/')[1]}, which is not here: {GET} "
                    f"{TAGGER.split('/')[1]}; or leave such rows out"
                )
        loose = self._config.loose if loose is None else loose
        results, _ = self._evaluate(response, names, arguments, prompt, self._checkers)
        if not results:  # an empty response
            return [False] * len(names)
        return [bool(result.loose_pass if loose else result.strict_pass) for result in results]


def instructions_of(row: Mapping[str, Any]) -> tuple[list[str], list[dict[str, Any]]]:
    """The names and arguments of a row's instructions.

    Raises:
        RowError: there are none, or not as many arguments.
    """
    names, arguments = row.get("instruction_id_list"), row.get("kwargs")
    arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    if not isinstance(names, list | tuple) or not names:
        raise RowError(f"it has no `instruction_id_list`, but the columns {', '.join(map(str, row))}")
    arguments = [{}] * len(names) if arguments is None else arguments
    if not isinstance(arguments, list | tuple) or len(arguments) != len(names):
        raise RowError(f"it has {len(names)} instructions, and `kwargs` is no list of as many")
    return list(map(str, names)), [dict(one or {}) for one in arguments]


def _load() -> tuple[dict[str, Any], Any]:
    """if-verifiable's checkers by name, and its function that applies them.

    It imports `datasets` only to load benchmarks, and asks NLTK to download; neither happens here.
    """
    import nltk

    nltk.download = lambda *_, **__: False
    missing = [path.split("/")[1] for path in NEEDED if not _has(path)]
    if missing:
        raise RewardError(f"reward=instructions needs NLTK's {' and '.join(missing)}: {GET} {' '.join(missing)}")
    real = sys.modules.get("datasets")
    stand_in = types.ModuleType("datasets")
    stand_in.load_dataset = None  # type: ignore[attr-defined]
    sys.modules["datasets"] = stand_in
    try:
        from if_verifiable.common import evaluate_instructions
        from if_verifiable.ifbench.instructions_registry import INSTRUCTION_DICT as IFBENCH
        from if_verifiable.ifeval.instructions_registry import INSTRUCTION_DICT as IFEVAL
    finally:
        if real is None:
            del sys.modules["datasets"]
        else:
            sys.modules["datasets"] = real
    return {**IFEVAL, **IFBENCH}, evaluate_instructions


def _has(path: str) -> bool:
    import nltk

    try:
        nltk.data.find(path)
    except LookupError:
        return False
    return True
