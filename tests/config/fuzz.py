"""Random overrides against the configuration: each is refused in plain lines, or what it makes is sound.

`python -m tests.config.fuzz {singles,pairs,runs} NUMBER [--seed S]`; test_fuzz.py does a few of each with a fixed seed.

- singles: one odd value (wrong type, negative, NaN, infinite, huge, tiny, empty, null, a list, a misspelt key) of one setting
  of any recipe.
- pairs: two settings of any recipe, mostly with values that their ranges allow, so that the rules between settings are reached.
- runs: settings of a micro model with values that are allowed; those accepted are trained with for two steps.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import enum
import functools
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
import types
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any, Union, get_args, get_origin, get_type_hints

import hydra
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

from megatron_vp2o.config.compose import compose, to_config
from megatron_vp2o.config.explain import COMPOSITION_ERRORS, explain
from megatron_vp2o.config.ranges import is_annotated, range_of
from megatron_vp2o.config.register import GROUPS, recipe_names, register
from megatron_vp2o.config.schema import DataSource, SupervisedConfig, TrainConfig
from megatron_vp2o.config.validate import validate
from megatron_vp2o.config.written import as_written
from megatron_vp2o.errors import ConfigError
from tests.resume_job import Run

ROOT = Path(__file__).resolve().parents[2]
SLOWEST = 60.0  # seconds for one configuration on a busy machine; a fraction of one on an idle one
ODD = (
    *(
        "abc",
        "'1'",
        "''",
        "",
        "true",
        "yes",
        "1.5",
        "[1, 2]",
        "[]",
        "{a: 1}",
        "null",
        "~",
        "0x10",
        "1_0",
        "'\\''",
        "${name}",
    ),
    *("-1", "-0.5", "-1000000000", "nan", "inf", "-inf", "1e308", "-1e308", "1e-300", "1e13", "10000000000000", "0"),
    *("9" * 400, "..", "/", "x" * 300, "a b", "ü", "a=b", "a,b", "[[[[1]]]]", "{}", "'a\nb'"),
)


@dataclass(frozen=True)
class Setting:
    """A leaf of the configuration."""

    name: str
    hint: Any
    default: Any

    @property
    def kinds(self) -> tuple[Any, ...]:
        """Its types, `Optional` and `Annotated` taken apart."""
        hint = get_args(self.hint)[0] if is_annotated(self.hint) else self.hint
        return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def settings(config: Any, prefix: str = "") -> list[Setting]:
    """All leaves of a tree of dataclasses."""
    hints, found = get_type_hints(type(config), include_extras=True), []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            found += settings(value, f"{prefix}{field.name}.")
        else:
            found.append(Setting(f"{prefix}{field.name}", hints[field.name], value))
    return found


def odd(random: Random, setting: Setting) -> str:
    """An override that should mostly be refused."""
    if random.random() < 0.1:  # a misspelt key
        at = random.randrange(len(setting.name))
        name = setting.name[:at] + random.choice(["", "x", "-"]) + setting.name[at + 1 :]
        return f"{name}={random.choice(ODD)}"
    return f"{setting.name}={random.choice(ODD)}"


def plausible(random: Random, setting: Setting) -> str:
    """An override whose value has the setting's type and range."""
    kind, allowed = setting.kinds[0], range_of(setting.hint)
    if type(None) in setting.kinds and random.random() < 0.3:
        return f"{setting.name}=null"
    if kind is bool:
        value: Any = random.choice(["true", "false"])
    elif isinstance(kind, type) and issubclass(kind, enum.Enum):
        value = random.choice(list(kind)).name
    elif allowed is not None and kind in (int, float):
        value = _number(random, kind, allowed, setting.default)
    elif get_origin(kind) is list:
        value = f"[{', '.join(str(random.randint(1, 20)) for _ in range(random.randint(0, 3)))}]"
    else:
        value = random.choice(["null", "abc", "nowhere/at/all"])
    return f"{setting.name}={value}"


