"""The last check of a conversion: transformers and Megatron compute the same. Both models are in memory, one after the other.

`compare_logits` takes whole models. `compare_sample` takes the first layers of a large one, as many as show every kind of layer,
with its embedding, final norm and output projection: it is cheap enough to be done after every conversion.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_vp2o.config.schema import ParallelConfig
from megatron_vp2o.errors import CheckpointError
from megatron_vp2o.hf.distributed_files import Region, StoredTensors
from megatron_vp2o.hf.families import architecture
from megatron_vp2o.hf.mapping import Architecture, fill
from megatron_vp2o.hf.plan import stored_key
from megatron_vp2o.hf.tensor_files import config_of, listed
from megatron_vp2o.megatron.hf import model as hf_model
from megatron_vp2o.megatron.model.token_share import TokenShare
from megatron_vp2o.megatron.platform import world
from megatron_vp2o.parallel.groups import Groups

TOLERANCE = 1e-5
"""Largest difference of float32 logits, as a share of their largest magnitude (at least 1)."""
WHOLE = 2 * 2**30
"""Bytes, in float32, up to which a sample is the whole model."""
_EMBEDDING = "embedding.word_embeddings.weight"


def compare_logits(hf: Path, megatron: Path, *, rows: int = 2, length: int = 32, seed: int = 0) -> str:
    """Compare logits of random tokens, in float32, of the whole models. One process.

    Returns:
        What was compared, as a sentence.

    Raises:
        CheckpointError: they differ, or transformers is not installed.
    """
    if not has_transformers():
        raise CheckpointError("comparing logits needs transformers: pip install 'transformers>=5.10,<6'")
    model, stored = architecture(config_of(hf)), StoredTensors(megatron)
    tokens_bs = _tokens(model, rows, length, seed)
    expected = reference_logits(hf, tokens_bs, model.num_layers, stored.dtypes[_EMBEDDING])
    with _one_process(seed) as groups:
        gpt = hf_model.build(
            model, ParallelConfig(), groups, vocab_rows=stored.shapes[_EMBEDDING][0], dtype=torch.float32
        )
        hf_model.load(gpt, megatron)
        found = hf_model.logits(gpt, tokens_bs, groups, model.vocab_size).cpu()
    return judge(found, expected, f"logits of {rows} x {length} random tokens")


def compare_sample(hf: Path, megatron: Path, *, length: int = 96, seed: int = 0) -> str:
    """Compare logits of random tokens, in float32, of the first layers with the embedding and what follows the last layer.

    Returns:
        What was compared, as a sentence; or that it was not, and why: transformers is not installed, or the memory is too small.

    Raises:
        CheckpointError: they differ.
    """
    config = config_of(hf)
    model, stored = architecture(config), StoredTensors(megatron)
    sample, reason = sample_of(config)
    if sample is None:
        return f"logits were not compared with transformers': {reason}"
    tokens_bs = _tokens(model, 1, length, seed)
    expected = reference_logits(hf, tokens_bs, sample.num_layers, stored.dtypes[_EMBEDDING])
    with _one_process(seed) as groups:
        rows = stored.shapes[_EMBEDDING][0]
        gpt = hf_model.build(sample, ParallelConfig(), groups, vocab_rows=rows, dtype=torch.float32)
        _load_sample(gpt, model, sample, stored)
        found = hf_model.logits(gpt, tokens_bs, groups, model.vocab_size).cpu()
    layers = "all" if sample.num_layers == model.num_layers else f"the first {sample.num_layers} of"
    return judge(found, expected, f"logits of {length} random tokens ({layers} {model.num_layers} layers)")


def compare_live(gpt: GPTModel, hf: Path, groups: Groups, *, length: int = 96, seed: int = 0) -> str:
    """Compare a live, sharded model with the folder that its weights come from. Collective.

    Of a small model the logits of random tokens; of a large one the hidden states after its first layers, as many as show every
    kind of layer. Rank 0 has transformers' side in memory; every rank compares what it computed itself.

    Returns:
        A sentence, as `compare_sample`.

    Raises:
        CheckpointError: they differ; on all ranks.
    """
    config = config_of(hf)
    model = architecture(config)
    shared: list[Any] = [sample_of(config) if groups.rank == 0 else None]
    _from_first(shared, groups)
    sample, reason = shared[0]
    if sample is None:
        return f"logits were not compared with transformers': {reason}"
    layers, dtype = sample.num_layers, gpt.config.params_dtype
    tokens_bs = _tokens(model, 1, length, seed)
    whole = layers == model.num_layers
    with _evaluating(gpt), _hidden(gpt, layers, groups) as hidden:
        found = hf_model.logits(gpt, tokens_bs, groups, model.vocab_size)
        if not whole:
            found = hidden()[:, :length]
    found = found.float().contiguous()
    expected = torch.empty_like(found)
    if groups.rank == 0:
        expected.copy_((reference_logits if whole else _reference_hidden)(hf, tokens_bs, layers, dtype))
    if groups.world_size > 1:
        dist.broadcast(expected, src=0, group=groups.world)
    what = (
        f"logits of {length} random tokens"
        if whole
        else f"hidden states of {length} random tokens after layer {layers}"
    )
    try:
        said, error = (judge if dtype is torch.float32 else _judge_roughly)(found, expected, what), None
    except CheckpointError as problem:
        said, error = "", f"rank {groups.rank}: {problem}"
    errors: list[Any] = [error] * groups.world_size
    if groups.world_size > 1:
        dist.all_gather_object(errors, error, group=groups.world)
    wrong = next((text for text in errors if text is not None), None)
    if wrong is not None:
        raise CheckpointError(f"the model that was loaded from {hf} is not that of transformers: {wrong}")
    return said


def _from_first(values: list[Any], groups: Groups) -> None:
    if groups.world_size > 1:
        dist.broadcast_object_list(values, src=0, group=groups.world)


@contextmanager
def _evaluating(gpt: GPTModel) -> Iterator[None]:
    training = gpt.training
    gpt.eval()
    try:
        yield
    finally:
        gpt.train(training)


@contextmanager
def _hidden(gpt: GPTModel, layers: int, groups: Groups) -> Iterator[Callable[[], Tensor]]:
    """Keeps the hidden states after so many layers; what it gives returns them, [b, s, D], on all ranks of rank 0's pipeline."""
    kept: list[Tensor] = []
    handles = [
        layer.register_forward_hook(lambda _, __, output: kept.append(output[0]))
        for layer in gpt.decoder.layers
        if layer.layer_number == layers
    ]

    def hidden_bsD() -> Tensor:
        stages: list[Any] = [None] * groups.pp.size()
        dist.all_gather_object(stages, tuple(kept[0].shape) if kept else None, group=groups.pp)
        owner = next(stage for stage, shape in enumerate(stages) if shape is not None)
        mine = (
            kept[0].contiguous()
            if kept
            else torch.empty(stages[owner], dtype=gpt.config.params_dtype, device=groups.device)
        )
        if groups.pp.size() > 1:
            dist.broadcast(mine, group=groups.pp, group_src=owner)
        if gpt.config.sequence_parallel:
            parts = [torch.empty_like(mine) for _ in range(groups.tp.size())]
            dist.all_gather(parts, mine, group=groups.tp)
            mine = torch.cat(parts)
        return TokenShare.of(gpt.config, groups).whole(mine).transpose(0, 1)

    try:
        yield hidden_bsD
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _reference_hidden(hf: Path, tokens_bs: Tensor, layers: int, stored: torch.dtype) -> Tensor:
    """Transformers' hidden states after so many layers, before any norm that follows, [b, s, D]."""
    model = reference_model(hf, layers)
    for parameter in model.parameters():
        parameter.copy_(parameter.to(stored))
    kept: list[Tensor] = []
    model.model.norm.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0]))
    model(input_ids=tokens_bs, use_cache=False)
    return kept[0]


