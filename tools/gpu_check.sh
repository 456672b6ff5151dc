#!/usr/bin/env bash
# On a machine with CUDA: tools/gpu_check.py (tests marked gpu, benchmarks, in stages); results go to build/gpu-check.*
# (CHECKARGS='--stages smoke,tests --out FOLDER').
# Needs a Python 3.12 with torch >= 2.11 and pytest; what else is missing comes as wheels from $WHEELS, without a network
# (each with --no-deps: the folder must hold whatever is needed). Anywhere else it says in one line why it does nothing.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
wheels=${WHEELS:-wheels}

reason=$("$python" - <<'PY' 2>/dev/null
import os, sys
try:
    import torch
except ModuleNotFoundError:
    sys.exit(print(f"{sys.executable} has no torch"))
version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
if not torch.cuda.is_available() and "GPU_REHEARSAL" not in os.environ:
    print(f"no CUDA device (torch {torch.__version__})")
elif sys.version_info[:2] != (3, 12):
    print(f"Python {sys.version.split()[0]}; 3.12 is what megatron-core's current line needs")
elif version < (2, 11):
    print(f"torch {torch.__version__}; 2.11 or newer is needed")
PY
) || reason="$python does not work"
if [[ -n $reason ]]; then
    echo "gpu-check: nothing to do: $reason"
    exit 0
fi

site=$PWD/build/site
mkdir -p "$site"
if compgen -G "$wheels/*.whl" >/dev/null; then
    "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$site" "$wheels"/*.whl ||
        exit 1
fi
export PYTHONPATH=$PWD:$site${PYTHONPATH:+:$PYTHONPATH}
if [[ -n ${GPU_REHEARSAL:-} ]]; then # tools/gpu_rehearsal.sh: no device is here, and none is needed yet
    exec "$python" -m tools.gpu_rehearsal ${CHECKARGS:-}
fi
exec "$python" -m tools.gpu_check ${CHECKARGS:-}
