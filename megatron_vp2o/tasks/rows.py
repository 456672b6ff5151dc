"""Rows of a user's files as problems, graded by a reward. What of a row is what: `data.rows`."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from hashlib import blake2b
from typing import Any

import numpy as np
from tqdm import tqdm

from megatron_vp2o.config.rows import OnBadRow, OnDuplicate, RowsTaskConfig
from megatron_vp2o.data.rows.columns import BadRow
from megatron_vp2o.data.rows.index import Index, open_index
from megatron_vp2o.data.rows.sources import find_sources
from megatron_vp2o.data.rows.splits import Kept, Training, repeated, rows_with, seeded, smallest_keys
from megatron_vp2o.errors import ConfigError, DataError, RewardError
from megatron_vp2o.rl.interfaces import Reward, Tokenizer
from megatron_vp2o.rl.types import Problem, Split, Verdict
from megatron_vp2o.tasks.prompts import PromptWriter
from megatron_vp2o.tasks.tokenizer import CharTokenizer, load_tokenizer

logger = logging.getLogger(__name__)

SOURCE = "__source__"
"""Key of a row that says where it stands, for the messages of rewards."""
NAMED = 5  # rows that a message names


class RowsTask:
    """Implements `rl.interfaces.Task`. Verdicts' reasons are the reward's."""

    name = "rows"

    def __init__(
        self, config: RowsTaskConfig, *, reward: Reward | None = None, room: int | None = None, progress: bool = False
    ) -> None:
        """
        Args:
            reward: grades responses; None where nothing will be graded.
            room: most tokens of a prompt that the model can take.
            progress: show bars, and log what is left out (for one rank only).

        Raises:
            ConfigError: settings that do not fit the files.
            DataError: a file that cannot be read, or rows that cannot be used where they are not to be skipped.
        """
        self.config, self.reward, self._progress = config, reward, progress
        self.grades_elsewhere: bool = getattr(reward, "grades_elsewhere", False)
        self.tokenizer: Tokenizer = CharTokenizer() if config.tokenizer is None else load_tokenizer(config.tokenizer)
        self.writer = PromptWriter(self.tokenizer, config)
        limits = [limit for limit in (config.max_prompt_tokens, room) if limit is not None]
        self.max_prompt_tokens = min(limits) if limits else 0
        self.counts: dict[str, int] = {}
        indexes, weights = self._open(config.paths(), config.weights or [1.0] * len(config.paths()))
        dropped = self._dropped(indexes)
        held_out = {
            Split.test: self._own(config.test_path, config.test_size),
            Split.validation: self._own(config.validation_path, config.validation_size),
        }
        self._held_out, taken = self._hold_out(indexes, dropped, held_out)
        kept = [
            Kept(len(index), self._capped(index, np.concatenate([out, keys])))
            for index, out, keys in zip(indexes, dropped, taken, strict=True)
        ]
        if not sum(map(len, kept)):
            raise DataError(f"no row of task.path={config.path} is left for training: {self._summary(indexes)}")
        self._indexes, self._training = indexes, Training(kept, weights, config.seed)
        self.counts |= {"training": sum(map(len, kept)), **{s.name: len(rows) for s, rows in self._held_out.items()}}
        digests = [index.digest for index in indexes] + [str(w) for w in weights]
        self.fingerprint = blake2b(" ".join(digests).encode(), digest_size=8).hexdigest()
        if progress:
            logger.info("task=rows: %s", ", ".join(f"{count} {name}" for name, count in self.counts.items()))

    def size(self, split: Split) -> int:
        """Problems of a split; of training, the places of an epoch."""
        return len(self._training) if split is Split.train else len(self._held_out[split])

    def problem(self, split: Split, index: int, variant: int = 0) -> Problem:
        """Problem `index` of a split; of training, what stands at this place of epoch `variant`.

        Raises:
            IndexError: there is no such number.
            DataError: the file has changed since the start.
        """
        if not 0 <= index < self.size(split):
            raise IndexError(f"{self.name} has {self.size(split)} {split.name} problems, no number {index}")
        if split is Split.train:
            file, local = self._training.at(index, variant)
            source = self._indexes[file]
        else:
            source, local = self._held_out[split][index]
        example = source.example(local)
        try:
            text, tokens = self.writer.write(example)
        except BadRow as error:
            raise DataError(f"{source.place(local)}: {error}. Take the row out of the file") from None
        if len(tokens) > self.max_prompt_tokens > 0:
            raise DataError(
                f"{source.place(local)}: the prompt has {len(tokens)} tokens, more than {self.max_prompt_tokens} "
                "(task.max_prompt_tokens, or what the model has room for), though it has few characters: take the row out"
            )
        return Problem(index, text, {**example.row, SOURCE: source.place(local)}, None, tuple(tokens))

    def verify_all(self, problems: Sequence[Problem], responses: Sequence[str]) -> list[Verdict]:
        """The reward's results.

        Raises:
            RewardError: it gave another number of results than there are responses.
        """
        if self.reward is None:
            raise ConfigError("task=rows needs a reward to grade responses with: name one, for instance reward=math")
        if not problems:
            return []
        rows: list[Mapping[str, Any]] = [problem.data for problem in problems]
        results = self.reward([problem.prompt for problem in problems], responses, rows)
        if len(results) != len(responses):
            raise RewardError(
                f"the reward gave {len(results)} results for {len(responses)} responses; it must give one for each"
            )
        return [result.verdict() for result in results]

    def demonstration(self, problem: Problem, seed: int) -> str:
        """The row's completion; without such a column its answer (one of them by `seed` where it has several)."""
        row = problem.data
        if isinstance(row.get("completion"), str):
            return str(row["completion"])
        answer = row["answer"]
        if isinstance(answer, list) and answer:
            answer = answer[seed % len(answer)]
        if answer is None:
            raise DataError(
                "a row has neither a completion nor an answer to learn from: name one with task.columns.completion"
            )
        return str(answer)

    def report(self) -> dict[str, Any]:
        """What was read and what was left out, for the run folder."""
        files = [
            {
                "file": str(index.source),
                "rows": len(index),
                "bad_rows": index.bad,
                "reasons": index.reasons,
                "columns": asdict(index.columns),
                "conversations": index.kinds,
            }
            for index in self._indexes
        ]
        return {"counts": self.counts, "fingerprint": self.fingerprint, "files": files}

    def _open(self, paths: Sequence[str], weights: Sequence[float]) -> tuple[list[Index], list[float]]:
        """Indexes of all files of the paths, and each file's weight."""
        config = self.config
        indexes: list[Index] = []
        file_weights: list[float] = []
        for path, weight in zip(paths, weights, strict=True):
            for source in find_sources(path, config.hub_split):
                indexes.append(open_index(source, config.columns, config.index_dir, progress=self._progress))
                file_weights.append(weight)
        for index in indexes:
            self._check(index)
        return indexes, file_weights

    def _check(self, index: Index) -> None:
        """Bad rows, and what the rows have that is not used."""
        self._count("bad_rows", index.bad)
        if index.bad:
            word = "line" if index.source.kind in ("jsonl", "gzip") else "row"
            some = "; ".join(f"{word} {number}: {reason}" for number, reason in index.reasons[:NAMED])
            self._refuse_or_warn(f"{index.source} has {index.bad} rows that cannot be used ({some})")
        if index.tools and self._progress:
            logger.warning("%s: %d rows have tools, which are not shown to the model", index.source, index.tools)

    def _refuse_or_warn(self, message: str) -> None:
        if self.config.on_bad_row is OnBadRow.refuse:
            raise DataError(f"{message}: mend them, or leave them out with task.on_bad_row=skip")
        if self._progress:
            logger.warning("%s; they are left out", message)

    def _dropped(self, indexes: Sequence[Index]) -> list[np.ndarray]:
        """Numbers of the rows that are left out, by file: too long, refused by the chat template, or repeated."""
        dropped = [np.concatenate([self._refused(index), self._too_long(index)]) for index in indexes]
        again = repeated(indexes)
        count = sum(map(len, again))
        self._count("repeated", count)
        if count:
            self._name_repeated(indexes, again, count)
        if self.config.on_duplicate is OnDuplicate.skip:
            dropped = [np.concatenate(pair) for pair in zip(dropped, again, strict=True)]
        return dropped

    def _name_repeated(self, indexes: Sequence[Index], again: Sequence[np.ndarray], count: int) -> None:
        named = [index.place(int(local)) for index, rows in zip(indexes, again, strict=True) for local in rows[:NAMED]]
        message = f"{count} rows repeat the prompt of a row before them ({'; '.join(named[:NAMED])})"
        if self.config.on_duplicate is OnDuplicate.refuse:
            raise DataError(f"{message}: take them out, or choose task.on_duplicate=keep or skip")
        if self._progress:
            logger.warning("%s; task.on_duplicate=%s", message, self.config.on_duplicate.name)

    def _refused(self, index: Index) -> np.ndarray:
        """Rows whose kind of conversation the chat template refuses: one of each kind is tried."""
        refused: list[np.ndarray] = []
        reasons: list[str] = []
        for number in range(len(index.kinds)):
            rows = np.flatnonzero(index.entries["kind"] == number)
            try:
                self.writer.write(index.example(int(rows[0])))
            except BadRow as error:
                refused.append(rows)
                reasons.append(f"{index.place(int(rows[0]))} ({index.kinds[number]}): {error}")
        if not refused:
            return np.empty(0, np.int64)
        if len(refused) == len(index.kinds):
            raise DataError(reasons[0])
        count = sum(map(len, refused))
        self._count("bad_rows", count)
        self._refuse_or_warn(f"{count} rows cannot be put into the chat template ({'; '.join(reasons[:NAMED])})")
        return np.concatenate(refused)

    def _too_long(self, index: Index) -> np.ndarray:
        """Rows over the limit. Only those are tokenised that have more bytes than the limit has tokens."""
        limit = self.max_prompt_tokens
        if not limit:
            return np.empty(0, np.int64)
        suspects = np.flatnonzero(index.entries["size"] > max(0, limit - self.writer.overhead(index)))
        long = []
        for local in tqdm(
            suspects, desc=f"measuring {index.source}", unit="rows", delay=2.0, disable=not self._progress, leave=False
        ):
            try:
                _, tokens = self.writer.write(index.example(int(local)))
            except BadRow:
                continue  # named where its turn comes
            if len(tokens) > limit:
                long.append(int(local))
        self._count("long_prompts", len(long))
        if long:
            where = index.place(long[0])
            message = (
                f"{index.source} has {len(long)} rows whose prompt has more than {limit} tokens (the first: {where})"
            )
            if self.config.on_long_prompt is OnBadRow.refuse:
                raise DataError(f"{message}: shorten them, or leave them out with task.on_long_prompt=skip")
            if self._progress:
                logger.warning("%s; they are left out", message)
        return np.array(long, np.int64)

    def _own(self, path: str | None, size: int) -> list[tuple[Index, int]] | int:
        """Held-out rows of a file of their own; without one, how many to hold out of the training files."""
        if path is None:
            return size
        indexes, _ = self._open([path], [1.0])
        kept = [Kept(len(index), out) for index, out in zip(indexes, self._dropped(indexes), strict=True)]
        rows = [
            (index, rest[i]) for index, rest in zip(indexes, kept, strict=True) for i in range(min(len(rest), size))
        ]
        return rows[:size]

    def _hold_out(
        self,
        indexes: Sequence[Index],
        dropped: Sequence[np.ndarray],
        wanted: Mapping[Split, list[tuple[Index, int]] | int],
    ) -> tuple[dict[Split, list[tuple[Index, int]]], list[np.ndarray]]:
        """Held-out rows, and of each training file the numbers of rows that must not train: those, and equal prompts."""
        seed = self.config.seed
        counts = {split: rows if isinstance(rows, int) else 0 for split, rows in wanted.items()}
        keys = smallest_keys(indexes, seed, sum(counts.values()), dropped)
        if len(keys) < sum(counts.values()):
            raise ConfigError(
                f"task.validation_size={self.config.validation_size} and task.test_size={self.config.test_size} ask for "
                f"{sum(counts.values())} held-out prompts, but task.path={self.config.path} has "
                f"{len(keys)}: choose fewer, or name files of their own with task.validation_path and task.test_path"
            )
        first = rows_with(indexes, seed, keys)
        places: dict[int, tuple[Index, int]] = {}
        for index, rows, out in zip(indexes, first, dropped, strict=True):
            usable = rows[~np.isin(rows, out)]
            for local, key in zip(usable, seeded(np.asarray(index.entries["key"][usable]), seed), strict=True):
                places.setdefault(int(key), (index, int(local)))
        result: dict[Split, list[tuple[Index, int]]] = {}
        start = 0
        for split, own in wanted.items():
            result[split] = own if isinstance(own, list) else [places[int(key)] for key in keys[start : start + own]]
            start += counts[split]
        return result, self._contaminated(indexes, result, keys)

    def _contaminated(
        self, indexes: Sequence[Index], held_out: Mapping[Split, list[tuple[Index, int]]], keys: np.ndarray
    ) -> list[np.ndarray]:
        """Training rows whose prompts are held out, also in files of their own; the latter are a user's mistake, and named."""
        own = [index.entries["key"][local] for rows in held_out.values() for index, local in rows]
        everything = np.union1d(keys, seeded(np.array(own, np.uint64), self.config.seed))
        taken = rows_with(indexes, self.config.seed, everything)
        also = sum(map(len, taken)) - sum(map(len, rows_with(indexes, self.config.seed, keys)))
        self._count("training_rows_also_held_out", also)
        if also and self._progress:
            logger.warning("%d training rows have prompts that are held out too; they are left out of training", also)
        return taken

    def _capped(self, index: Index, without: np.ndarray) -> np.ndarray:
        """What is left out of a file where task.train_size asks for fewer rows than there are: those with the largest keys."""
        share = self.config.train_size
        kept = np.setdiff1d(np.arange(len(index)), without) if len(index) - len(np.unique(without)) > share else None
        if kept is None:
            return without
        order = np.argsort(seeded(np.asarray(index.entries["key"][kept]), self.config.seed), kind="stable")
        return np.concatenate([without, kept[order[share:]]])

    def _count(self, name: str, count: int) -> None:
        self.counts[name] = self.counts.get(name, 0) + count

    def _summary(self, indexes: Sequence[Index]) -> str:
        left_out = ", ".join(f"{count} {name}" for name, count in self.counts.items() if count)
        return f"{sum(map(len, indexes))} rows, of which are left out: {left_out or 'those held out'}"
