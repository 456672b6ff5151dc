"""This project's GRPO step on the work of `peer_work`: the real trainer, policy and engine, on a task of fixed length."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.bench import peer_work


class CharacterIds:
    """Characters to ids as on the peer's side, one character for every id; no id ends a response."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.pad_id = self.eos_id = -1
        self.eos_ids: tuple[int, ...] = (-1,)  # never sampled: every response has full length and is all text
        first = 2 + len(peer_work.ALPHABET)
        self.symbols = ["\0", "?", *peer_work.ALPHABET, *(chr(0x4E00 + i) for i in range(first, vocab_size))]
        self.ids = {symbol: i for i, symbol in enumerate(self.symbols)}

    def encode(self, text: str) -> list[int]:
        return [self.ids[character] for character in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join([self.symbols[i] for i in ids])

    def save(self, folder: Path) -> None:
        raise NotImplementedError("a benchmark saves nothing")


def main() -> None:
    arguments = peer_work.parser(__doc__ or "").parse_args()
    from megatron_vp2o.megatron.platform.cpu import enable_cpu

    enable_cpu()  # before megatron.core is imported; does nothing where there is CUDA
    import megatron_vp2o
    from megatron_vp2o.config.compose import compose
    from megatron_vp2o.core.objective import GRPOObjective
    from megatron_vp2o.megatron.actor.generation import MegatronEngine
    from megatron_vp2o.megatron.learner.policy import MegatronPolicy
    from megatron_vp2o.megatron.platform import world
    from megatron_vp2o.rl.interfaces import Tokenizer
    from megatron_vp2o.rl.objectives import OnRollouts
    from megatron_vp2o.rl.refresh import EveryBatches
    from megatron_vp2o.rl.trainer import RLTrainer
    from megatron_vp2o.rl.types import Problem, Split, Verdict

    work = peer_work.work_of(arguments)
    steps = arguments.warmup + arguments.steps
    tokenizer = CharacterIds(work.vocab_size)
    texts = work.prompt_texts(work.prompts * steps)

    class EvenTokens:
        """Right when more than half of the response's ids are even; the peer's reward."""

        name = "even_tokens"
        max_prompt_tokens = max(map(len, texts))
        grades_elsewhere = False

        def __init__(self) -> None:
            self.tokenizer: Tokenizer = tokenizer

        def size(self, split: Split) -> int:
            return len(texts)

        def problem(self, split: Split, index: int, variant: int = 0) -> Problem:
            return Problem(uid=index, prompt=texts[index], data=None, n_solutions=1)

        def verify(self, problem: Problem, response: str) -> Verdict:
            correct = bool(peer_work.reward([tokenizer.ids[symbol] for symbol in response]))
            return Verdict(correct, "even" if correct else None, "" if correct else "odd")

        def verify_all(self, problems: Sequence[Problem], responses: Sequence[str]) -> list[Verdict]:
            return [self.verify(problem, response) for problem, response in zip(problems, responses, strict=True)]

        def demonstration(self, problem: Problem, seed: int) -> str:
            raise NotImplementedError("a benchmark of reinforcement needs none")

    marks: list[float] = []

    class Clock:
        """Takes the metrics of a step; a mark is the end of a whole step."""

        def write(self, step: int, metrics: dict[str, Any]) -> None:
            marks.append(time.perf_counter())
            length = metrics.get("rollout/response_length", work.new_tokens)
            if length != work.new_tokens:
                raise RuntimeError(f"responses of {length} tokens; every one should have {work.new_tokens}")

        def phase(self, what: str) -> contextlib.AbstractContextManager[None]:
            return contextlib.nullcontext()

    class NoSaver:
        def save(self, step: int, state: dict[str, Any]) -> None:
            raise RuntimeError("a benchmark saves nothing")

    class StepsOnly(RLTrainer):
        def evaluate(self, final: bool) -> dict[str, float]:
            return {}

    with tempfile.TemporaryDirectory() as folder:
        config = compose(
            "train",
            [
                "optimizer=rl",
                f"optimizer.lr={work.lr}",
                f"run_dir={folder}/run",
                f"threads={arguments.threads}",
                f"seed={work.seed}",
                f"algorithm.steps={steps}",
                f"algorithm.prompts_per_step={work.prompts}",
                f"algorithm.group_size={work.group_size}",
                f"algorithm.micro_batch_size={work.prompts * work.group_size // int(os.environ.get('WORLD_SIZE', '1'))}",
                "algorithm.filter_uniform_groups=false",
                # all rows of a rank in one micro-batch, and each prompt once
                f"algorithm.micro_batch_tokens={work.prompts * work.group_size * work.longest}",
                "algorithm.prefix_sharing=on",
                f"model.max_sequence_length={max(64, work.longest)}",
                f"rollout.sampling.max_new_tokens={work.new_tokens}",
                "rollout.sampling.temperature=1.0",
                f"model.num_layers={work.num_layers}",
                f"model.hidden_size={work.hidden_size}",
                f"model.num_attention_heads={work.heads}",
                f"model.num_query_groups={work.kv_heads}",
                f"model.kv_channels={work.head_dim}",
                f"model.num_moe_experts={work.num_experts}",
                f"model.moe_router_topk={work.top_k}",
                f"model.moe_ffn_hidden_size={work.expert_width}",
                "model.moe_router_load_balancing_type=none",
                "model.moe_aux_loss_coeff=0",
                "evaluation.interval=0",
                "checkpoint.interval=0",
                "checkpoint.save_at_end=false",
            ],
        )
        world.set_threads(config.threads)
        with world.joined(config.parallel, config.seed) as groups:
            policy = MegatronPolicy(config, groups, vocab_size=work.vocab_size, optimizer_steps=steps)
            engine = MegatronEngine(config, policy, eos_ids=[tokenizer.eos_id], pad_id=0)
            objective = GRPOObjective(clip_epsilon_low=0.2, clip_epsilon_high=0.2, kl_coef=0.0, entropy_coef=0.0)
            StepsOnly(
                config,
                groups,
                Clock(),
                NoSaver(),
                task=EvenTokens(),
                policy=policy,
                engine=engine,
                objective=OnRollouts(objective),
                refresh=EveryBatches(1),
            ).run()
            parameters = sum(p.numel() for p in policy.model.parameters())
            first = groups.rank == 0
    if not first:
        return
    version = megatron_vp2o.__version__
    peer_work.write_result(
        arguments.out, name="ours", version=version, marks=marks, warmup=arguments.warmup, parameters=parameters
    )


if __name__ == "__main__":
    main()