def _number(random: Random, kind: type, allowed: Any, default: Any) -> Any:
    """Near the default, or anywhere in the range on a logarithmic scale; ends are drawn often."""
    if random.random() < 0.15:
        return kind(random.choice([allowed.low, allowed.high, *allowed.also]))
    if default and random.random() < 0.6:
        value = default * random.choice([0.5, 2, 3, 1.5, 4])
    else:
        low = max(allowed.low, 1 if kind is int else 1e-6)
        value = math.exp(random.uniform(math.log(low), math.log(max(low, min(allowed.high, 1e6)))))
    return round(value) if kind is int else float(f"{value:.3g}")


def processes(recipe: str) -> int:
    """Those that the recipe's name asks for."""
    hardware = re.search(r"_(\d+)x[a-z]+\d+$", recipe)
    return int(hardware[1]) if hardware else 1


def attempt(recipe: str, overrides: list[str], base: list[str]) -> TrainConfig | str:
    """The configuration, or the lines with which it is refused. Whatever else is raised is a defect and goes through."""
    started = time.monotonic()
    try:
        config = quick_compose(recipe, tuple(base), overrides)
        validate(config, processes(recipe), elsewhere=True)
        return config
    except ConfigError as error:
        return str(error)
    finally:
        assert time.monotonic() - started < SLOWEST, f"{recipe} {overrides} took {time.monotonic() - started:.0f} s"


@functools.cache
def composed(recipe: str, base: tuple[str, ...]) -> DictConfig:
    """The node of a recipe before its overrides: most of the time that composing takes."""
    register()
    with hydra.initialize(version_base="1.3", config_path=None):
        return hydra.compose(config_name=recipe, overrides=list(base))


def quick_compose(recipe: str, base: tuple[str, ...], overrides: list[str]) -> TrainConfig:
    """What `compose` does, with Hydra's own way of applying overrides to what it has composed: ten times as fast. Groups
    cannot be overridden so."""
    node = copy.deepcopy(composed(recipe, base))
    try:
        parsed = OverridesParser.create().parse_overrides(as_written(overrides))
        if any(override.is_sweep_override() for override in parsed):
            return compose(recipe, [*base, *overrides])
        ConfigLoaderImpl._apply_overrides_to_config(parsed, node)
        return to_config(node)
    except ConfigError:
        raise
    except COMPOSITION_ERRORS as error:
        raise ConfigError(explain(error)) from error


def unsound(config: TrainConfig, overrides: list[str]) -> list[str]:
    """What is wrong with a configuration that was accepted, by rules of its own."""
    found = []
    by_name = {setting.name: setting for setting in settings(config)}
    for override in overrides:
        name, _, text = override.partition("=")
        if name not in by_name and name not in GROUPS:
            found.append(f"{name} is no setting, and was accepted")
            continue
        if name in GROUPS or name == "notes" or Any in by_name[name].kinds:
            continue
        kinds, value = by_name[name].kinds, getattr_dotted(config, name)
        if value is None and type(None) not in kinds:
            found.append(f"{override}: null, and not optional")
        if (
            bool in kinds
            and value is not None
            and (text.lower() not in ("true", "false", "yes", "no", "null", "~") or not isinstance(value, bool))
        ):
            found.append(f"{override}: no switch")
        if (
            str in kinds
            and isinstance(value, str)
            and text not in ("", "''", "'\\''")
            and text.strip("'") not in (value, "~")
        ):
            found.append(f"{override}: the text became {value!r}")
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int | float) and not isinstance(number, bool):
                if not math.isfinite(number):
                    found.append(f"{override}: not finite")
                if abs(number) > 1.0001e12 or 0 < abs(number) < 1e-20:
                    found.append(f"{override}: absurd")
                if number < 0 and name != "model.glu_linear_offset" and not name.startswith("reward.weights."):
                    found.append(f"{override}: negative")
                if text.startswith(("'", '"')):
                    found.append(f"{override}: a quoted text became a number")
    if config.run_dir in ("", ".", "..", "/") or ".." in Path(config.name).parts:
        found.append(f"run_dir={config.run_dir!r}, name={config.name!r}")
    return found