ROUGHLY = 0.1
"""Largest root mean square of the differences of what is computed in bfloat16, as a share of that of the reference."""


def _judge_roughly(found: Tensor, expected: Tensor, what: str) -> str:
    """As `judge`, for a model in bfloat16: it rounds in every operation, and now and then chooses another expert."""
    share = ((found - expected).square().mean().sqrt() / expected.square().mean().sqrt()).item()
    said = f"{what}, in bfloat16, differ from transformers' in float32 by {share:.1%} (root mean square)"
    if not share <= ROUGHLY:
        raise CheckpointError(f"{said}: more than {ROUGHLY:.0%}, which rounding does not explain")
    return said


def has_transformers() -> bool:
    return importlib.util.find_spec("transformers") is not None


def sample_of(config: Mapping[str, Any]) -> tuple[Architecture | None, str]:
    """The model with as many of its first layers as a comparison takes; or None, and why there is no comparison."""
    if not has_transformers():
        return None, "transformers is not installed (pip install 'transformers>=5.10,<6')"
    model = architecture(config)
    windowed = model.settings.get("window_attn_skip_freq") or [0] * model.num_layers
    kinds = list(zip(model.moe_layers, windowed, strict=True))
    least = 1 + max(kinds.index(kind) for kind in set(kinds))
    count = model.num_layers if _float32_bytes(model) <= WHOLE else least
    sample = architecture(cut(config, count))
    needed, free = 5 * _float32_bytes(sample) // 2, _available_memory()
    if needed > free:
        return None, f"{count} layers in float32 need {needed / 1e9:.0f} GB of memory, and {free / 1e9:.0f} GB are free"
    return sample, ""


