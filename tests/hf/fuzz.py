"""Random small configurations of every family, legal and not: each converts into the same function, or is refused.

    python -m tests.hf.fuzz --family qwen3_moe --count 300 --seed 0

For each one transformers loads the configuration, makes a model of it and computes the logits of 200 tokens. Then the
checkpoint that transformers saves, with the configuration as it was drawn beside it, is converted, loaded by Megatron and run.
Allowed outcomes: the logits agree, or a CheckpointError or ConfigError says why not. Anything else is a finding: other logits,
another exception, a configuration that transformers cannot use and the converter takes.
"""

from __future__ import annotations

import argparse
import collections
import json
import random
import shutil
import sys
import tempfile
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from megatron_vp2o.config.parameters import padded_vocab
from megatron_vp2o.config.schema import ParallelConfig
from megatron_vp2o.errors import UserError
from megatron_vp2o.hf.convert import to_megatron
from megatron_vp2o.hf.families import architecture
from megatron_vp2o.hf.families.fields import ALIASES, FIELDS
from megatron_vp2o.megatron.platform.cpu import enable_cpu

enable_cpu()

from megatron_vp2o.megatron.hf import model as hf_model  # noqa: E402
from megatron_vp2o.parallel.groups import Groups  # noqa: E402

LENGTH = 200
TOLERANCE = 3e-5
"""Largest difference of float32 logits, as a share of their largest magnitude (at least 1)."""
LARGEST = 12_000_000
"""Parameters of a model that is still tried; a draw of a larger one is drawn again."""
ABSENT: Any = object()


@dataclass(frozen=True)
class Outcome:
    """What became of a configuration: `agree`, `refused` (`said` has the reason), or a finding."""

    kind: str
    said: str = ""
    legal: bool = True
    """Whether transformers made a model of it."""

    @property
    def good(self) -> bool:
        return self.kind in ("agree", "refused")


# --- drawing ----------------------------------------------------------------------------------------------------------


def draw(family: str, rng: random.Random) -> dict[str, Any]:
    """A config.json. Most are meant to be legal; the others have one or two odd values."""
    config = {"model_type": family, **_shape(family, rng)}
    for _ in range(rng.choice([0, 0, 0, 0, 1, 1, 2])):
        _spoil(config, family, rng)
    if rng.random() < 0.3:  # another name of a field
        for other, name in ALIASES[family].items():
            if name in config and rng.random() < 0.5:
                config[other] = config.pop(name)
    return {name: value for name, value in config.items() if value is not ABSENT}


def _shape(family: str, rng: random.Random) -> dict[str, Any]:
    pick = rng.choice
    heads = pick([1, 2, 4, 6])
    shape: dict[str, Any] = {
        "vocab_size": pick([50, 96, 104, 128, 200]),
        "hidden_size": pick([16, 24, 32, 48]),
        "intermediate_size": pick([8, 16, 24, 48]),
        "num_hidden_layers": pick([1, 2, 3, 4]),
        "num_attention_heads": heads,
        "num_key_value_heads": pick([n for n in range(1, heads + 1) if heads % n == 0]),
        "head_dim": pick([2, 4, 8, 16]),
        "hidden_act": "silu",
        "max_position_embeddings": pick([64, 256, 4096]),
        "rms_norm_eps": pick([1e-6, 1e-5, 1e-3, ABSENT]),
        "tie_word_embeddings": pick([True, False, ABSENT]),
        "pad_token_id": None,
        "eos_token_id": pick([None, 3, [3, 4], ABSENT]),
        "bos_token_id": pick([None, 1, ABSENT]),
        "initializer_range": 0.02,
        "attention_dropout": pick([0.0, 0, 0.1]),
        "num_experts_per_tok": pick([1, 2, 2, 2, 3, 3]),
        "router_aux_loss_coef": pick([0.0, 0.01]),
        "output_router_logits": pick([True, False, ABSENT]),
        "dtype": pick(["float32", "bfloat16", ABSENT]),
        **_rotary(family, rng),
    }
    shape |= {
        "qwen3_moe": _qwen3_moe,
        "mixtral": _mixtral,
        "olmoe": _olmoe,
        "deepseek_v3": _deepseek_v3,
        "gpt_oss": _gpt_oss,
    }[family](shape, rng)
    return {name: value for name, value in shape.items() if value is not ABSENT}


