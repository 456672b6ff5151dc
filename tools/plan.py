"""What a recipe needs of each GPU before it is started: `make plan RECIPE=... PLANARGS='--gpus 64 --device h100'`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from megatron_vp2o.config.compose import compose
from megatron_vp2o.config.schema import TrainConfig
from megatron_vp2o.errors import ConfigError, UserError
from megatron_vp2o.hf.reader import read_models_of_checkpoints
from megatron_vp2o.planning.estimate import Plan, plan, suggest
from megatron_vp2o.planning.hardware import DEVICES, Assumptions, hardware_of
from megatron_vp2o.planning.report import describe, layouts


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 where it fits, 1 where it does not, 2 for a configuration that cannot work."""
    options = _parser().parse_intermixed_args(arguments)
    try:
        for name, value in (("--gpus", options.gpus), ("--vocab-size", options.vocab_size)):
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value} must be at least 1")
        gpus, device = hardware_of(options.recipe)
        gpus, device = options.gpus or gpus, options.device or device
        assumed = Assumptions().override(options.assume)
        read_models_of_checkpoints()
        config = compose(options.recipe, options.overrides)
        if options.suggest:
            found = suggest(config, gpus, device, vocab_size=options.vocab_size, assumed=assumed)
            if options.json:
                print(json.dumps([made.as_dict() | {"parallel": vars(layout)} for layout, made in found], indent=2))
            else:
                print(layouts(found))
            return 0 if found else 1
        result = plan(config, gpus, device, vocab_size=options.vocab_size, assumed=assumed)
        built = None if options.no_build else _built(config, result)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(result.as_dict() | {"built_parameters": built}, indent=2))
    else:
        print(describe(result))
        if built is not None:
            print(f"the model, built on the meta device, has {built} parameters: as counted")
    return 0 if result.fits else 1


def _built(config: TrainConfig, result: Plan) -> int:
    """Parameters of the real model. Raises ConfigError where they are not as many as counted."""
    from megatron_vp2o.planning.simulate import built_parameters  # imports Megatron, which takes seconds

    total, experts = built_parameters(config, result.vocab_size)
    if (total, experts) != (result.parameters.total, result.parameters.experts):
        raise ConfigError(
            f"the built model has {total} parameters ({experts} of experts), and {result.parameters.total} "
            f"({result.parameters.experts}) were counted from the settings: one of the two is wrong; report it"
        )
    return total


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Parameters, memory, traffic, operations and time of a recipe.")
    parser.add_argument("recipe", help="name of a recipe")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="changes of settings")
    parser.add_argument(
        "--gpus", type=int, help="processes of the run, one a GPU (default: what the recipe's name says)"
    )
    parser.add_argument("--device", choices=sorted(DEVICES), help="(default: what the recipe's name says, else h100)")
    parser.add_argument("--vocab-size", type=int, help="rows of the embedding (default: the model's)")
    parser.add_argument("--assume", action="append", default=[], metavar="NAME=VALUE", help="change an assumption")
    parser.add_argument("--suggest", action="store_true", help="list the layouts that fit, best first")
    parser.add_argument("--no-build", action="store_true", help="do not build the model to check the parameters")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main())
