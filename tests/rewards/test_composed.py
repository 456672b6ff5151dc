"""From settings to a reward: which are called, how they add up, and what is refused."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from megatron_vp2o.config.compose import compose
from megatron_vp2o.config.reward import RewardConfig, RewardWeights
from megatron_vp2o.config.schema import TrainConfig
from megatron_vp2o.config.validate import validate
from megatron_vp2o.errors import ConfigError, RewardError
from megatron_vp2o.rewards import make_reward
from megatron_vp2o.rl.types import RewardResult

OWN = Path(__file__).parent / "own_rewards.py"


def results(config: RewardConfig, responses: list[str], rows: list[dict[str, Any]]) -> list[RewardResult]:
    reward = make_reward(config)
    assert reward is not None
    with reward:
        return reward(["a prompt"] * len(responses), responses, rows)


@pytest.mark.smoke
def test_a_weighted_sum_of_rewards_in_and_out_of_workers() -> None:
    config = RewardConfig(RewardWeights(math=2.0, format=0.5, length=-0.25), workers=2)
    config.length.full_words, config.length.zero_words = 2, 4
    responses = [r"<think>x</think> \boxed{1/2}", "0.5", "<think>x</think> 3", "I do not know at all"]
    first, second, third, fourth = results(config, responses, [{"answer": r"\frac{1}{2}"}] * 4)
    assert first.parts == {"math": 2.0, "format": 0.5, "length": -0.25}
    assert (first.reward, first.correct, first.canonical, first.reason) == (2.25, True, r"\frac{1}{2}", "")
    assert (second.reward, second.correct, second.reason) == (1.75, True, "format: another form")
    assert (third.reward, third.correct, third.reason) == (0.25, False, "math: another value")
    assert (fourth.reward, fourth.correct, fourth.canonical) == (0.0, False, None)
    assert fourth.reason == "math: no answer found; length: long; format: another form"


def test_rewards_that_need_no_worker_start_none() -> None:
    config = RewardConfig(RewardWeights(choice=1.0, exact=1.0))
    reward = make_reward(config)
    assert reward is not None and reward._pool is None
    both, one = reward(["", ""], ["B", "Answer: B"], [{"answer": "B"}] * 2)
    assert (both.reward, both.correct) == (2.0, True)
    assert (one.reward, one.correct) == (1.0, False)  # two rewards judge it, and one says no


def test_an_own_function_beside_a_built_in_one() -> None:
    config = RewardConfig(RewardWeights(exact=1.0, own=0.5), path=f"{OWN}:with_reasons", workers=1)
    (found,) = results(config, ["four"], [{"answer": "four"}])  # both say that it is right
    assert found == RewardResult(3.0, "own: 8 characters", "four", True, {"exact": 1.0, "own": 2.0, "own.x": 2.0})


def test_an_own_function_decides_what_is_right_only_alone_or_by_saying_so() -> None:
    own = f"{OWN}:shares"
    beside = RewardConfig(RewardWeights(exact=1.0), path=own, in_process=True)
    alone = RewardConfig(path=own, in_process=True)
    rows = [{"answer": "x"}] * 2
    assert [one.correct for one in results(beside, ["x", "y"], rows)] == [True, False]
    assert [one.correct for one in results(alone, ["x", "y"], rows)] == [False, False]


@pytest.mark.parametrize("in_process", [False, True])
def test_an_own_function_in_and_out_of_this_process(in_process: bool) -> None:
    config = RewardConfig(path=f"{OWN}:misbehaving", in_process=in_process, batch_size=4, workers=1)
    rows = [{"answer": str(n % 3), "__source__": f"rows.jsonl:{n + 1}"} for n in range(10)]
    found = results(config, [str(n % 2) for n in range(10)], rows)
    assert [one.reward for one in found] == [float(n % 2 == n % 3) for n in range(10)]
    with pytest.raises(RewardError, match=r"reward own: rows\.jsonl:7 .*KeyError"):
        results(config, ["raise" if n == 6 else "0" for n in range(10)], rows)


def test_a_row_without_an_answer_is_named() -> None:
    for weights in (RewardWeights(exact=1.0), RewardWeights(math=1.0)):
        with pytest.raises(RewardError, match=r"answer 1 of this batch .*no `answer`, but the columns question"):
            results(RewardConfig(weights, workers=1), ["1", "1"], [{"answer": "1"}, {"question": "?"}])


def test_no_reward() -> None:
    assert make_reward(RewardConfig()) is None


def config(*overrides: str) -> TrainConfig:
    return compose("countdown_tiny_grpo", ["init_from=null", *overrides])


def test_rows_need_a_reward_wherever_responses_are_graded(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "1+1=", "answer": "2"}\n')
    for recipe in ("countdown_tiny_grpo", "countdown_tiny_supervised"):
        composed = compose(recipe, ["task=rows", f"task.path={rows}", "init_from=null"])
        with pytest.raises(ConfigError, match=r"task\.name=rows needs a reward"):
            validate(composed)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("reward.weights.math=nan", "reward.weights.math=nan must be"),
        ("reward=math", "verifies answers itself, and reward.weights has math"),
        ("reward.path=score", "reward.path=score must be package.module:function or file.py:function"),
        ("reward.path=a-b:score", "a-b is neither a module's name nor a file"),
        ("reward.weights.own=1", "needs reward.path, which is null"),
        ("reward.in_process=true", "is for reward.path, which is null"),
        ("reward.regex.pattern='(a'", "is no regular expression"),
        ("reward.format.pattern='a)'", "is no regular expression"),
        ("reward.choice.letters=AAB", "must be two or more different capital letters"),
        ("reward.length.full_words=512", "is not below reward.length.zero_words=512"),
        ("reward.overlong_buffer=14", "exceeds rollout.sampling.max_new_tokens=13"),
        ("reward.workers=0", "reward.workers=0 must be at least 1"),
        ("reward.memory_mib=1", "reward.memory_mib=1 must be at least 256"),
    ],
)
def test_settings_that_cannot_work_are_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        validate(config(override))


def test_a_misspelt_reward_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'reward\.weights\.format'"):
        config("reward.weights.fromat=1")
    with pytest.raises(ConfigError, match="did you mean 'choice'"):
        config("reward=choise")


def test_the_group_files_give_each_reward_its_weight() -> None:
    for name in ("math", "choice", "exact", "regex", "code", "instructions", "length", "format"):
        assert config(f"reward={name}").reward.active() == {name: 1.0}
    both = config("reward=math", "reward.weights.format=0.2", "reward.path=a.b:c", "reward.weights.own=3")
    assert both.reward.active() == {"math": 1.0, "format": 0.2, "own": 3.0}


def test_the_example_of_the_documentation_is_a_reward(tmp_path: Path) -> None:
    """docs/rewards.md shows an own reward in ten lines; it does what the text beside it says."""
    text = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text(encoding="utf-8")
    source = re.search(r"```python\n# my_reward\.py\n(.*?)```", text, re.DOTALL)
    assert source is not None and len(list(filter(None, source[1].splitlines()))) <= 10
    (tmp_path / "my_reward.py").write_text(source[1])
    config = RewardConfig(path=f"{tmp_path / 'my_reward.py'}:close", workers=1)
    near, far, none = results(config, ["It is 41", "maybe 10 or 12", "no idea"], [{"answer": "42"}] * 3)
    assert near.reward == pytest.approx(1 / 2) and far.reward == pytest.approx(1 / 31)
    assert (near.canonical, near.reason) == ("41", "off by 1") and near.correct is False
    assert (none.reward, none.canonical) == (0.0, None)
    program = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n" + textwrap.dedent(
        """
        from megatron_vp2o.config.reward import RewardConfig
        from megatron_vp2o.rewards import make_reward
        with make_reward(RewardConfig(path="my_reward:close", workers=1)) as reward:
            print(reward(["?"], ["42"], [{"answer": 42}])[0].reward)
        """
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stdout == "1.0\n", done.stderr
