"""Names of what a run writes into its folder; each stands here and nowhere else."""

CONFIG_FILE = "config.yaml"
RECORD_FILE = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
SUITES_FOLDER = "suites"
