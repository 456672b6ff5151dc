"""A stand-in for vLLM that computes with transformers: `hf_server.py --model FOLDER --host ADDRESS --port PORT ...`.

So a whole run trains through it where there is no vLLM. It speaks what `fake_server.py` speaks.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the file is run as it stands
from tests.rollout.fake_server import State, serve


class Model(State):
    """The model of a folder; an update's files are checked by State, and loaded together at its end."""

    def __init__(self, folder: Path) -> None:
        import torch
        import transformers

        torch.set_num_threads(1)
        self.torch, self.transformers = torch, transformers
        self.folder, self.turn = folder, threading.Lock()
        super().__init__(folder)

    def remember(self) -> None:
        from safetensors.torch import load_file, save_file

        tensors: dict[str, Any] = {}
        for file in sorted(self.folder.glob("*.safetensors")):
            tensors |= load_file(file)
        load = self.transformers.AutoModelForCausalLM.from_pretrained
        with tempfile.TemporaryDirectory() as whole:  # transformers wants one file, or an index
            shutil.copy(self.folder / "config.json", whole)
            save_file(tensors, f"{whole}/model.safetensors", metadata={"format": "pt"})
            self.model = load(whole, dtype="float32", attn_implementation="eager").eval()

    def update(self, info: dict[str, Any]) -> None:
        super().update(info)
        self.folder = Path(info["folder"])

    def generate(self, body: dict[str, Any]) -> Any:
        with self.turn, self.torch.inference_mode():
            return self._generate(body["token_ids"], body["sampling_params"])

    def _generate(self, prompt: list[int], settings: dict[str, Any]) -> Any:
        torch = self.torch
        if settings.get("prompt_logprobs") is not None:
            logp = self.model(torch.tensor([prompt])).logits[0].double().log_softmax(-1)
            rows = [{str(token): {"logprob": float(logp[n, token])}} for n, token in enumerate(prompt[1:])]
            return {"request_id": "x", "choices": [], "prompt_logprobs": [None, *rows]}
        ids, picked = torch.tensor([prompt] * settings["n"]), []
        for _ in range(settings["max_tokens"]):
            logp = (self.model(ids).logits[:, -1].double() / settings["temperature"]).log_softmax(-1)
            token = torch.multinomial(logp.exp(), 1)
            picked.append(logp.gather(1, token))
            ids = torch.cat([ids, token], 1)
        logprobs = torch.cat(picked, 1)
        self.served += 1
        return {
            "request_id": "x",
            "choices": [self._choice(n, ids, logprobs, prompt, settings) for n in range(len(ids))],
        }

    def _choice(self, n: int, ids: Any, logprobs: Any, prompt: list[int], settings: dict[str, Any]) -> Any:
        tokens = ids[n, len(prompt) :].tolist()
        ends = [at for at, token in enumerate(tokens) if token in settings["stop_token_ids"]]
        count = ends[0] + 1 if ends else len(tokens)
        said = [{"token_id": t, "logprob": float(p)} for t, p in zip(tokens[:count], logprobs[n, :count], strict=True)]
        return {
            "index": n,
            "finish_reason": "stop" if ends else "length",
            "token_ids": tokens[:count],
            "logprobs": {"content": said},
            "weight_versions": [{"version": self.label, "start": 0, "end": count}],
        }


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for name in ("model", "host", "port"):
        parser.add_argument(f"--{name}", required=True)
    options, _ = parser.parse_known_args()
    serve(Model(Path(options.model)), int(options.port), options.host)
