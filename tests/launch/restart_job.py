"""A rank of a small gloo world; rank 1 dies the first time, once the world stands."""

from __future__ import annotations

import os
import signal
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist


def main() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # as megatron_vp2o.train does: torchrun ends the others with it
    rank, attempt = os.environ["RANK"], int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    dist.init_process_group("gloo", timeout=timedelta(seconds=30))
    total = torch.ones(1)
    dist.all_reduce(total)
    (Path(sys.argv[1]) / f"world-{attempt}-{rank}").write_text(str(int(total)))
    dist.barrier()
    if attempt == 0 and rank == "1":
        os._exit(9)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
