"""What a conversion has to do: every tensor of a model on both sides, as small steps.

A step moves one Megatron tensor, or some rows of a large one that is only copied, so that the memory a conversion needs is
that of its largest step. Whether the steps cover both sides exactly once is checked here, before any data is touched.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain, islice, starmap

from megatron_vp2o.errors import CheckpointError
from megatron_vp2o.hf.distributed_files import Region, StoredTensors
from megatron_vp2o.hf.mapping import Architecture, Copy, Layers, Part, Rule, fill
from megatron_vp2o.hf.tensor_files import Entry, listed

SLAB = 2**19
"""Numbers up to which a tensor that is only copied is moved at once."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows of a Hugging Face tensor. `single`: one row, seen without its first dimension."""

    name: str
    first: int
    count: int
    single: bool = False

    def __str__(self) -> str:
        return f"{self.name}[{self.first}]" if self.single else f"{self.name}[{self.first}:{self.first + self.count}]"


@dataclass(frozen=True, slots=True)
class Step:
    """One Megatron tensor (or rows of one) and what it is made of.

    Attributes:
        region: where it is in the distributed checkpoint, without padding.
        padding: rows of zeros that follow it.
        chunks: how it is cut there, in order: sizes of the parts of dimension `split` of the Megatron tensor.
    """

    rule: Rule
    pieces: tuple[Piece, ...]
    region: Region
    shape: tuple[int, ...]
    padding: int = 0
    chunks: tuple[int, ...] = ()

    @property
    def size(self) -> int:
        """A measure of its work: its bytes, if they were bfloat16."""
        return math.prod(self.shape) * 2 if self.pieces else 0

    def written(self) -> list[tuple[Region, int]]:
        """The chunks to write, each with where it begins in the dimension that is cut."""
        lead = len(self.region.sizes) - len(self.shape)
        whole = list(self.region.sizes)
        axis = lead + (self.rule.split or 0)
        whole[axis] += self.padding
        found, start = [], 0
        for size in self.chunks or (whole[axis],):
            offsets, sizes = list(self.region.offsets), list(whole)
            offsets[axis] += start
            sizes[axis] = size
            found.append((Region(self.region.key, tuple(offsets), tuple(sizes)), start))
            start += size
        return found


@dataclass(frozen=True)
class Layout:
    """The layout that stored chunks are cut for; any other can load them, too."""

    tensor: int = 1
    pipeline: int = 1
    expert: int = 1
    expert_tensor: int = 1


@dataclass(frozen=True, slots=True)
class Batch:
    """Consecutive steps: those of the instances from number `first` on, without `skip` at the beginning, `count` in all."""

    first: int
    skip: int
    count: int
    size: int
    """What `Step.size` of them adds up to."""


class Steps:
    """The steps of a plan in the order of a forward pass, made whenever they are asked for: to keep those of a model with
    many experts would take more memory than to carry them out."""

    def __init__(
        self,
        instances: Sequence[tuple[Rule, int | None, int | None]],
        make: Callable[[Rule, int | None, int | None], Iterable[Step]],
    ) -> None:
        self._instances, self._make = instances, make

    def __iter__(self) -> Iterator[Step]:
        return chain.from_iterable(starmap(self._make, self._instances))

    def batch(self, batch: Batch) -> Iterator[Step]:
        from_there = chain.from_iterable(starmap(self._make, islice(self._instances, batch.first, None)))
        return islice(from_there, batch.skip, batch.skip + batch.count)

    def batches(self, size: int, count: int) -> list[Batch]:
        """All steps, in batches of at most `size` (or one step) and `count`."""
        found: list[Batch] = []
        start, filled, held = (0, 0), 0, 0
        for number, instance in enumerate(self._instances):
            for skip, step in enumerate(self._make(*instance)):
                if filled and (filled + step.size > size or held == count):
                    found.append(Batch(*start, held, filled))
                    start, filled, held = (number, skip), 0, 0
                filled += step.size
                held += 1
        return [*found, Batch(*start, held, filled)]


@dataclass(frozen=True)
class Plan:
    """The steps of a conversion and the shapes of the stored tensors."""

    architecture: Architecture
    steps: Steps
    shapes: dict[str, tuple[int, ...]]
    aliases: dict[str, str]

    def nothings(self) -> list[str]:
        """Keys of the empty `_extra_state` entries that Megatron expects, for the local and for transformer-engine's spec."""
        found: dict[str, None] = {}
        for rule, layer, expert in self.architecture.instances():
            module = rule.megatron.removesuffix(".weight")
            if rule.layers is Layers.none or not (
                module.rpartition(".")[2].startswith("linear_") and ".weight" in rule.megatron
            ):
                continue
            names = [module]
            if module.endswith("linear_proj"):
                names.append(module.removesuffix("linear_proj") + "core_attention")
            for name in names:
                key, lead = stored_key(self.architecture, name, layer, expert)
                lengths = _lead_lengths(self.architecture, rule)
                at, of = (".".join(map(str, numbers)) for numbers in (lead or (0,), lengths or (1,)))
                found[f"{key}._extra_state/shard_{at}_{of}"] = None
        return list(found)


