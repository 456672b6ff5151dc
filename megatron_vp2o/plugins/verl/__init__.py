"""verl's plug-in: entry point `verl.plugins`, or VERL_USE_EXTERNAL_MODULES=megatron_vp2o.plugins.verl (docs/plugins.md).

`import verl` loads this module wherever the package is installed. It does nothing unless VERL_ENGINE_VENDOR=vp2o asks for it;
then it registers the engine, the policy loss and the advantages, and whatever keeps it from doing so ends the process with one
line: verl itself only logs a plug-in's exception where nobody looks, and trains on without it.
"""

from __future__ import annotations

import os
import sys

VENDOR = "vp2o"


def wanted() -> bool:
    """Whether this process's environment asks for the plug-in."""
    return os.environ.get("VERL_ENGINE_VENDOR", "").strip().lower() == VENDOR


def start() -> None:
    """Register everything, once. Ends the process with one line if that cannot be done."""
    try:
        from megatron_vp2o.plugins.verl.registration import register

        register()
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else ""
        print(
            f"megatron-vp2o: the verl plug-in cannot start ({type(error).__name__}: {first}); mend it, or unset "
            "VERL_ENGINE_VENDOR to train without it",
            file=sys.stderr,
            flush=True,
        )
        # verl catches Exception around its plug-ins; this is none.
        raise SystemExit(2) from error


if wanted():
    start()
