"""Pairs of a reference answer and a response, with what a careful reader says of them: 17 forms, ours.

`python -m tests.rewards.math_pairs` prints the agreement of reward=math by form, and where it differs.
"""

from __future__ import annotations

import collections
import functools
from typing import NamedTuple


class Pair(NamedTuple):
    """One answer."""

    form: str
    answer: str
    response: str
    right: bool


# form: [(reference answer, responses that are right, responses that are wrong)]
_TABLE: dict[str, list[tuple[str, list[str], list[str]]]] = {
    "integers": [
        ("42", ["42", "The answer is 42.", r"\boxed{42}", "$42$", "So we get 6*7 = 42"], ["41", r"\boxed{-42}", "420"]),
        ("-7", [r"\boxed{-7}", "The answer is -7."], ["7", r"\boxed{7}"]),
        ("1000000", ["1,000,000", r"\boxed{10^6}", r"$1{,}000{,}000$"], ["1,000", r"\boxed{10^5}"]),
        ("007", [r"\boxed{7}", "7"], ["70"]),
    ],
    "fractions": [
        (
            r"\frac{1}{2}",
            [r"\boxed{\frac12}", "1/2", r"$\dfrac{2}{4}$", r"\boxed{0.5}"],
            [r"\boxed{\frac{1}{3}}", "2", "2/1"],
        ),
        ("3/4", [r"\boxed{\frac{3}{4}}", "0.75", r"$\tfrac{3}{4}$"], ["4/3", r"\boxed{\frac{3}{5}}"]),
        (r"-\frac{5}{3}", [r"\boxed{-\frac{5}{3}}", r"\boxed{\frac{-5}{3}}", "-5/3"], ["5/3", r"\boxed{-\frac{3}{5}}"]),
        (r"2\frac{1}{3}", [r"\boxed{\frac{7}{3}}", r"\boxed{2\frac{1}{3}}"], [r"\boxed{\frac{2}{3}}"]),
    ],
    "decimals": [
        ("0.125", [r"\boxed{0.125}", ".125", r"\boxed{\frac{1}{8}}", "0.1250"], ["0.126", "1.25"]),
        ("3.14", ["3.14", r"\boxed{3.14}"], ["3.15", r"\boxed{3.1}", r"\boxed{\pi}"]),
        ("1.5e3", ["1500"], ["15"]),
        (r"0.\overline{3}", [r"\boxed{\frac{1}{3}}"], [r"\boxed{0.3}"]),
    ],
    "percent": [
        ("50%", [r"\boxed{50\%}", "50%", "0.5", "50 percent"], ["5%", "0.05"]),
        (r"12.5\%", [r"\boxed{12.5\%}", r"\boxed{\frac{1}{8}}", "12.5%"], ["1.25%"]),
        ("0.5", ["50%", r"\boxed{50\%}"], ["5%"]),
    ],
    "powers and roots": [
        (r"2\sqrt{3}", [r"\boxed{\sqrt{12}}", r"$2\sqrt{3}$", r"\boxed{\frac{6}{\sqrt{3}}}"], [r"\boxed{3\sqrt{2}}"]),
        ("2^{10}", [r"\boxed{1024}", "1024", r"$2^{10}$"], ["1023", r"\boxed{10^2}"]),
        (r"\sqrt[3]{8}", [r"\boxed{2}"], [r"\boxed{\sqrt{8}}"]),
        (r"e^{2}", [r"\boxed{e^2}"], [r"\boxed{2e}"]),
    ],
    "expressions": [
        ("x^2+2x+1", [r"$(x+1)^2$", r"\boxed{1+2x+x^2}"], [r"$x^2+1$", r"\boxed{x^2+2x}"]),
        (r"\frac{x+1}{2}", [r"\boxed{\frac{x}{2}+\frac12}", r"$0.5(x+1)$"], [r"\boxed{\frac{x}{2}+1}"]),
        (r"\sin^2 x + \cos^2 x", [r"\boxed{1}"], [r"\boxed{0}"]),
        (r"n(n+1)/2", [r"\boxed{\frac{n^2+n}{2}}"], [r"\boxed{\frac{n^2-n}{2}}"]),
    ],
    "equations": [
        ("x = 5", [r"\boxed{5}", "$x=5$", "x = 5"], ["x = 6", r"\boxed{-5}"]),
        ("y = 2x + 1", [r"\boxed{y = 2x+1}", r"$y=1+2x$", r"\boxed{2x+1}"], [r"\boxed{y=2x-1}"]),
        ("5", [r"$x = 5$", r"\boxed{x=5}"], [r"\boxed{x=4}"]),
    ],
    "sets": [
        (r"\{1, 2, 3\}", [r"\boxed{\{3,2,1\}}", r"\boxed{1,2,3}"], [r"\boxed{\{1,2\}}", r"\boxed{\{1,2,4\}}"]),
        (r"\{-1, 1\}", [r"$\{1,-1\}$", r"\boxed{\pm 1}", r"$x=1$ or $x=-1$"], [r"\boxed{1}"]),
        (r"\emptyset", [r"\boxed{\emptyset}", r"\boxed{\varnothing}"], [r"\boxed{0}"]),
    ],
    "tuples": [
        (
            "(1, 2)",
            [r"\boxed{(1,2)}", r"$(1, 2)$", r"\boxed{\left(1,2\right)}"],
            [r"\boxed{(2,1)}", r"\boxed{(1,2,3)}"],
        ),
        (r"(\frac{1}{2}, -3)", [r"\boxed{(0.5,-3)}"], [r"\boxed{(\frac{1}{2},3)}"]),
    ],
    "intervals": [
        ("[0, 1)", [r"\boxed{[0,1)}", r"$0 \le x < 1$"], [r"\boxed{[0,1]}", r"\boxed{(0,1)}"]),
        (
            r"(-\infty, 2]",
            [r"\boxed{(-\infty,2]}", r"\boxed{x \le 2}"],
            [r"\boxed{(-\infty,2)}", r"\boxed{(2,\infty)}"],
        ),
        (r"(-1,1)\cup(2,3)", [r"\boxed{(-1,1)\cup(2,3)}", r"$(2,3)\cup(-1,1)$"], [r"\boxed{(-1,3)}"]),
    ],
    "units": [
        (r"10\text{ cm}", [r"\boxed{10\text{ cm}}", "10 cm", r"\boxed{10}"], [r"\boxed{100\text{ cm}}", "1 cm"]),
        ("$15", [r"\boxed{15}", r"\boxed{\$15}", "15 dollars"], [r"\boxed{\$15.5}"]),
        (r"90^\circ", [r"\boxed{90^\circ}", r"\boxed{90}"], [r"\boxed{45^\circ}"]),
        ("20 minutes", ["20 minutes", r"\boxed{20}"], ["25 minutes"]),
        ("5 km/h", [r"\boxed{5\text{ km/h}}", "5 km/h"], [r"\boxed{6\text{ km/h}}"]),
    ],
    "scientific notation": [
        (
            r"1.5\times 10^3",
            [r"\boxed{1500}", r"\boxed{1.5 \cdot 10^{3}}", r"$15 \times 10^2$"],
            [r"\boxed{1.5\times 10^4}"],
        ),
        (r"2 \times 10^{-3}", [r"\boxed{0.002}", r"\boxed{\frac{1}{500}}"], [r"\boxed{0.02}", r"\boxed{-2000}"]),
    ],
    "inequalities": [
        ("x > 3", [r"\boxed{x > 3}", r"$3 < x$", r"\boxed{(3, \infty)}"], [r"\boxed{x \ge 3}", r"\boxed{x < 3}"]),
        (
            r"-1 \le x \le 1",
            [r"\boxed{[-1,1]}", r"\boxed{-1 \leq x \leq 1}"],
            [r"\boxed{(-1,1)}", r"\boxed{-1 < x < 1}"],
        ),
    ],
    "constants": [
        (r"\pi", [r"\boxed{\pi}", r"$\pi$"], [r"\boxed{3}", r"\boxed{2\pi}"]),
        (r"\frac{\pi}{4}", [r"\boxed{\pi/4}", r"\boxed{\frac14\pi}", r"\boxed{\arctan 1}"], [r"\boxed{\frac{\pi}{2}}"]),
        ("1+i", [r"\boxed{1+i}", r"$i+1$"], [r"\boxed{1-i}"]),
        (r"\infty", [r"\boxed{\infty}"], [r"\boxed{-\infty}"]),
    ],
    "logarithms and sums": [
        (r"\ln 2", [r"\boxed{\ln(2)}", r"\boxed{\log_e 2}", r"\boxed{\frac{\ln 4}{2}}"], [r"\boxed{\ln 3}"]),
        (r"\log_2 8", [r"\boxed{3}"], [r"\boxed{8}"]),
        (r"\binom{5}{2}", [r"\boxed{10}"], [r"\boxed{20}"]),
        ("5!", [r"\boxed{120}"], [r"\boxed{24}"]),
    ],
    "matrices": [
        (
            r"\begin{pmatrix}1&2\\3&4\end{pmatrix}",
            [r"\boxed{\begin{pmatrix}1&2\\3&4\end{pmatrix}}", r"$\begin{bmatrix}1&2\\3&4\end{bmatrix}$"],
            [r"\boxed{\begin{pmatrix}1&3\\2&4\end{pmatrix}}"],
        ),
    ],
    "text around": [
        (
            "12",
            [
                "First 3 apples, then 9 more. The answer is 12.",
                "**Answer: 12**",
                "Final answer: $12$. I hope it is correct.",
                "<think>maybe 13?</think> It is 12",
                r"We have 5 + 7. Therefore $\boxed{12}$ apples, not 13.",
                r"\boxed{13}? No, \boxed{12}",
                "#### 12",
                r"Thus \[ x = \boxed{12} \]",
                "twelve",
            ],
            [
                "12 is too small, the answer is 13.",
                "There is no answer.",
                "",
                r"\boxed{}",
                "I think 12, 13 or 14",
                r"\boxed{12} is wrong, so \boxed{14}",
                "<think>12</think> I do not know",
            ],
        ),
    ],
}