def cut(config: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """The config.json of the model of the first layers."""
    kinds = config.get("layer_types")
    return {**config, "num_hidden_layers": layers, **({} if kinds is None else {"layer_types": kinds[:layers]})}


def reference_model(hf: Path, layers: int) -> Any:
    """Transformers' own model of the folder's weights, without what follows the first `layers` layers, in float32."""
    import transformers

    with _quiet(transformers.logging):  # it would list every tensor of the layers that are left away
        loaded = transformers.AutoConfig.from_pretrained(hf, local_files_only=True, trust_remote_code=False)
        if layers < loaded.num_hidden_layers:
            loaded.num_hidden_layers = layers
            if getattr(loaded, "layer_types", None) is not None:
                loaded.layer_types = loaded.layer_types[:layers]
        model = transformers.AutoModelForCausalLM.from_pretrained(
            hf,
            config=loaded,
            dtype=torch.float32,
            attn_implementation="eager",
            experts_implementation="eager",
            local_files_only=True,
            trust_remote_code=False,
        )
    return model.eval()


@contextmanager
def _quiet(logging: Any) -> Iterator[None]:
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@torch.no_grad()
def reference_logits(hf: Path, tokens_bs: Tensor, layers: int, stored: torch.dtype) -> Tensor:
    """What transformers computes, [b, s, V], with the weights as the Megatron side stores them: cast to `stored`."""
    model = reference_model(hf, layers)
    for parameter in model.parameters():
        parameter.copy_(parameter.to(stored))
    logits_bsV: Tensor = model(input_ids=tokens_bs, use_cache=False).logits
    return logits_bsV


def judge(found: Tensor, expected: Tensor, what: str) -> str:
    """A sentence on two tensors that are to be the same. Raises CheckpointError where they are not."""
    difference, largest = (found - expected).abs().max().item(), expected.abs().max().item()
    said = f"{what} differ from transformers' by at most {difference:.2e} (they reach {largest:.2f})"
    if not difference <= TOLERANCE * max(1.0, largest):
        raise CheckpointError(
            f"{said}: more than rounding explains, unless two experts were as good as equal for one of the tokens"
        )
    return said


def _tokens(model: Architecture, rows: int, length: int, seed: int) -> Tensor:
    return torch.randint(model.vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))


@contextmanager
def _one_process(seed: int) -> Iterator[Any]:
    groups = world.start(ParallelConfig(), seed)
    try:
        yield groups
    finally:
        world.stop()


def _float32_bytes(model: Architecture) -> int:
    return 4 * sum(math.prod(shape) for shape in model.hf_tensors().values())


def _available_memory() -> int:
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/meminfo has no MemAvailable")


@torch.no_grad()
def _load_sample(gpt: GPTModel, whole: Architecture, sample: Architecture, stored: StoredTensors) -> None:
    """Fill the model of the first layers from the checkpoint of all, tensor by tensor."""
    tensors = {**dict(gpt.named_parameters()), **dict(gpt.named_buffers())}
    left = {name for name, _ in gpt.named_parameters()}
    for rule, layer, expert in sample.instances():
        name = fill(rule.megatron, layer, expert)
        names = [stored_key(whole, other, layer, expert)[0] for other in rule.stored or (rule.megatron,)]
        key = next((other for other in names if other in stored.shapes), names[0])
        lead = stored_key(whole, rule.megatron, layer, expert)[1]
        shape = tuple(tensors[name].shape)
        region = Region(key, (*lead, *(0 for _ in shape)), (*(1 for _ in lead), *shape))
        tensors[name].copy_(stored.read(region).reshape(shape))
        left.discard(name)
    if left:
        raise CheckpointError(
            listed("the checkpoint has nothing for these parameters of Megatron's model", sorted(left))
        )
