"""A rank that counts until it is asked to stop, for tests of the launcher's signals: as `megatron_vp2o.train` listens."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import time
from pathlib import Path

from megatron_vp2o.rl import stop


def main() -> None:
    folder = Path(sys.argv[1])
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN  # a request that comes too early does not kill
    stop.listen(signal.SIGTERM, signal.SIGUSR1)
    (folder / f"ready-{os.environ['RANK']}").write_text(str(os.getpid()))
    deadline = time.monotonic() + 60
    while not stop.asked() and time.monotonic() < deadline:
        time.sleep(0.02)
    if stop.asked():
        time.sleep(0.5)  # saving
        (folder / f"saved-{os.environ['RANK']}").touch()
    stop.finish()
    atexit.register(time.sleep, 2.5)  # a reminder comes while the interpreter ends


if __name__ == "__main__":
    main()
