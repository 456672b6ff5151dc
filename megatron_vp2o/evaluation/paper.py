"""The paper's own numbers (Tables 1 and 2), to be shown beside ours, always labelled as the paper's.

They are of a 33B/4B model that is not public, trained at the length that stands over the column, averaged over checkpoints.
The paper gives no intervals. Entries are (GRPO baseline, VP2O).
"""

from __future__ import annotations

K8, K16 = 8192, 16384

TABLE_1: dict[tuple[str, str], dict[int, tuple[float, float]]] = {
    ("aime24", "accuracy"): {K8: (68.2, 70.8), K16: (75.9, 77.5)},
    ("aime25", "accuracy"): {K8: (59.6, 62.5), K16: (67.8, 69.9)},
    ("gpqa", "accuracy"): {K8: (64.2, 63.9), K16: (65.2, 67.0)},
    ("mmlu_pro", "accuracy"): {K8: (71.1, 71.5), K16: (71.4, 72.5)},
    ("codeforces", "rating"): {K8: (1419, 1416), K16: (1487, 1666)},
    ("codeforces", "pass@1"): {K8: (24.4, 24.3), K16: (26.6, 30.2)},
    ("ifbench", "loose_prompt"): {K8: (63.7, 68.3), K16: (66.5, 72.2)},
    ("ifbench", "loose_instruction"): {K8: (66.3, 71.0), K16: (69.3, 74.9)},
    ("ifbench", "strict_prompt"): {K8: (58.1, 61.7), K16: (61.0, 66.2)},
    ("ifbench", "strict_instruction"): {K8: (60.8, 64.6), K16: (63.7, 69.0)},
}
TABLE_2: dict[str, dict[int, tuple[float, float]]] = {
    "aime25": {K8: (409, 273), K16: (527, 468)},
    "codeforces": {K8: (791, 1176), K16: (1096, 961)},
    "ifeval": {K8: (213, 232), K16: (267, 208)},
    "min_thinking_1": {K8: (158, 138), K16: (159, 155)},
    "min_thinking_2": {K8: (159, 102), K16: (129, 123)},
}