def _qwen3_moe(shape: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    pick = rng.choice
    return {
        "num_experts": pick([3, 4, 8, ABSENT]),
        "moe_intermediate_size": pick([8, 16]),
        "norm_topk_prob": pick([True, False, ABSENT]),
        "decoder_sparse_step": pick([1, 1, 2, ABSENT]),
        "mlp_only_layers": pick([[], [0], [1, 2], None, ABSENT]),
        "use_sliding_window": pick([False, False, ABSENT, True]),
        "sliding_window": pick([None, 8, ABSENT]),
        "attention_bias": pick([False, False, ABSENT]),
        "head_dim": pick([shape["head_dim"], shape["head_dim"], ABSENT]),
    }


def _mixtral(shape: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    pick = rng.choice
    return {
        "num_local_experts": pick([3, 4, 8, ABSENT]),
        "sliding_window": pick([None, None, ABSENT, 16]),
        "router_jitter_noise": pick([0.0, 0.1, ABSENT]),
        "head_dim": pick([shape["head_dim"], None, ABSENT]),
    }


def _olmoe(shape: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    pick = rng.choice
    heads = pick([1, 2, 4])
    return {
        "hidden_size": pick([16, 32, 48]),
        "num_attention_heads": heads,
        "num_key_value_heads": pick([heads, 1, None, ABSENT]),
        "head_dim": ABSENT,
        "num_experts": pick([3, 4, 8, ABSENT]),
        "norm_topk_prob": pick([True, False, ABSENT]),
        "clip_qkv": pick([None, None, None, ABSENT, ABSENT, 1.0]),
        "attention_bias": pick([False, ABSENT]),
    }


def _deepseek_v3(shape: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    pick: Any = rng.choice
    layers = shape["num_hidden_layers"]
    topk, groups, chosen = pick(
        [(4, 4, 2), (5, 3, 2), (2, 2, 1), (3, 4, 1), (2, 1, 1), (3, 2, 2), (4, 4, 4), (1, 1, 1)]
    )
    if rng.random() < 0.3:
        topk, groups, chosen = pick([1, 2, 3, 4, 5]), pick([1, 2, 4, ABSENT]), pick([1, 2, 3, ABSENT])
    return {
        "num_key_value_heads": pick([shape["num_attention_heads"], shape["num_attention_heads"], None]),
        "head_dim": ABSENT,
        "moe_intermediate_size": pick([8, 16]),
        "n_routed_experts": pick([12, 24]) if rng.random() < 0.8 else pick([4, 8]),
        "n_shared_experts": pick([1, 2, ABSENT]),
        "num_experts_per_tok": topk,
        "n_group": groups,
        "topk_group": chosen,
        "first_k_dense_replace": pick([0, 0, 1, layers - 1]),
        "kv_lora_rank": pick([8, 16]),
        "q_lora_rank": pick([8, 24, None]),
        "qk_rope_head_dim": pick([2, 4, 8]),
        "qk_nope_head_dim": pick([4, 8, 12]),
        "v_head_dim": pick([4, 8, 12]),
        "norm_topk_prob": pick([topk > 1, topk > 1, topk > 1, False, ABSENT]),
        "routed_scaling_factor": pick([1.0, 2.5, ABSENT]),
        "rope_interleave": pick([True, ABSENT]),
        "num_mtp_layers": pick([0, ABSENT]),
        "scoring_func": pick(["sigmoid", ABSENT]),
    }


def _gpt_oss(shape: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    pick: Any = rng.choice
    layers = shape["num_hidden_layers"]
    kinds = [pick(["sliding_attention", "full_attention"]) for _ in range(layers)]
    return {
        "num_local_experts": pick([3, 4, 8]),
        "num_experts_per_tok": pick([2, 2, 2, 3, 3, 1, ABSENT]),
        "sliding_window": pick([1, 2, 8, 8, 64, ABSENT, ABSENT, None]),
        "layer_types": pick([kinds, None, ABSENT, ["full_attention"] * layers]),
        "head_dim": pick([shape["head_dim"], shape["head_dim"], ABSENT]),
        "swiglu_limit": pick([7.0, 0.5, ABSENT]),
        "swiglu_alpha": pick([1.702, ABSENT]),
        "attention_bias": pick([True, ABSENT]),
    }


def _rotary(family: str, rng: random.Random) -> dict[str, Any]:
    """Rotary settings in the places where files have them."""
    pick: Any = rng.choice
    theta = pick([10000.0, 500.0, 1000000, 150000.0])
    yarn: dict[str, Any] = {
        pick(["rope_type", "type"]): "yarn",
        "factor": pick([2.0, 4, 32.0]),
        "original_max_position_embeddings": pick([16, 32, 64, 4096]),
    }
    yarn |= pick([{}, {"beta_fast": 32.0, "beta_slow": 1.0}, {"beta_fast": 8, "beta_slow": 2}])
    both = {"mscale": 1.0, "mscale_all_dim": 0.7}
    yarn |= pick([{}, {}, {}, both, both, {"mscale": 1.0}, {"mscale_all_dim": 1.0}])
    yarn |= pick([{}, {}, {}, {}, {"truncate": False}, {"truncate": True}, {"attention_factor": 1.2}])
    if rng.random() < 0.15:
        yarn.pop("original_max_position_embeddings")
    other = pick([{"rope_type": "linear", "factor": 2.0}, {"rope_type": "dynamic", "factor": 2.0}])
    scaled = yarn if rng.random() < 0.85 else other
    default = {"rope_type": "default", "rope_theta": theta}
    plain = [{}, {"rope_theta": theta}, {"rope_parameters": default}, {"rope_parameters": default, "rope_theta": 77.0}]
    plain += [
        {"rope_theta": theta, "rope_scaling": None},
        {"rope_theta": theta, "rope_parameters": {"rope_type": "default"}},
    ]
    where = [
        {"rope_parameters": {"rope_theta": theta, **scaled}},
        {"rope_theta": theta, "rope_scaling": scaled},
        {"rope_parameters": default, "rope_scaling": scaled},
        {"rope_parameters": {"rope_theta": 3e5, **scaled}, "rope_scaling": {}},
        {"rope_parameters": {"rope_theta": theta, **scaled}, "rope_scaling": default},
    ]
    many = 0.7 if family in ("deepseek_v3", "gpt_oss") else 0.2
    return dict(pick(where if rng.random() < many else plain))


ODD: tuple[Any, ...] = (None, 1.5, 3, "8", True, [], [1], {}, float("nan"), float("inf"), 1e308, ABSENT)
ODD_OF: dict[str, tuple[Any, ...]] = {
    "int": (0, -1, 1, 2, 3, 5, 7, 12),
    "float": (0.0, -1.0, 1e-9, 0.5, 3.0, 1e308, float("nan")),
    "bool": (True, False),
}


def _spoil(config: dict[str, Any], family: str, rng: random.Random) -> None:
    """Change one setting: an odd value of a field, or a setting of another place."""
    pick: Any = rng.choice
    if rng.random() < 0.6:
        name = pick(sorted(FIELDS[family]))
        kind = FIELDS[family][name][0].split("|")[0]
        config[name] = pick(ODD_OF[kind] if kind in ODD_OF and rng.random() < 0.7 else ODD)
        return
    name, values = pick(
        [
            ("hidden_act", ["gelu", "swish", "relu"]),
            ("num_key_value_heads", [3, 5, 100]),
            ("num_experts_per_tok", [9, 1000]),
            ("head_dim", [3, 5, None, 0, "8"]),
            ("layer_types", [["full_attention"], ["sliding_attention"] * 9, ["full_attention"] * 2, "full_attention"]),
            ("sliding_window", [4, 0, -1]),
            ("attention_bias", [True, False]),
            ("per_layer_config", [{"0": {"num_attention_heads": 2}}]),
            ("is_causal", [False, True]),
            ("is_encoder_decoder", [True]),
            ("partial_rotary_factor", [0.5, 1.0, None]),
            ("original_max_position_embeddings", [16, 64, None]),
            ("max_position_embeddings", [8, 32]),
            ("rope_theta", [None, "10000", 1.0, 0, -5.0, True, 3.0]),
            ("rope_scaling", ["yarn", [], {"rope_type": "llama3"}, {"type": "linear", "factor": 2.0}, {"factor": 2.0}]),
            (
                "rope_parameters",
                [{}, {"full_attention": {"rope_type": "default", "rope_theta": 5.0}}, {"rope_theta": 5.0}],
            ),
            ("rope_parameters", [{"rope_type": "yarn"}, {"rope_type": "yarn", "factor": "2"}, {"rope_type": 3}]),
            ("rope_interleave", [False, None]),
            ("scoring_func", ["softmax"]),
            ("moe_layer_freq", [2]),
            ("n_group", [3, 5, 0]),
            ("topk_group", [0, 5, 8]),
            ("n_shared_experts", [0]),
            ("q_lora_rank", [0]),
            ("first_k_dense_replace", [-1, 10]),
            ("decoder_sparse_step", [0, -1, 9]),
            ("mlp_only_layers", [[0, 1, 2, 3], [17], ["0"]]),
            ("qk_head_dim", [3]),
            ("quantization_config", [{"quant_method": "fp8"}, None]),
            ("num_local_experts", [2, 5]),
            ("num_experts", [2, 5]),
            ("swiglu_alpha", [1.0]),
            ("swiglu_limit", [-1.0, 0.0]),
            ("norm_topk_prob", [True, False]),
            ("tie_word_embeddings", [None]),
            ("unknown_to_all", [1, "x"]),
            ("dtype", ["float16", "auto", 3]),
        ]
    )
    config[name] = pick(values)


# --- judging ----------------------------------------------------------------------------------------------------------


class _TooLarge(Exception):
    pass


def _reference(folder: Path, config: dict[str, Any], seed: int) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """The model that transformers makes of a configuration, tokens, and their logits. Saves the checkpoint to the folder."""
    (folder / "config.json").write_text(json.dumps(config))
    loaded = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    layers = getattr(loaded, "num_hidden_layers", 1)
    if isinstance(layers, int) and layers > 200:
        raise _TooLarge
    make = {"dtype": torch.float32, "attn_implementation": "eager", "experts_implementation": "eager"}
    with torch.device("meta"):
        empty = transformers.AutoModelForCausalLM.from_config(loaded, **make)
    if sum(parameter.numel() for parameter in empty.parameters()) > LARGEST:
        raise _TooLarge
    model = transformers.AutoModelForCausalLM.from_config(loaded, **make).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        named = [*model.named_parameters(), *((n, b) for n, b in model.named_buffers() if "correction_bias" in n)]
        for name, parameter in named:
            noise = torch.empty(parameter.shape).normal_(0.0, 0.15, generator=generator)
            parameter.copy_(1.0 + noise if parameter.dim() == 1 and "norm" in name else noise)
        tokens_bs = torch.randint(model.get_input_embeddings().num_embeddings, (1, LENGTH), generator=generator)
        logits_bsV = model(input_ids=tokens_bs, use_cache=False).logits
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    return model, tokens_bs, logits_bsV


def judge(config: dict[str, Any], folder: Path, groups: Groups, seed: int) -> Outcome:
    """Raises _TooLarge for a model that takes too long."""
    problem = ""
    try:
        _, tokens_bs, expected = _reference(folder, config, seed)
    except _TooLarge:
        raise
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
    try:
        model = architecture(config)
        if problem:
            return Outcome("taken", f"transformers: {problem}", legal=False)
        to_megatron(folder, folder / "megatron")
        parallel = ParallelConfig()
        rows = padded_vocab(model.vocab_size, 1)
        gpt = hf_model.build(model, parallel, groups, vocab_rows=rows, dtype=torch.float32)
        hf_model.load(gpt, folder / "megatron")
        found = hf_model.logits(gpt, tokens_bs, groups, model.vocab_size)
    except UserError as error:
        return Outcome("refused", str(error), legal=not problem)
    except Exception:
        return Outcome("traceback", traceback.format_exc(), legal=not problem)
    largest, difference = expected.abs().max().item(), (found - expected).abs().max().item()
    if not torch.isfinite(expected).all():
        return Outcome("agree" if not torch.isfinite(found).all() else "differ", "not finite")
    if not difference <= TOLERANCE * max(1.0, largest):
        return Outcome("differ", f"logits differ by {difference:.3g} of {largest:.3g}")
    return Outcome("agree", f"{difference / max(1.0, largest):.1e}")


def trials(family: str, count: int, seed: int, groups: Groups) -> list[tuple[dict[str, Any], Outcome]]:
    """`count` configurations and what became of them. The same for the same seed."""
    rng = random.Random(f"{family} {seed}")
    found: list[tuple[dict[str, Any], Outcome]] = []
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as scratch:
        warnings.simplefilter("ignore")
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        while len(found) < count:
            config = draw(family, rng)
            folder = Path(scratch) / "hf"
            folder.mkdir()
            try:
                found.append((config, judge(config, folder, groups, seed=len(found))))
            except _TooLarge:
                pass
            finally:
                shutil.rmtree(folder)
    return found


def main() -> int:
    """Prints every finding and the counts; returns 1 if there is a finding."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=[*FIELDS, "all"], default="all")
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reasons", action="store_true", help="also print why configurations were refused")
    options = parser.parse_args()
    from megatron_vp2o.megatron.platform import world

    torch.set_num_threads(1)
    groups = world.start(ParallelConfig(), 0)
    bad = 0
    for family in FIELDS if options.family == "all" else [options.family]:
        results = trials(family, options.count, options.seed, groups)
        for number, (config, outcome) in enumerate(results):
            if not outcome.good:
                bad += 1
                print(f"{family} {number}: {outcome.kind}: {outcome.said}\n  {json.dumps(config)}")
            elif options.reasons and outcome.kind == "refused":
                print(f"{family} {number}: {'' if outcome.legal else '(illegal) '}{outcome.said}")
        counts = collections.Counter(outcome.kind for _, outcome in results)
        illegal = sum(not outcome.legal for _, outcome in results)
        print(f"{family}: {dict(counts)}, of which transformers refuses {illegal}", flush=True)
    world.stop()
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
