"""Settings that no run of tests/test_settings.py changes, and who tests them."""

from __future__ import annotations

import dataclasses

from megatron_vp2o.config.reward import CodeConfig
from megatron_vp2o.config.schema import ServerConfig, SuiteConfig

NOT_TRAINED_WITH = {
    "algorithm.name": "the group chooses it, and validate refuses another",
    "task.name": "the group chooses it, and validate refuses another",
    "exp_manager": "NeMo's settings of folders and loggers; tests/tracking/test_nemo.py",
    "logging.wandb": "where metrics go, not what is trained; tests/tracking/test_trackers.py",
    "logging.wandb_project": "a name; tests/tracking/test_trackers.py",
    "algorithm.answer_repulsion.embedder": "a function of the user's; tests/rl",
    "checkpoint.compare_logits": "a check of init_from before training; tests/megatron/test_hf_runs.py",
    **{
        f"evaluation.{name}": "benchmarks beside the training; tests/evaluation/test_during.py changes each in a run of three steps"
        for name in ("suites", *(f"suite.{field.name}" for field in dataclasses.fields(SuiteConfig)))
    },
    "logging.sample_table": "what is printed; tests/rl/test_samples.py",
    **dict.fromkeys(
        ("rollout.engine", "rollout.launch", "rollout.urls"),
        "servers need vLLM, in an environment of its own; tests/rollout",
    ),
    **dict.fromkeys(
        ("rollout.ahead", "rollout.in_flight_updates"), "servers; tests/rollout/test_ahead.py, test_in_flight.py"
    ),
    "rollout.replay": "takes the rollouts of another run; tests/rollout/test_store.py",
    **{
        f"rollout.server.{field.name}": "of servers; tests/rollout/test_vllm.py, test_pool.py"
        for field in dataclasses.fields(ServerConfig)
    },
    "task.settings": "of a task of the user's, trained in tests/tasks/test_own.py",
    "task.index_dir": "where an index of rows is kept; tests/tasks/test_rows.py",
    "task.hub_split": "needs a data set of the hub; tests/tasks/test_rows.py",
    **dict.fromkeys(
        ("task.chat_template", "task.enable_thinking", "task.system_prompt"),
        "the text of prompts, for a tokenizer with a template; tests/tasks/test_templates.py",
    ),
    **dict.fromkeys(
        (
            f"reward.{name}"
            for name in ("weights.code", *(f"code.{field.name}" for field in dataclasses.fields(CodeConfig)))
        ),
        "programs need a sandbox, which not every machine has; tests/rewards/test_code.py",
    ),
}
"""Settings that no run here can change, with the reason; one that a run does change must not stand here."""
