"""What variants that change the reward cost: their shaping of a batch over that of GRPO, as a share of a whole training step.

The steps are real ones of the tiny recipe (rollouts, training, refresh of the actors), from random weights. After each one, every
variant shapes the same rollouts with the same verdicts, in turns and in another order each time, in this process. From random
weights no answer is right; the verdicts that are shaped are therefore of made-up responses, half of them right.

The prior in the reward (`grpo_prior`, `grpo_answers`) also needs a forward pass of the reference, which is no part of the shaping:
it has a line of its own, without a goal.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

GOAL = 2.0  # per cent of a step
BASE = "grpo"
VARIANTS = {
    BASE: [],
    "grpo_prior": ["algorithm=grpo_prior"],
    "grpo_answers": ["algorithm=grpo_answers"],
    "answers, n-grams": ["algorithm=grpo_answers", "algorithm.answer_repulsion.kernel=ngram"],
    "answers, edit distance": ["algorithm=grpo_answers", "algorithm.answer_repulsion.kernel=edit"],
    "answers, counts": ["algorithm=grpo_answers", "algorithm.answer_repulsion.form=count"],
    "darling": ["algorithm=darling"],
    "unlikeliness": ["algorithm=unlikeliness"],
    "pass_at_k": ["algorithm=pass_at_k"],
    "maxrl": ["algorithm=maxrl"],
    "w_reinforce": ["algorithm=w_reinforce"],
}
REFERENCE = "reference's forward pass"


def main(argv: list[str]) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="tools.bench variants", description=__doc__)
    parser.add_argument("--steps", type=int, default=12, help="steps that count")
    parser.add_argument("--warmup", type=int, default=2, help="steps before those")
    parser.add_argument(
        "--repeats", type=int, default=5, help="shapings of each variant after a step; their median counts"
    )
    parser.add_argument("--recipe", default="linear_order_tiny_grpo", help="a tiny recipe of reinforcement")
    parser.add_argument(
        "--override", action="append", default=[], metavar="KEY=VALUE", help="of the recipe; repeatable"
    )
    parser.add_argument("--cpu-time", action="store_true", help="of this process, on a machine with other work")
    arguments = parser.parse_known_args(argv)[0]
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    print(report(measure(arguments, clock), clock.__name__), flush=True)
    return 0


def measure(arguments: argparse.Namespace, clock: Callable[[], float]) -> list[dict[str, float]]:
    """Seconds for each counted step: of `step`, of every variant's shaping, of the reference's forward pass."""
    from megatron_vp2o.megatron.platform.cpu import enable_cpu

    enable_cpu()
    from megatron_vp2o.config.compose import compose
    from megatron_vp2o.core.objective import GRPOObjective
    from megatron_vp2o.megatron.actor.generation import MegatronEngine
    from megatron_vp2o.megatron.learner.policy import MegatronPolicy
    from megatron_vp2o.megatron.platform import world
    from megatron_vp2o.rl.objectives import OnRollouts
    from megatron_vp2o.rl.refresh import EveryBatches
    from megatron_vp2o.rl.rewards import RewardShaping
    from megatron_vp2o.rl.trainer import RLTrainer
    from megatron_vp2o.tasks import make_task

    turns: list[dict[str, float]] = []
    draw = random.Random(0)

    class Measured(RLTrainer):
        shapings: dict[str, RewardShaping]
        seen: tuple[Any, Any]

        def step(self, step: int, watch: Any) -> dict[str, float]:
            begin = clock()
            metrics = super().step(step, watch)
            turns.append({"step": clock() - begin, **self.shape()})
            return metrics

        def _earned(self, problems: Any, rollouts: Any, verdicts: Any, reference_NS: Any) -> Any:
            self.seen = problems, rollouts
            return super()._earned(problems, rollouts, verdicts, reference_NS)

        def shape(self) -> dict[str, float]:
            problems, rollouts = self.seen
            begin = clock()
            reference_NS = self.engine.log_probs(rollouts, self.sampling.temperature)
            seconds = {REFERENCE: clock() - begin}
            size = self.settings.group_size
            verdicts = [[made_up(self.task, problem, draw) for _ in range(size)] for problem in problems]
            times: dict[str, list[float]] = defaultdict(list)
            for _ in range(arguments.repeats):
                for name, shaping in draw.sample([*self.shapings.items()], len(self.shapings)):
                    begin = clock()
                    shaping(verdicts, rollouts, reference_NS)
                    times[name].append(clock() - begin)
            return seconds | {name: statistics.median(found) for name, found in times.items()}

        def evaluate(self, final: bool) -> dict[str, float]:
            return {}

    with tempfile.TemporaryDirectory() as folder:
        steps = arguments.warmup + arguments.steps
        settings = ["init_from=null", f"run_dir={folder}/run", f"algorithm.steps={steps}"]
        settings += ["algorithm.filter_uniform_groups=false", "checkpoint.interval=0", "checkpoint.save_at_end=false"]
        configs = {
            name: compose(arguments.recipe, [*own, *arguments.override, *settings]) for name, own in VARIANTS.items()
        }
        config = configs[BASE]
        world.set_threads(config.threads)
        task = make_task(config.task)
        with world.joined(config.parallel, config.seed) as groups:
            policy = MegatronPolicy(config, groups, vocab_size=task.tokenizer.vocab_size, optimizer_steps=10**6)
            engine = MegatronEngine(config, policy, eos_ids=task.tokenizer.eos_ids, pad_id=task.tokenizer.pad_id)
            trainer = Measured(
                config,
                groups,
                _NoSink(),
                _NoSaver(),
                task=task,
                policy=policy,
                engine=engine,
                objective=OnRollouts(
                    GRPOObjective(clip_epsilon_low=0.2, clip_epsilon_high=0.2, kl_coef=0.0, entropy_coef=0.0)
                ),
                refresh=EveryBatches(1),
            )
            longest = config.rollout.sampling.max_new_tokens
            trainer.shapings = {
                name: RewardShaping(one.algorithm, task.tokenizer, one.reward, longest=longest)  # type: ignore[arg-type]
                for name, one in configs.items()
            }
            trainer.run()
    return turns[arguments.warmup :]


def made_up(task: Any, problem: Any, draw: random.Random) -> Any:
    """A verdict: of a right answer, drawn uniformly, or of none."""
    return task.verify(problem, task.demonstration(problem, draw.getrandbits(32)) if draw.random() < 0.5 else "")


def report(turns: list[dict[str, float]], clock: str) -> str:
    """Medians over the steps; each variant's difference from GRPO is taken within a step."""
    lines = [f"{len(turns)} steps by {clock}: {statistics.median(turn['step'] for turn in turns) * 1e3:,.1f} ms a step"]
    for name in (name for name in VARIANTS if name in turns[0]):
        own = statistics.median(turn[name] for turn in turns)
        more = [100 * (turn[name] - turn[BASE]) / turn["step"] for turn in turns]
        said = "" if name == BASE else f"; over {BASE} {statistics.median(more):+.2f} % of a step (goal: {GOAL:.0f} %)"
        lines.append(f"  {name:24}{own * 1e3:9.3f} ms{said}")
    share = statistics.median(100 * turn[REFERENCE] / turn["step"] for turn in turns)
    lines.append(f"  {REFERENCE}: {share:.1f} % of a step, in variants with the prior (no goal)")
    return "\n".join(lines)


class _NoSink:
    def write(self, step: int, metrics: dict[str, Any]) -> None:
        pass

    def phase(self, what: str) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


class _NoSaver:
    def save(self, step: int, state: dict[str, Any]) -> None:
        raise RuntimeError("a benchmark saves nothing")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
