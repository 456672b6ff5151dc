# `make help` lists the targets. PYTHON names the interpreter (3.11 or 3.12; default: the first that works of python3,
# python3.11, python3.12); each version has its own environment: .venv (3.11) and .venv-3.12.

PYTHON ?=
# Where torch comes from; empty: pip's own index. For CPU builds: TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
# The release that is installed where the environment has none yet.
TORCH ?= torch==2.13.0
# Further arguments of pytest, of the training runs of `make run`, and of the benchmarks.
TESTARGS ?=
RUNARGS ?=
# Which study `make study` runs (study/NAME.yaml), with what further arguments, and how many runs side by side.
STUDY ?= smoke
STUDYARGS ?=
SLOTS ?= $(shell nproc 2>/dev/null || echo 1)
BENCHARGS ?=
# Processes of the training runs of `make run`. Two with one thread each are faster than one with two.
RANKS ?= $(shell nproc 2>/dev/null | awk '{print ($$1 > 1 ? 2 : 1)}')
# Test files that run side by side.
WORKERS ?= $(RANKS)
# The warm-up of `make soak`.
WARM_UP ?= runs/countdown_tiny_supervised
# Where `make launch` starts a run, and with what further arguments.
EXECUTOR ?= local
LAUNCHARGS ?=
# What `make eval` evaluates: RUN='grpo=runs/a vp2o=runs/b', with which benchmarks, at which lengths, of which steps, on which rows.
RUN ?=
SUITE ?= paper
LENGTHS ?= 8k,16k
STEPS ?= every
DATA ?= data/eval
EVALOUT ?= runs/evaluation
EVALARGS ?=
# Environment of vLLM servers: made where it is missing, used as it is where somebody else made it.
VLLM_ENV ?= .venv-vllm
comma := ,
# Benchmarks or suites that `make eval-data` fetches.
BENCHMARKS ?= paper
# Folder of wheels for a CUDA machine without a package index (make gpu-check).
WHEELS ?= wheels

# Idle OpenMP threads that spin make a step many times slower when the cores are shared.
export GOMP_SPINCOUNT ?= 2000

# Looked up once, when a recipe first needs them.
BASE = $(eval BASE := $(shell sh tools/find_python.sh $(PYTHON)))$(BASE)
VENV = $(eval VENV := $(shell $(BASE) -c 'import sys; print(".venv" if sys.version_info[1] == 11 else ".venv-3.12")'))$(VENV)
PY = $(VENV)/bin/python
TRAIN = $(PY) -m torch.distributed.run --standalone --nproc-per-node $(RANKS) -m megatron_vp2o.train
INSTALL = $(BASE) tools/install.py --venv $(VENV) --torch '$(TORCH)' --torch-index '$(TORCH_INDEX)'

.DEFAULT_GOAL := help
.PHONY: help python verl-env test-verl diagnostics-page install install-dev run countdown run-rows study demo-trust-region test install-launch launch test-slurm vllm-env test-vllm soak eval eval-data test-lm-eval smoke lint docs plan simulate bench bench-peers gpu-check gpu-rehearsal wheels wheel clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-20s %s\n", $$1, $$2}' Makefile

python:
	@sh tools/find_python.sh $(PYTHON) >/dev/null

install: python ## Make the environment with what `make run` needs
	@$(INSTALL)

install-dev: python ## ... and with what the tests need
	@$(INSTALL) --extras dev
	@$(PY) tools/nltk_data.py

run: install ## Install, warm up on demonstrations, reinforce with GRPO, VP2O and GRPO with repelled answers, write the report
	$(TRAIN) --config-name open_path_tiny_supervised $(RUNARGS)
	$(TRAIN) --config-name open_path_tiny_grpo $(RUNARGS)
	$(TRAIN) --config-name open_path_tiny_vp2o $(RUNARGS)
	$(TRAIN) --config-name open_path_tiny_grpo_answers $(RUNARGS)
	$(PY) tools/report.py $(addprefix runs/open_path_tiny_,supervised grpo vp2o grpo_answers)

countdown: install ## 3-number countdown: warm-up, GRPO and VP2O, report
	$(TRAIN) --config-name countdown_tiny_supervised $(RUNARGS)
	$(TRAIN) --config-name countdown_tiny_grpo $(RUNARGS)
	$(TRAIN) --config-name countdown_tiny_vp2o $(RUNARGS)
	$(PY) tools/report.py $(addprefix runs/countdown_tiny_,supervised grpo vp2o)

run-rows: python ## Your own rows, on a laptop: questions and an untrained checkpoint, warm-up, GRPO with math-verify, export, transformers
	@$(INSTALL) --extras dev,rows,rewards
	$(PY) -m tools.arithmetic_rows runs
	$(TRAIN) --config-name rows_tiny_supervised $(RUNARGS)
	$(TRAIN) --config-name rows_tiny_grpo $(RUNARGS)
	$(PY) -m tools.check_rows_export runs/rows_tiny_grpo
	$(PY) tools/report.py runs/rows_tiny_supervised runs/rows_tiny_grpo

