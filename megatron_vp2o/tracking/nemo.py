"""NeMo's experiment manager as a tracker: its folder, its files, and the metrics through the loggers that it makes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_vp2o.errors import ConfigError

# What a Lightning trainer would do; see config/exp_manager.py.
NOT_HERE = {
    "create_checkpoint_callback": False,
    "create_preemption_callback": False,
    "log_step_timing": False,
    "log_tflops_per_sec_per_gpu": False,
    "disable_validation_on_resume": False,
    "resume_if_exists": False,
    "resume_ignore_no_checkpoint": False,
}


class ExpManager:
    """Made on one rank, from the settings of the block (config/exp_manager.py says which).

    Raises:
        ConfigError: if nemo-toolkit is not installed, or refuses.
    """

    def __init__(self, block: Mapping[str, Any]) -> None:
        try:
            from lightning.pytorch import Trainer
            from lightning.pytorch.plugins.environments import LightningEnvironment
            from nemo.utils.exp_manager import NeMoBaseException, exp_manager
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"exp_manager is set and needs the package {error.name}: pip install 'megatron-vp2o[nemo-toolkit]', or "
                "set exp_manager=null"
            ) from error
        # A trainer that trains nothing: the manager hangs its loggers on it. It must not look for other processes.
        trainer = Trainer(
            accelerator="cpu",
            devices=1,
            plugins=[LightningEnvironment()],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
        )
        try:
            self.log_dir = exp_manager(trainer, {**block, **NOT_HERE})
        except (NeMoBaseException, ValueError) as error:
            raise ConfigError(f"NeMo refused exp_manager: {' '.join(str(error).split())}") from error
        self._loggers = list(trainer.loggers)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for logger in self._loggers:
            logger.log_metrics(dict(metrics), step=step)

    def close(self, failed: bool) -> None:
        for logger in self._loggers:
            logger.finalize("failed" if failed else "success")