def stored_key(
    architecture: Architecture, name: str, layer: int | None, expert: int | None
) -> tuple[str, tuple[int, ...]]:
    """The key under which a tensor is stored, and its indices in the stacking dimensions that come before its own."""
    lead = []
    if "{l}" in name and architecture.uniform:
        name = name.replace("layers.{l}.", "layers.")
        lead.append(layer)
    if "{e}" in name:
        name = name.replace("local_experts.{e}.", "experts.")
        lead.append(expert)
    return sys.intern(fill(name, layer, expert)), tuple(index for index in lead if index is not None)


def _lead_lengths(architecture: Architecture, rule: Rule) -> tuple[int, ...]:
    layers = (architecture.num_layers,) if rule.layers is not Layers.none and architecture.uniform else ()
    return layers + ((architecture.num_experts,) if rule.per_expert else ())


def make_plan(
    architecture: Architecture,
    *,
    layout: Layout | None = None,
    padded_vocab: int | None = None,
    stored: StoredTensors | None = None,
) -> Plan:
    """The steps of a conversion of this model.

    Args:
        layout: how to cut what is written; None where nothing is.
        padded_vocab: rows of embedding and output projection in the distributed checkpoint; None for no padding.
        stored: an existing checkpoint, whose names are used where there are several.

    Raises:
        CheckpointError: the layout does not divide the model, or the padded vocabulary is too small.
    """
    if padded_vocab is not None and padded_vocab < architecture.vocab_size:
        raise CheckpointError(
            f"the Megatron embedding has {padded_vocab} rows, and config.json has vocab_size={architecture.vocab_size}: "
            "they are of different vocabularies; name the config.json that belongs to the checkpoint"
        )
    known = frozenset() if stored is None else stored.shapes.keys()

    def names_of(rule: Rule, layer: int | None, expert: int | None) -> tuple[str, list[str]]:
        names = [stored_key(architecture, name, layer, expert)[0] for name in rule.stored or (rule.megatron,)]
        return next((name for name in names if name in known), names[0]), names

    def make(rule: Rule, layer: int | None, expert: int | None) -> Iterable[Step]:
        key, _ = names_of(rule, layer, expert)
        lead = stored_key(architecture, rule.megatron, layer, expert)[1]
        shape, rows = rule.shape, _rows(rule, padded_vocab)
        parts, _ = _cut_like(rule, rows, layout)
        pieces = tuple(piece_of(part, layer, expert) for part in rule.parts)
        if isinstance(rule.operation, Copy) and not rule.parts[0].stacked and math.prod(shape) > SLAB:
            return _slabs(rule, pieces[0], key, lead, shape, rows, parts)
        region = Region(key, (*lead, *(0 for _ in shape)), _box(len(lead), shape))
        return (Step(rule, pieces, region, shape, rows - shape[0], parts),)

    instances = list(architecture.instances())
    shapes: dict[str, tuple[int, ...]] = {}
    aliases: dict[str, str] = {}
    problems: dict[str, None] = {}
    for rule, layer, expert in instances:
        chosen, names = names_of(rule, layer, expert)
        aliases.update({name: chosen for name in names if name != chosen})
        rows = _rows(rule, padded_vocab)
        shapes[chosen] = (*_lead_lengths(architecture, rule), rows, *rule.shape[1:])
        if problem := _cut_like(rule, rows, layout)[1]:
            problems[problem] = None
    if problems:
        raise CheckpointError(listed("this layout does not divide the model", list(problems)))
    return Plan(architecture, Steps(instances, make), shapes, aliases)


def _rows(rule: Rule, padded_vocab: int | None) -> int:
    """Shape of the Megatron tensor, with padding."""
    return rule.shape[0] if not rule.vocabulary or padded_vocab is None else padded_vocab