DEMO = optimizer.lr=6e-3 algorithm.steps=40 evaluation.interval=5 checkpoint.interval=0
demo-trust-region: install ## After `make countdown`: a learning rate 30 times too large, unclipped and under the trust region
	$(TRAIN) --config-name countdown_tiny_grpo name=unclipped $(DEMO) \
		algorithm.clip_epsilon_low=1 algorithm.clip_epsilon_high=1e9 $(RUNARGS)
	$(TRAIN) --config-name countdown_tiny_vp2o name=trust_region $(DEMO) \
		algorithm.trust_region.delta=0.012 algorithm.trust_region.max_backtracks=10 $(RUNARGS)
	$(PY) tools/report.py runs/unclipped runs/trust_region

study: install ## Variants x tasks x seeds, each run once: table and page in runs/study/STUDY [STUDY=smoke SLOTS=2 STUDYARGS=...]
	OMP_NUM_THREADS=1 $(PY) -m megatron_vp2o.study $(STUDY) --slots $(SLOTS) $(STUDYARGS)

eval: python ## The paper's evaluation: RUN='grpo=runs/a vp2o=runs/b' [SUITE=paper LENGTHS=8k,16k STEPS=every DATA=data/eval|own EVALARGS=]
	@$(INSTALL) --extras rows,rewards
	@$(PY) tools/nltk_data.py
	$(PY) -m megatron_vp2o.evaluate $(RUN) --suite '$(SUITE)' --lengths '$(LENGTHS)' --steps '$(STEPS)' --data '$(DATA)' \
		--out '$(EVALOUT)' $(EVALARGS)

test-lm-eval: python ## Our evaluation beside lm-eval's on the same model and rows (own environment: .venv-lm-eval)
	@$(BASE) tools/install.py --venv .venv-lm-eval --torch '$(TORCH)' --torch-index '$(TORCH_INDEX)' --extras dev,rows,rewards
	@.venv-lm-eval/bin/python tools/nltk_data.py
	@.venv-lm-eval/bin/python -m pip install -q 'lm_eval[hf]==0.4.13'
	.venv-lm-eval/bin/python -m pytest tests/evaluation/test_lm_eval.py --durations=0 $(TESTARGS)

eval-data: python ## Fetch the benchmarks' rows, pinned: [BENCHMARKS=paper DATA=data/eval] (needs the network; GPQA's authors ask not to publish it)
	@$(INSTALL) --extras rows
	$(PY) -m megatron_vp2o.evaluation.fetch $(subst $(comma), ,$(BENCHMARKS)) --data '$(DATA)'

convert-to-megatron: install ## Hugging Face to Megatron: HF=folder OUT=new folder [TP= PP= EP= ETP= CONVERTARGS=]
	$(PY) -m tools.convert to-megatron '$(HF)' '$(OUT)' --tp $(TP) --pp $(PP) --ep $(EP) --etp $(ETP) $(CONVERTARGS)

convert-to-hf: install ## Megatron checkpoint or run to Hugging Face: MEGATRON=folder OUT=new folder [CONVERTARGS='--like HF']
	$(PY) -m tools.convert to-hf '$(MEGATRON)' '$(OUT)' $(CONVERTARGS)

verify: install ## Compare a Hugging Face and a Megatron checkpoint: HF=folder MEGATRON=folder [CONVERTARGS=--logits]
	$(PY) -m tools.convert verify '$(HF)' '$(MEGATRON)' $(CONVERTARGS)

test: install-dev ## Install what tests need and run them (TESTARGS='-k word')
	$(PY) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations=40 $(TESTARGS)

install-launch: python ## Make the environment with what tests and `make launch` need (NeMo-Run)
	@$(INSTALL) --extras dev,nemo

launch: install-launch ## Launch a run: RECIPE=name [EXECUTOR=local|torchrun|slurm LAUNCHARGS='--dryrun executor.nodes=2 key=value']
	@$(PY) -m megatron_vp2o.launch --config-name '$(RECIPE)' executor=$(EXECUTOR) $(LAUNCHARGS)

test-slurm: install-launch ## Against a real Slurm: the one that answers here, else one is installed (root) and started, two emulated nodes
	$(PY) -m pytest tests/launch/test_scripts.py # two of them need NeMo-Run, which `make test` does not install
	bash tools/slurm_local.sh run $(PY) -m pytest -m slurm tests/slurm --durations=0 $(TESTARGS)

vllm-env: ## Make the environment of vLLM servers for CPUs (Python 3.11; minutes, 3.5 GB) [VLLM_ENV=.venv-vllm]
	@sh tools/vllm_env.sh '$(VLLM_ENV)'