def getattr_dotted(config: Any, name: str) -> Any:
    """The value of a setting."""
    for part in name.split("."):
        config = getattr(config, part)
    return config


def unclear(message: str, overrides: list[str]) -> list[str]:
    """What is wrong with a refusal: it must be lines, each naming a setting that was overridden or that goes with it."""
    lines = message.split("\n")
    found = [f"{overrides}: {line!r}" for line in lines if not line or len(line) > 2500 or "Traceback" in line]
    words = {part for override in overrides for part in re.split(r"[.=]", override.partition("=")[0])}
    if len(overrides) == 1 and not any(word and word in message for word in words):
        found.append(f"{overrides}: {message!r} does not name the setting")
    if len(overrides) == 1 and len(lines) > 2:
        found.append(f"{overrides}: one mistake, {len(lines)} lines: {lines}")
    return found


@functools.cache
def known_settings(recipe: str) -> tuple[list[Setting], list[str]]:
    """Settings of a recipe, and overrides that leave out the folders it starts from."""
    config = compose(recipe)
    base = ["init_from=null"] if config.init_from else []
    base += ["task.tokenizer=null"] if config.task.tokenizer else []
    if isinstance(config.algorithm, SupervisedConfig) and config.algorithm.data.source is not DataSource.task:
        base.append(f"algorithm.data.path={__file__}")
        base += ["algorithm.data.source=jsonl"] if config.algorithm.data.source is DataSource.indexed else []
    return settings(config), base


def fuzz(number: int, seed: int, pairs: bool) -> tuple[Counter[str], list[str]]:
    """Draw `number` cases; returns how many were refused and accepted, and what is wrong."""
    random, counts, wrong = Random(seed), Counter[str](), []
    for _ in range(number):
        recipe = random.choice(recipe_names())
        known, base = known_settings(recipe)
        drawn = random.sample(known, 2 if pairs else 1)
        overrides = [(plausible if pairs and random.random() < 0.8 else odd)(random, setting) for setting in drawn]
        keys = {override.partition("=")[0] for override in overrides}
        kept = [text for text in base if text.partition("=")[0] not in keys]
        try:
            result = attempt(recipe, overrides, kept)
        except Exception as error:  # a defect, whatever it is: report it with its case and go on
            counts["raised"] += 1
            wrong.append(f"{recipe} {overrides}: {type(error).__name__}: {error}")
            continue
        counts["refused" if isinstance(result, str) else "accepted"] += 1
        problems = unclear(result, overrides) if isinstance(result, str) else unsound(result, overrides)
        wrong += [f"{recipe}: {problem}" for problem in problems]
    return counts, wrong


MICRO = [
    *(
        "model=micro",
        "model.hidden_size=32",
        "model.moe_ffn_hidden_size=16",
        "task.train_size=24",
        "task.validation_size=4",
    ),
    *(
        "task.test_size=4",
        "evaluation.problems=4",
        "evaluation.samples=2",
        "evaluation.pass_at=[1]",
        "algorithm.steps=2",
    ),
    *("logging.tensorboard=false", "threads=1", "init_from=null", "optimizer.lr_warmup_steps=0"),
]
ON_POLICY = [
    *(
        "algorithm.prompts_per_step=4",
        "algorithm.group_size=2",
        "algorithm.minibatches=1",
        "algorithm.micro_batch_size=4",
    ),
    *("algorithm.filter_uniform_groups=false", "algorithm.entropy_coef=0.1", "rollout.sampling.max_new_tokens=5"),
]
BASES = {
    "supervised": ["algorithm=supervised", *MICRO, "algorithm.global_batch_size=4", "algorithm.micro_batch_size=4"],
    "grpo": ["algorithm=grpo", *MICRO, *ON_POLICY],
    "vp2o": ["algorithm=vp2o", *MICRO, *ON_POLICY],
}


