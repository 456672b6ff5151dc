"""Whether transformers reproduces a run's last evaluation: python -m tools.check_rows_export RUN

Loads RUN/hf, answers the validation prompts of RUN greedily, grades with RUN's reward, and compares with eval/greedy_accuracy of
the record. Exit status 1 where they differ by more than two problems (logits that tie break either way).
"""

from __future__ import annotations

import sys
from pathlib import Path

TOLERANCE = 2


def main() -> int:
    import torch
    from transformers import AutoModelForCausalLM

    from megatron_vp2o.config.store import load_config
    from megatron_vp2o.rewards import open_reward
    from megatron_vp2o.rl.grading import response_text
    from megatron_vp2o.rl.types import Split
    from megatron_vp2o.tasks import make_task
    from megatron_vp2o.tracking.runs import load_runs

    run = Path(sys.argv[1])
    config = load_config(run)
    model = AutoModelForCausalLM.from_pretrained(run / "hf", dtype=torch.float32).eval()
    with open_reward(config.reward) as reward:
        room = config.model.max_sequence_length - config.rollout.sampling.max_new_tokens
        task = make_task(config.task, reward=reward, room=room)
        tokenizer = task.tokenizer
        problems = [
            task.problem(Split.validation, i)
            for i in range(min(config.evaluation.problems, task.size(Split.validation)))
        ]
        texts = []
        for problem in problems:
            prompt = torch.tensor([problem.prompt_tokens(tokenizer)])
            ids = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=config.rollout.sampling.max_new_tokens,
                do_sample=False,
                eos_token_id=list(tokenizer.eos_ids),
                pad_token_id=tokenizer.pad_id,
            )
            texts.append(response_text(tokenizer, ids[0, prompt.shape[1] :].tolist()))
        right = sum(verdict.correct for verdict in task.verify_all(problems, texts))
    recorded = load_runs([run])[0].last("eval/greedy_accuracy")
    if recorded is None:
        print(f"{run} has no evaluation")
        return 1
    print(f"transformers: {right} of {len(problems)} right; the run recorded {round(recorded * len(problems))}")
    return int(abs(right - recorded * len(problems)) > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