test-vllm: install-dev vllm-env ## Against a real vLLM server on this machine: contract, faults, GRPO and VP2O through it, evaluation
	VP2O_VLLM_PYTHON='$(abspath $(VLLM_ENV)/bin/python)' $(PY) -m pytest tests/rollout/test_vllm.py tests/rollout/test_vllm_routes.py \
		tests/rollout/test_vllm_in_flight.py tests/rollout/test_vllm_broadcast.py \
		tests/evaluation/test_launched.py --durations=0 $(TESTARGS)

soak: install-dev ## After `make countdown`: 40 faults, 100 of servers, 30 uneven steps for each world, eight ranks for 30 steps (WARM_UP=run)
	VP2O_ROLLOUT_FAULTS=100 $(PY) -m pytest tests/rollout/test_soak.py -s $(TESTARGS)
	VP2O_OVERLAP_KILLS=5 $(PY) -m pytest tests/rollout/test_ahead.py -s $(TESTARGS)
	VP2O_PRETEND_LAYOUTS=1 $(PY) -m pytest tests/pretend $(TESTARGS)
	VP2O_RESUME_DRAWS=1 $(PY) -m pytest tests/test_resume_draws.py $(TESTARGS)
	VP2O_FAULTS=40 VP2O_UNEVEN=30 VP2O_WARM_UP='$(WARM_UP)' $(PY) -m pytest tests/test_faults.py \
		tests/megatron/test_uneven_ranks.py tests/test_many_ranks.py --durations=0 $(TESTARGS)

smoke: install-dev ## The short set of tests, for a second Python
	$(PY) -m pytest -n $(WORKERS) --dist loadfile -m smoke $(TESTARGS)

lint: install-dev ## ruff check, ruff format --check, mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

docs: install ## Renew docs/configuration.md and docs/metrics.md from the code
	@mkdir -p build
	$(PY) -m megatron_vp2o.config.reference > build/configuration.md && mv build/configuration.md docs/configuration.md
	$(PY) -m megatron_vp2o.tracking.reference > build/metrics.md && mv build/metrics.md docs/metrics.md

plan: install ## What a recipe needs of each GPU: RECIPE=name [PLANARGS='--gpus 64 --device h100 --suggest --json key=value']
	@$(PY) -m tools.plan '$(RECIPE)' $(PLANARGS)

simulate: install ## An optimizer step of single ranks without their processes: RECIPE=name [RANK='0 63'] [PLANARGS=...]
	@$(PY) -m tools.simulate '$(RECIPE)' $(foreach rank,$(RANK),--rank $(rank)) $(PLANARGS)

verl-env: python ## The environment of `make test-verl`: verl and what its Megatron engine needs, in .venv-verl
	@$(BASE) tools/install.py --venv .venv-verl --torch '$(TORCH)' --torch-index '$(TORCH_INDEX)' \
		--requirements tools/verl_requirements.txt

test-verl: verl-env ## The plug-in in verl's own trainers, on a CPU, from a built wheel (TESTARGS)
	.venv-verl/bin/python -m pytest -m verl tests/plugins/test_verl.py --durations=0 $(TESTARGS)

diagnostics-page: install-dev ## Renew the plots of docs/diagnostics.md
	OMP_NUM_THREADS=1 $(PY) -m tools.diagnostics_page docs/diagnostics

bench: install ## Tokens/s, seconds of each phase of a step, start-up time (BENCHARGS)
	$(PY) -m tools.bench all $(BENCHARGS)

bench-peers: install ## Time a GRPO step of TRL's and ours in turn (own environment: .venv-peers)
	@$(BASE) tools/install.py --venv .venv-peers --torch '$(TORCH)' --torch-index '$(TORCH_INDEX)' \
		--requirements tools/bench/peer_requirements.txt
	$(PY) -m tools.bench peers --peer-python .venv-peers/bin/python $(BENCHARGS)

gpu-check: ## On a CUDA machine: tests marked gpu, benchmarks, in stages (WHEELS=folder of wheels)
	@PYTHON='$(PYTHON)' WHEELS='$(WHEELS)' bash tools/gpu_check.sh

gpu-rehearsal: wheels ## What make gpu-check does before the first CUDA call, with the packages of such an image (Python 3.12; gigabytes)
	@BASE='$(BASE)' WHEELS='$(WHEELS)' bash tools/gpu_rehearsal.sh

wheels: install ## Fetch into WHEELS what a CUDA machine without a package index lacks (tools/gpu_wheels.txt)
	$(PY) -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
		--platform manylinux_2_28_x86_64 -d $(WHEELS) -r tools/gpu_wheels.txt
	$(PY) -m pip wheel -q --no-deps -w $(WHEELS) antlr4-python3-runtime==4.9.3 # hydra's; it has no wheel
	@ls -s --block-size=K $(WHEELS)

wheel: install-dev ## Build dist/*.whl
	$(PY) -m pip wheel -q --no-deps --no-build-isolation --wheel-dir dist .
	@ls dist/*.whl

clean: ## Remove builds and caches (environments and runs stay)
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find megatron_vp2o tools tests -name __pycache__ -type d -prune -exec rm -rf {} +