PAIRS = [
    Pair(form, answer, response, right)
    for form, entries in _TABLE.items()
    for answer, right_ones, wrong_ones in entries
    for responses, right in ((right_ones, True), (wrong_ones, False))
    for response in responses
]


@functools.cache
def disagreements() -> list[Pair]:
    """Pairs of which reward=math says something else."""
    from megatron_vp2o.config.reward import RewardConfig, RewardWeights
    from megatron_vp2o.rewards import make_reward

    reward = make_reward(RewardConfig(RewardWeights(math=1.0), workers=1, timeout_s=60.0))
    assert reward is not None
    with reward:
        results = reward([""] * len(PAIRS), [pair.response for pair in PAIRS], [{"answer": p.answer} for p in PAIRS])
    return [pair for pair, result in zip(PAIRS, results, strict=True) if bool(result.reward) is not pair.right]


if __name__ == "__main__":
    differing = disagreements()
    total, wrong = (collections.Counter(pair.form for pair in pairs) for pairs in (PAIRS, differing))
    for form, count in total.items():
        print(f"{form:20} {count - wrong[form]} of {count}")
    print(f"{'all':20} {len(PAIRS) - len(differing)} of {len(PAIRS)}")
    for pair in differing:
        print(f"{pair.form}: {pair.answer!r} {pair.response!r} should be {'right' if pair.right else 'wrong'}")
