"""`python -m megatron_vp2o.nemo_train --config-name RECIPE [key=value ...]`: as `train`, under NeMo's `hydra_runner`."""

from __future__ import annotations

import importlib.util
import sys

from megatron_vp2o.cli import USAGE_STATUS, main_with_config
from megatron_vp2o.hf.reader import read_models_of_checkpoints
from megatron_vp2o.train import run


def main() -> None:
    """Entry point of the command line."""
    if importlib.util.find_spec("nemo") is None:
        print(
            "error: nemo-toolkit is not installed: pip install 'megatron-vp2o[nemo-toolkit]', or use megatron_vp2o.train",
            file=sys.stderr,
        )
        sys.exit(USAGE_STATUS)
    from nemo.core.config import hydra_runner

    read_models_of_checkpoints()
    main_with_config(run, hydra_main=hydra_runner)


if __name__ == "__main__":
    main()
