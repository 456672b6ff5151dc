#!/usr/bin/env bash
# `make gpu-check` before the machine with the GPU is there: an environment with what such an image has (tools/gpu_image.txt) and
# the wheels that are carried to it, and in it everything that happens before the first CUDA call. Says what is wrong and ends
# with its status. Needs a Python 3.12 (BASE) and a package index; several gigabytes the first time.
set -euo pipefail
cd "$(dirname "$0")/.."
environment=${REHEARSAL_ENV:-.venv-gpu-rehearsal}
wheels=${WHEELS:-wheels}
most_mib=40

fail() {
    echo "gpu-rehearsal: $1" >&2
    exit 1
}

# 1. The wheels, which tools/gpu_check.sh installs.
compgen -G "$wheels/*.whl" >/dev/null || fail "no wheels in $wheels; make wheels fetches them"
size=$(du -cm "$wheels"/*.whl | tail -1 | cut -f1)
((size <= most_mib)) || fail "the wheels in $wheels take $size MiB; at most $most_mib can be carried"
echo "gpu-rehearsal: $size MiB of wheels"

# 2. What the image has. Made again when the list has changed.
if ! cmp -s tools/gpu_image.txt "$environment/made-from.txt"; then
    [[ $("$BASE" -c 'import sys; print(sys.version_info[:2] == (3, 12))') == True ]] ||
        fail "$BASE is no Python 3.12, which the image has; make gpu-rehearsal PYTHON=python3.12"
    "$BASE" -m venv "$environment"
    "$environment/bin/python" -m pip install -q --no-cache-dir -r tools/gpu_image.txt
    # What dependencies bring beyond the image.
    "$environment/bin/python" -m pip uninstall -q -y pydantic pydantic-core annotated-types typing-inspection tzdata
    cp tools/gpu_image.txt "$environment/made-from.txt"
fi
python=$(cd "$environment/bin" && pwd)/python
for package in wandb hydra omegaconf megatron reasoning_gym transformer_engine datasets math_verify; do
    "$python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$package') is not None)" ||
        fail "$environment has $package, which the image lacks: delete $environment, and look at tools/gpu_image.txt"
done

export GPU_REHEARSAL=1 PYTHON=$python WHEELS=$wheels

# 3. What make gpu-check does, up to the first CUDA call: CUDA is asked for and not there.
bash tools/gpu_check.sh
