"""Settings of the smallest model and task that whole runs of the tests have."""

from __future__ import annotations

MODEL = [
    "model.num_layers=2",
    "model.hidden_size=32",
    "model.num_attention_heads=2",
    "model.num_query_groups=2",
    "model.num_moe_experts=4",
    "model.moe_router_topk=2",
    "model.moe_ffn_hidden_size=16",
]
TASK = ["task.train_size=50", "task.validation_size=8", "task.test_size=8"]
EVALUATION = ["evaluation.problems=8", "evaluation.samples=2", "evaluation.pass_at=[1,2]"]
SMALL = [
    *MODEL,
    *TASK,
    *EVALUATION,
    "rollout.sampling.max_new_tokens=8",
    "checkpoint.interval=2",
    "optimizer.lr=1e-2",
    "optimizer.lr_warmup_steps=2",
    "logging.tensorboard=false",
    "threads=1",
]
