"""A Hugging Face folder behind a vLLM server that the evaluation starts, watches and ends."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_vp2o.evaluation.endpoint import Endpoint, EndpointError
from megatron_vp2o.evaluation.model import Response, Sampling
from megatron_vp2o.rollout.launch import ServerProcess, free_port, vllm_environment, vllm_server

logger = logging.getLogger(__name__)


def server_of(python: str, folder: Path, name: str, log: Path, *, cpu: bool) -> ServerProcess:
    """A server for a folder, not started yet."""
    return ServerProcess(vllm_server(python, name, [], cpu=cpu), vllm_environment(cpu), free_port(), log)


@dataclass
class Launched(Endpoint):
    """See the module; implements `model.Model`. A server that ends is started again, and the batch is asked for as a whole: nothing
    of a batch counts before all of it is there."""

    process: ServerProcess | None = None
    folder: Path = Path()
    startup_s: float = 900.0
    """How long the server may take until it answers, seconds."""
    most_restarts: int = 3
    restarts: int = field(default=0, init=False)

    @property
    def identity(self) -> dict[str, Any]:
        return super().identity | {"kind": "vllm"}

    def check(self, prompts: Sequence[str], length: int) -> None:
        """Start the server, and ask which models there are. Raises EndpointError."""
        self._start()
        super().check(prompts, length)

    def generate(self, prompts: Sequence[str], uids: Sequence[int], sampling: Sampling) -> list[Response]:
        """See `Endpoint.generate`.

        Raises:
            EndpointError: also where the server ended more often than `most_restarts`.
        """
        while True:
            try:
                return super().generate(prompts, uids, sampling)
            except EndpointError as error:
                if not self._ended():
                    raise
                if self.restarts >= self.most_restarts:
                    raise EndpointError(
                        f"the server of {self.folder} ended {self.restarts + 1} times; {self._last_words()}"
                    ) from error
                self.restarts += 1
                logger.warning("the server of %s ended and is started again: %s", self.folder, error)
                self._start()

    def close(self) -> None:
        """End the server."""
        if self.process is not None:
            self.process.close()

    def _start(self) -> None:
        """Start the server where it does not run, and wait until it answers."""
        process = self.process
        assert process is not None
        if process.running:
            return
        process.start(self.folder)
        deadline = time.monotonic() + self.startup_s
        while not self._answers():
            if not process.running:
                raise EndpointError(f"the server of {self.folder} ended while it started; {self._last_words()}")
            if time.monotonic() > deadline:
                raise EndpointError(f"no answer {self.startup_s:g} s after the server's start; {self._last_words()}")
            time.sleep(0.5)

    def _answers(self) -> bool:
        patient, self.tries = self.tries, 1
        try:
            self._call("/models", None)
            return True
        except EndpointError:
            return False
        finally:
            self.tries = patient

    def _ended(self) -> bool:
        """Whether the server's process is gone, or going: its engine may end some moments before it."""
        assert self.process is not None
        deadline = time.monotonic() + 10
        while self.process.running and time.monotonic() < deadline:
            if self._answers():
                return False
            time.sleep(0.2)
        return True

    def _last_words(self) -> str:
        assert self.process is not None
        return self.process.last_words()