@cache
def _box(lead: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    """One tuple for the thousands of experts that share it."""
    return (*(1 for _ in range(lead)), *shape)


@cache
def _cut_like(rule: Rule, rows: int, layout: Layout | None) -> tuple[tuple[int, ...], str | None]:
    return _cut(rule, rows, rule.shape, layout)


def piece_of(part: Part, layer: int | None, expert: int | None) -> Piece:
    """What a layer's and expert's instance of a rule takes for this part."""
    name = sys.intern(fill(part.name, layer, expert))
    return Piece(name, expert, 1, single=True) if part.stacked and expert is not None else Piece(name, 0, part.shape[0])


def _cut(rule: Rule, rows: int, shape: tuple[int, ...], layout: Layout | None) -> tuple[tuple[int, ...], str | None]:
    """Sizes of the chunks along the dimension that is split, and what is wrong with that."""
    if layout is None or rule.split is None:
        return (), None
    ways = layout.expert_tensor if rule.per_expert else layout.tensor
    length = rows if rule.split == 0 else shape[rule.split]
    halves = 2 if rule.halves else 1  # Megatron loads gate and up by themselves
    if length % (halves * ways):
        name = "expert_tensor" if rule.per_expert else "tensor"
        return (
            (),
            f"{rule.megatron} has {length // halves} in dimension {rule.split}: {name} parallelism of {ways} does not divide it",
        )
    return (length // (halves * ways),) * (halves * ways), None


def _slabs(
    rule: Rule, piece: Piece, key: str, lead: tuple[int, ...], shape: tuple[int, ...], rows: int, parts: tuple[int, ...]
) -> Iterator[Step]:
    """A large copied matrix as steps of some rows each; they end where the chunks of a split first dimension end."""
    width = math.prod(shape[1:])
    most = max(1, SLAB // width)
    whole = parts[0] if rule.split == 0 and parts else rows
    starts = [first for begin in range(0, rows, whole) for first in range(begin, begin + whole, most)]
    for first, last in zip(starts, [*starts[1:], rows], strict=True):
        count = max(0, min(last, shape[0]) - first)
        region = Region(key, (*lead, first, *(0 for _ in shape[1:])), (*(1 for _ in lead), count, *shape[1:]))
        pieces = (Piece(piece.name, first, count),) if count else ()
        cut = parts if rule.split not in (None, 0) else ()
        yield Step(rule, pieces, region, (count, *shape[1:]), last - first - count, cut)


# --- does it fit? -----------------------------------------------------------------------------------------------------


def check_hf(plan: Plan, entries: Mapping[str, Entry], where: str) -> None:
    """The Hugging Face side has exactly the tensors of the plan, in its shapes, and each row is used by one step.

    Raises:
        CheckpointError: listing every tensor that is missing, unknown, of another shape, or used otherwise.
    """
    expected = plan.architecture.hf_tensors()
    problems = [f"missing: {name} {list(shape)}" for name, shape in expected.items() if name not in entries]
    problems += [f"unknown: {name} {list(entry.shape)}" for name, entry in entries.items() if name not in expected]
    problems += [
        f"wrong shape: {name} is {list(entries[name].shape)}, and config.json makes it {list(shape)}"
        for name, shape in expected.items()
        if name in entries and entries[name].shape != shape
    ]
    used = dict.fromkeys(expected, 0)  # rows so far; the steps take them in order
    for step in plan.steps:
        for piece in step.pieces:
            used[piece.name] = used[piece.name] + piece.count if used.get(piece.name) == piece.first else -1
    problems += [f"not used exactly once: {name}" for name, rows in used.items() if rows != expected[name][0]]
    for entry in entries.values():
        if not entry.dtype.is_floating_point or entry.dtype.itemsize < 2:
            problems.append(f"not a weight: {entry.name} is {entry.dtype}; dequantise the checkpoint first")
    if problems:
        raise CheckpointError(
            listed(f"{where} does not have the tensors of a {plan.architecture.family} model", problems)
        )


def check_stored(plan: Plan, stored: StoredTensors, where: str, *, prefixes: tuple[str, ...] = ()) -> None:
    """The distributed checkpoint has exactly the tensors of the plan.

    Args:
        prefixes: beginnings of the keys that are no weights (optimizer state and the like).

    Raises:
        CheckpointError: listing every tensor that is missing, unknown or of another shape, or stored in part.
    """
    problems = []
    for key, shape in plan.shapes.items():
        if key not in stored.shapes:
            problems.append(f"missing: {key} {list(shape)}")
        elif not _fits(stored.shapes[key], shape, key):
            problems.append(f"wrong shape: {key} is {list(stored.shapes[key])}, and the model makes it {list(shape)}")
        elif stored.untiled(key):
            problems.append(f"not stored exactly once: {key}")
    known = plan.shapes.keys() | plan.aliases.keys()
    problems += [
        f"unknown: {key} {list(shape)}"
        for key, shape in stored.shapes.items()
        if key not in known and not key.startswith(prefixes or ("\0",))
    ]
    if problems:
        raise CheckpointError(
            listed(f"{where} does not have the tensors of this {plan.architecture.family} model", problems)
        )


def _fits(found: tuple[int, ...], wanted: tuple[int, ...], key: str) -> bool:
    padded = key in ("embedding.word_embeddings.weight", "output_layer.weight")
    return found[1:] == wanted[1:] and (found[:1] >= wanted[:1] if padded else found[:1] == wanted[:1])
