"""Tasks with many right answers, each against a search over everything that could be written."""

from __future__ import annotations

import random
from collections import Counter
from itertools import combinations, combinations_with_replacement, permutations, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vp2o.config.schema import (
    AddendsTaskConfig,
    AnswerFormat,
    BracketsTaskConfig,
    ChangeTaskConfig,
    ColoringTaskConfig,
    LinearOrderTaskConfig,
    OpenPathTaskConfig,
)
from megatron_vp2o.errors import ConfigError
from megatron_vp2o.rl.types import Problem, Split
from megatron_vp2o.tasks import make_task
from megatron_vp2o.tasks.addends import Addends, AddendsTask, ways
from megatron_vp2o.tasks.coloring import Coloring, ColoringTask, colorings, renamed
from megatron_vp2o.tasks.linear_order import LinearOrderTask, Precedences, closure, completions

SIZES = {"train_size": 60, "validation_size": 8, "test_size": 8}
CONFIGS = [
    AddendsTaskConfig(max_target=60, **SIZES),  # type: ignore[arg-type]
    ColoringTaskConfig(nodes=5, edges=4, min_answers=4, **SIZES),  # type: ignore[arg-type]
    OpenPathTaskConfig(rows=4, columns=4, blocked_probability=0.1, min_answers=4, **SIZES),  # type: ignore[arg-type]
    LinearOrderTaskConfig(letters=5, precedences=4, min_answers=4, **SIZES),  # type: ignore[arg-type]
    BracketsTaskConfig(pairs=5, min_given=1, max_given=4, min_answers=3, **SIZES),  # type: ignore[arg-type]
    ChangeTaskConfig(kinds=4, coins=5, max_amount=20, min_answers=3, **SIZES),  # type: ignore[arg-type]
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_demonstrations_are_right_and_reach_every_answer(config):
    task = make_task(config)
    for index in range(6):
        problem = task.problem(Split.train, index)
        assert problem.n_solutions is not None and problem.n_solutions >= config.min_answers
        drawn = 60 * problem.n_solutions
        verdicts = task.verify_all([problem] * drawn, [task.demonstration(problem, seed) for seed in range(drawn)])
        assert all(verdict.correct for verdict in verdicts)
        counts = Counter(verdict.canonical for verdict in verdicts)
        assert len(counts) == problem.n_solutions, "every right answer, and no more"
        assert max(counts.values()) < 60 * 2.2 and min(counts.values()) > 60 / 2.2, "each about as likely as the next"


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_splits_do_not_overlap_and_equal_configurations_give_equal_problems(config):
    task, again = make_task(config), make_task(config)
    seen = {split: {task.problem(split, i).data for i in range(task.size(split))} for split in Split}
    assert not seen[Split.train] & seen[Split.test] and not seen[Split.train] & seen[Split.validation]
    assert [task.problem(Split.test, i) for i in range(8)] == [again.problem(Split.test, i) for i in range(8)]


@pytest.mark.parametrize("seed", range(8))
def test_addends_are_counted_and_judged_as_by_search(seed):
    rng = random.Random(seed)
    count, target = rng.randint(2, 4), rng.randint(6, 24)
    bound = rng.randint(2, target)
    right = [c for c in combinations_with_replacement(range(1, bound + 1), count) if sum(c) == target]
    assert ways(target, count, bound) == len(right)
    task = AddendsTask(AddendsTaskConfig(answer_format=AnswerFormat.strict, **SIZES))  # type: ignore[arg-type]
    problem = Problem(0, "", Addends(target, bound, count), len(right))
    texts = ["+".join(map(str, c)) for c in product(range(1, min(bound + 3, 13)), repeat=count)]
    for text in [*texts, "", "+", "1+", "01+5", f"{target}", "1 + 5", "-1+7", "1++5", "٣+3"]:
        numbers = tuple(sorted(int(n) for n in text.split("+"))) if text in texts else None
        verdict = task.verify(problem, text)
        assert verdict.correct == (numbers in right), (text, verdict)
        assert (verdict.canonical is not None) == verdict.correct
    lenient = AddendsTask(AddendsTaskConfig(**SIZES))  # type: ignore[arg-type]
    for c in right[:3]:
        assert lenient.verify(problem, f"<answer>{' + '.join(map(str, c))} = {target}</answer>").correct


@pytest.mark.parametrize("seed", range(8))
def test_colorings_are_counted_and_judged_as_by_search(seed):
    rng = random.Random(seed)
    nodes, colors = rng.randint(3, 5), rng.randint(2, 3)
    pairs = list(combinations(range(nodes), 2))
    edges = tuple(sorted(rng.sample(pairs, rng.randint(1, min(5, len(pairs))))))
    data = Coloring(nodes, colors, edges)
    task = ColoringTask(ColoringTaskConfig(nodes=5, edges=4, min_answers=2, answer_format=AnswerFormat.strict, **SIZES))  # type: ignore[arg-type]
    problem = Problem(0, "", data, 0)
    classes = set()
    for letters in product("abcd", repeat=nodes):
        text = "".join(letters)
        allowed = set(text) <= set("abcd"[:colors]) and all(text[a] != text[b] for a, b in edges)
        verdict = task.verify(problem, text)
        assert verdict.correct == allowed
        if allowed:
            # the same colouring, whatever the letters: by which pairs of nodes are alike
            alike = tuple(text[a] == text[b] for a, b in pairs)
            classes.add(alike)
            canonical = verdict.canonical
            assert isinstance(canonical, str) and tuple(canonical[a] == canonical[b] for a, b in pairs) == alike
            assert renamed(canonical) == canonical
    assert len(colorings(data)) == len(classes)
    for text in ("", "a", "a" * 50, "A" * nodes, "a b"):
        assert not task.verify(problem, text).correct


STRICT_ORDER = LinearOrderTask(LinearOrderTaskConfig(answer_format=AnswerFormat.strict, **SIZES))  # type: ignore[arg-type]
LENIENT_ORDER = LinearOrderTask(LinearOrderTaskConfig(**SIZES))  # type: ignore[arg-type]


@st.composite
def precedences(draw):
    letters = draw(st.integers(3, 6))
    hidden = draw(st.permutations(range(letters)))
    pairs = [(hidden[i], hidden[j]) for i, j in combinations(range(letters), 2)]
    return Precedences(letters, tuple(sorted(draw(st.sets(st.sampled_from(pairs), min_size=1)))))


@settings(max_examples=40, deadline=None)
@given(precedences())
def test_linear_orders_are_counted_and_judged_as_by_search(data):
    problem = Problem(0, "", data, 0)
    right = set()
    for letters in permutations("abcdef"[: data.letters]):
        text = "".join(letters)
        verdict = STRICT_ORDER.verify(problem, text)
        assert verdict.correct == all(text.index("abcdef"[a]) < text.index("abcdef"[b]) for a, b in data.pairs)
        assert verdict.canonical == (text if verdict.correct else None)
        if verdict.correct:
            right.add(text)
            assert LENIENT_ORDER.verify(problem, f"\\boxed{{{' < '.join(text)}}}").canonical == text
    assert completions(data)[0] == len(right)
    # what follows from the precedences is what holds in every right answer, and no more
    follows = {(a, b) for a in range(data.letters) for b in range(data.letters) if a != b}
    follows = {(a, b) for a, b in follows if all(text.index("abcdef"[a]) < text.index("abcdef"[b]) for text in right)}
    assert set(closure(data)) == follows


@settings(max_examples=60, deadline=None)
@given(precedences(), st.text(alphabet="abcdefg< ,A", max_size=12))
def test_what_is_no_order_is_wrong(data, text):
    given_letters = "abcdef"[: data.letters]
    verdict = STRICT_ORDER.verify(Problem(0, "", data, 0), text)
    assert verdict.correct <= (sorted(text) == list(given_letters))
    assert verdict.correct or verdict.reason in ("parse", "order")
    for changed in (given_letters[:-1], given_letters + "a", given_letters.upper(), given_letters[0] * data.letters):
        assert STRICT_ORDER.verify(Problem(0, "", data, 0), changed).reason == "parse"


@pytest.mark.parametrize(
    ("config", "quoted"),
    [
        (AddendsTaskConfig(min_target=50, max_target=40), ["min_target=50", "max_target=40"]),
        (AddendsTaskConfig(addends=4, min_target=2, max_target=3), ["max_target=3", "at least 4"]),
        (ColoringTaskConfig(nodes=4, edges=7), ["edges=7", "at most 6"]),
        (BracketsTaskConfig(min_given=4, max_given=3), ["min_given=4", "max_given=3"]),
        (BracketsTaskConfig(pairs=2), ["max_given=4", "pairs=2", "leave 2 places"]),
        (ChangeTaskConfig(min_amount=50), ["min_amount=50", "max_amount=40"]),
        (ChangeTaskConfig(min_amount=30, coins=3), ["min_amount=30", "coins=3", "at most 27"]),
        (LinearOrderTaskConfig(letters=4, precedences=7), ["precedences=7", "at most 6"]),
    ],
)
def test_settings_that_give_no_task(config, quoted):
    with pytest.raises(ConfigError) as error:
        make_task(config)
    assert all(part in str(error.value) for part in quoted)