def fuzz_runs(number: int, seed: int, folder: Path) -> tuple[Counter[str], list[str]]:
    """Train with `number` accepted draws of one or two allowed values; returns how they ended, and what went wrong."""
    random, drawn = Random(seed), []
    jobs: list[Run] = []
    refused = 0
    while len(jobs) < number:
        name = random.choice(list(BASES))
        known = settings(compose("train", BASES[name]))
        chosen = random.sample(known, random.choice([1, 1, 2]))
        overrides = [plausible(random, setting) for setting in chosen]
        if any(
            override.startswith(("run_dir=", "name=", "threads=", "logging.wandb=online")) for override in overrides
        ):
            continue
        config = attempt("train", overrides, BASES[name])
        if isinstance(config, str) or not _is_cheap(config):
            refused += isinstance(config, str)
            continue
        drawn.append(f"{name} {overrides}")
        jobs.append(Run(str(folder / f"run{len(jobs)}"), [*BASES[name], *overrides]))
    spec = folder / "runs.json"
    spec.write_text(json.dumps([asdict(job) for job in jobs]))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", "tests.resume_job", str(spec)], cwd=ROOT, env=environment, check=True)
    ends, wrong = Counter({"refused by validate": refused}), []
    for index, (case, job) in enumerate(zip(drawn, json.loads(spec.read_text()), strict=True)):
        output = folder / f"output-{index}.txt"
        said = output.read_text() if output.exists() else ""
        (status,) = job["statuses"]
        ends[f"status {status}"] += 1
        clear = status == 2 and "Traceback" not in said and "error: " in said
        if status != 0 and not clear:
            wrong.append(f"{case}: status {status}: {said[-600:]}")
        elif status == 2:
            wrong.append(f"(refused after the start) {case}: {said.strip().splitlines()[-1][:300]}")
    return ends, wrong


def _is_cheap(config: TrainConfig) -> bool:
    """Whether two steps of it take seconds: what is large on purpose is not tried."""
    model, algorithm = config.model, config.algorithm
    size = model.hidden_size * model.moe_ffn_hidden_size * model.num_moe_experts * model.num_layers
    width = model.hidden_size * model.kv_channels * (model.num_attention_heads + model.num_query_groups)
    shared = model.hidden_size * (model.moe_shared_expert_intermediate_size or 0) * model.num_layers
    rows = getattr(algorithm, "global_batch_size", 1) + getattr(algorithm, "prompts_per_step", 1) * getattr(
        algorithm, "group_size", 1
    )
    length = (
        model.max_sequence_length if hasattr(algorithm, "global_batch_size") else config.rollout.sampling.max_new_tokens
    )
    vocabulary = model.vocab_size or 104
    updates = getattr(algorithm, "minibatches", 1) * getattr(algorithm, "epochs", 1) * algorithm.steps
    return (
        size + width + shared + vocabulary * model.hidden_size < 3e6
        and rows * length * vocabulary < 3e7
        and model.max_sequence_length <= 4096
        and rows < 200
        and updates <= 16
        and algorithm.stein.initial_power_iterations <= 2000
        and algorithm.stein.power_iterations <= 50
        and max(config.task.train_size, config.task.validation_size, config.task.test_size) <= 2000
        and config.evaluation.samples * config.evaluation.problems <= 400
    )


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=["singles", "pairs", "runs"])
    parser.add_argument("number", type=int)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        if options.kind == "runs":
            counts, wrong = fuzz_runs(options.number, options.seed, Path(folder))
        else:
            counts, wrong = fuzz(options.number, options.seed, options.kind == "pairs")
    print(*wrong, sep="\n")
    print(f"{options.kind} {options.number}, seed {options.seed}: {dict(counts)}, {len(wrong)} to look at")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
