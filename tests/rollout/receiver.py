"""One worker of a server, as vLLM's is, without vLLM and without HTTP: it does what it reads, one JSON value a line.

    {"join": meeting, "rank": 1}    join a trainer's group
    {"update": part}                receive a buffer, or compare the sums at the end
Answers {"error": ...} or {"tensors": {name: hash of its bytes}}, all that it holds.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "megatron_vp2o" / "rollout" / "server_side"))


def main() -> None:
    """Until the input ends."""
    import torch
    from vp2o_broadcast import Group, Meeting, Received, buffer_bytes

    torch.set_num_threads(1)
    group: Any = None
    received = Received()
    held: dict[str, str] = {}
    print(json.dumps({"tensors": {}}), flush=True)
    for line in sys.stdin:
        said = json.loads(line)
        try:
            if "join" in said:
                if group is not None:
                    group.close()
                received, held = Received(), {}
                group = Group(Meeting(**said["join"]), said["rank"], torch.device("cpu"))
            elif said["update"]["entries"]:
                entries = said["update"]["entries"]
                buffer = group.receive(buffer_bytes(entries))
                for name, tensor in received.tensors_of(entries, buffer, said["update"]["digest"]):
                    held[name] = digest(tensor)
            else:
                part = said["update"]
                received.compare(part["tensors"], part["bytes"], part["digest"])
                received = Received()
            print(json.dumps({"tensors": held}), flush=True)
        except (RuntimeError, ValueError) as error:
            if group is not None:
                group.close()
            print(json.dumps({"error": str(error)}), flush=True)


def digest(tensor: Any) -> str:
    """Of a tensor's shape, type and bytes."""
    import torch

    bits = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.blake2b(f"{tensor.dtype} {list(tensor.shape)} ".encode() + bits, digest_size=8).hexdigest()


if __name__ == "__main__":
    main()
