"""Build any ranks of a recipe's world in this process and trace an optimizer step: `make simulate RECIPE=... [RANK='0 63']`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence

from megatron_vp2o.config.compose import compose
from megatron_vp2o.errors import ConfigError, UserError
from megatron_vp2o.hf.reader import read_models_of_checkpoints
from megatron_vp2o.planning.estimate import check
from megatron_vp2o.planning.hardware import Assumptions, hardware_of
from megatron_vp2o.planning.servers import ranks_on
from megatron_vp2o.planning.workload import CHARACTERS, workload


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 where the ranks agree, 1 where they do not, 2 for a configuration that cannot work."""
    parser = argparse.ArgumentParser(description="Trace an optimizer step of single ranks, without their processes.")
    parser.add_argument("recipe", help="name of a recipe")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="changes of settings")
    parser.add_argument("--gpus", type=int, help="processes of the run (default: what the recipe's name says)")
    parser.add_argument("--rank", type=int, action="append", help="which (default: the first, middle and last)")
    parser.add_argument("--width", type=int, help="tokens of a row (default: the recipe's longest)")
    parser.add_argument("--json", action="store_true", help="print all collectives as JSON")
    options = parser.parse_intermixed_args(arguments)
    try:
        read_models_of_checkpoints()
        config = compose(options.recipe, options.overrides)
        gpus = ranks_on(config, hardware_of(options.recipe)[0]) if options.gpus is None else options.gpus
        check(config, gpus)
        ranks = sorted(set(options.rank or (0, gpus // 2, gpus - 1)))
        for rank in ranks:
            if not 0 <= rank < gpus:
                raise ConfigError(f"--rank={rank} is not in a world of {gpus}: choose from 0 to {gpus - 1}")
        work = workload(config, gpus, Assumptions())
        width, multiple = options.width or work.longest, config.parallel.tensor_parallel
        if width < 2 or width % multiple:
            raise ConfigError(
                f"--width={width} must be at least 2 and divisible by parallel.tensor_parallel={multiple}"
            )
        from megatron_vp2o.planning import simulate  # imports Megatron, which takes seconds

        rows = work.micro_rows if work.packed is None else max(1, work.packed // width)
        ids = min(CHARACTERS, config.model.vocab_size or CHARACTERS)
        traces = {rank: simulate.trace(config, rank, gpus, width=width, rows=rows, vocab_size=ids) for rank in ranks}
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps({rank: dataclasses.asdict(trace) for rank, trace in traces.items()}))
    else:
        print(simulate.describe(traces))
    return 1 if simulate.disagreements(traces) else 0


if __name__ == "__main__":
    sys.exit(main())
