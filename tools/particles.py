"""Would experts as particles at rollout time make answers differ? Measured on a finished run's weights, without training.

Every rollout keeps, for each token and layer, the `head` most probable experts and draws the other k - head from the rest, without
replacement, with noise of its own that stays the same over its tokens (docs/method.md; Expert-Sample, arXiv 2602.02443, draws the
tail anew for each token):

    S = top_head(z) + top_{k - head}(z_e / temperature + Gumbel(rollout, layer, e)  for e not in the first)
    gates = softmax of z over S

head = k is the model as it is. One process; sampling scores whole sequences, without a cache: meant for small models.

Shape legend: S positions, B rollouts, E experts, V vocabulary.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np


def chosen_experts(logits_SBE: Any, gumbel_BE: Any, *, topk: int, head: int, temperature: float) -> Any:
    """Which experts each token is sent to, bool [S, B, E], `topk` of them."""
    import torch

    first = torch.zeros_like(logits_SBE, dtype=torch.bool)
    if head:
        first.scatter_(-1, logits_SBE.topk(head, dim=-1).indices, True)
    if head == topk:
        return first
    noisy = (logits_SBE / temperature + gumbel_BE).masked_fill(first, float("-inf"))
    return first.scatter(-1, noisy.topk(topk - head, dim=-1).indices, True)


def perturb(model: Any, gumbel_LBE: Any, *, head: int, temperature: float) -> None:
    """Route each row of the batches that follow with its own noise; None undoes it."""
    from megatron_vp2o.megatron.model.moe_layer import moe_layers

    for layer, router in enumerate(layer.router for layer in moe_layers(model)):
        router.__dict__.pop("routing", None)
        if gumbel_LBE is None:
            continue

        def routing(self: Any, logits: Any, *args: Any, _layer: int = layer, **kwargs: Any) -> Any:
            mask = chosen_experts(logits, gumbel_LBE[_layer], topk=self.topk, head=head, temperature=temperature)
            return type(self).routing(self, logits.masked_fill(~mask, float("-inf")), *args, **kwargs)

        router.routing = MethodType(routing, router)


def sample(policy: Any, prompts: list[list[int]], eos: set[int], longest: int, generator: Any) -> list[list[int]]:
    """One response to each prompt at temperature 1, end-of-sequence left out."""
    import torch

    width = max(map(len, prompts)) + longest
    tokens_BS = torch.zeros(len(prompts), width, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        tokens_BS[row, : len(prompt)] = torch.tensor(prompt)
    length_B = torch.tensor([len(prompt) for prompt in prompts])
    ended_B = torch.zeros(len(prompts), dtype=torch.bool)
    every_B = torch.arange(len(prompts))
    responses: list[list[int]] = [[] for _ in prompts]
    for _ in range(longest):
        seen = int(length_B.max())
        logits_BSV = policy.model(tokens_BS[:, :seen], torch.arange(seen).expand(len(prompts), -1), None)
        probs_BV = logits_BSV[every_B, length_B - 1, : policy.valid_vocab].float().softmax(-1)
        next_B = probs_BV.multinomial(1, generator=generator).squeeze(1)
        for row in (~ended_B).nonzero().squeeze(1).tolist():
            if int(next_B[row]) in eos:
                ended_B[row] = True
            else:
                responses[row].append(int(next_B[row]))
        tokens_BS[every_B, length_B] = next_B
        length_B += 1
        if bool(ended_B.all()):
            break
    return responses


def measure(
    policy: Any, task: Any, problems: list[Any], arguments: argparse.Namespace, head: int, heat: float
) -> dict[str, float]:
    """pass@1, pass@16 and distinct right answers of all samples, means over problems."""
    import torch

    from megatron_vp2o.core.evaluation import pass_at_k

    shape = policy.model.config
    generator = torch.Generator().manual_seed(arguments.seed)
    found: list[list[Any]] = []
    for begin in range(0, len(problems), 16):
        asked = [p for p in problems[begin : begin + 16] for _ in range(arguments.samples)]
        prompts = [problem.prompt_tokens(task.tokenizer) for problem in asked]
        noise = torch.rand(shape.num_layers, len(asked), shape.num_moe_experts, generator=generator)
        perturb(policy.model, -(-noise.log()).log(), head=head, temperature=heat)
        responses = sample(policy, prompts, set(task.tokenizer.eos_ids), arguments.longest, generator)
        verdicts = task.verify_all(asked, [task.tokenizer.decode(ids) for ids in responses])
        found += [verdicts[i : i + arguments.samples] for i in range(0, len(asked), arguments.samples)]
    perturb(policy.model, None, head=head, temperature=heat)
    right = [Counter(v.canonical for v in verdicts if v.correct) for verdicts in found]
    count = arguments.samples
    return {
        f"pass@{k}": float(np.mean([pass_at_k(count, sum(one.values()), k) for one in right]))
        for k in (1, min(16, count))
    } | {"distinct": float(np.mean([len(one) for one in right]))}


def main(argv: list[str]) -> int:
    """Print one line for each head and temperature."""
    parser = argparse.ArgumentParser(prog="python -m tools.particles", description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--heads", type=int, nargs="+", help="experts kept of the k (default: k, k - 1, k / 2, 1, 0)")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.5, 1.0, 2.0])
    parser.add_argument("--problems", type=int, default=48)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    from megatron_vp2o.megatron.platform.cpu import enable_cpu

    enable_cpu()
    import torch

    from megatron_vp2o.config.store import load_config
    from megatron_vp2o.megatron.hf import start
    from megatron_vp2o.megatron.learner.policy import MegatronPolicy
    from megatron_vp2o.megatron.platform import world
    from megatron_vp2o.rl.types import Split
    from megatron_vp2o.tasks import make_task

    config = load_config(arguments.run)
    config.init_from = str(arguments.run)
    arguments.longest = config.rollout.sampling.max_new_tokens
    topk = config.model.moe_router_topk
    heads = arguments.heads or sorted({topk, topk - 1, topk // 2, 1, 0}, reverse=True)
    world.set_threads(config.threads)
    task = make_task(config.task, progress=False)
    problems = [task.problem(Split.test, i) for i in range(min(arguments.problems, task.size(Split.test)))]
    with world.joined(config.parallel, config.seed) as groups:
        policy = MegatronPolicy(config, groups, vocab_size=task.tokenizer.vocab_size, optimizer_steps=1)
        start.start(config, policy, task.tokenizer, groups)
        policy.model.eval()
        print(f"{arguments.run}: {len(problems)} test problems, {arguments.samples} samples, k = {topk}")
        print(
            "| experts kept | temperature | pass@1 | pass@16 | distinct right answers |\n| --- | --- | --- | --- | --- |"
        )
        for head in heads:
            for heat in arguments.temperatures if head < topk else arguments.temperatures[:1]:
                with torch.no_grad():
                    got = list(measure(policy, task, problems, arguments, head, heat).values())
                print(
                    f"| {head} | {'' if head == topk else f'{heat:g}'} | " + " | ".join(f"{v:.3f}" for v in got) + " |",
                    flush=True,
                )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
