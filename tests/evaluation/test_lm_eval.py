"""The same model and rows through lm-eval (EleutherAI's harness) and through `evaluate`: the same greedy answers, and the same
grades but for the differences listed here, each with its reason (docs/evaluation.md). Runs by `make test-lm-eval`.

The model is a tiny Qwen3-MoE that has learnt an answer to each question by heart, some right, some wrong, in styles that both
graders read and in styles that only one of them does. lm-eval's own task files grade; rows and prompts are ours.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

lm_eval = pytest.importorskip("lm_eval")

import torch  # noqa: E402

from megatron_vp2o.evaluate import main  # noqa: E402
from megatron_vp2o.evaluation.benchmark import Question  # noqa: E402
from megatron_vp2o.evaluation.benchmarks import BENCHMARKS  # noqa: E402
from megatron_vp2o.evaluation.data import load  # noqa: E402
from megatron_vp2o.evaluation.results import path_of, read  # noqa: E402
from tools.arithmetic_rows import write_checkpoint  # noqa: E402

LENGTH, LIMIT = 40, 4
TASKS = Path(lm_eval.__file__).parent / "tasks"
THEIRS = {
    "aime24": TASKS / "aime" / "aime24.yaml",
    "gpqa": TASKS / "gpqa" / "cot_zeroshot" / "_gpqa_cot_zeroshot_yaml",
    "mmlu_pro": TASKS / "mmlu_pro" / "_default_template_yaml",
    "ifeval": TASKS / "ifeval" / "ifeval.yaml",
}
TARGET = "'{{answer}}'"
METRIC = {"ifeval": "prompt_level_strict_acc"}
Score = tuple[bool, bool]  # ours, lm-eval's


def _other(letter: str) -> str:
    return "B" if letter == "A" else "A"


def answers(name: str, questions: tuple[Question, ...]) -> list[tuple[str, Score]]:
    """What the model learns to answer to each of the first LIMIT questions, and what both graders should say."""
    if name == "ifeval":
        return [
            ("A light turns over the sea.", (True, True)),
            ("The delta", (False, False)),  # a capital letter
            ('"I like it."', (True, True)),
            ("A tent and a lamp", (False, False)),  # no list
        ]
    right = [str(question.row["answer"]) for question in questions[:LIMIT]]
    if name == "aime24":
        return [
            (rf"So it is \boxed{{{right[0]}}}", (True, True)),
            (r"So it is \boxed{1000}", (False, False)),
            (f"The answer is {right[2]}.", (True, False)),  # lm-eval compares the whole sentence
            (rf"\boxed{{{int(right[3]):04d}}}", (True, False)),  # ours compares integers, lm-eval strings
        ]
    if name == "gpqa":
        return [
            (f"The answer is ({right[0]}).", (True, True)),
            (f"The answer is ({_other(right[1])}).", (False, False)),
            (f"Answer: {right[2]}", (True, True)),  # by the more lenient of lm-eval's two patterns
            (f"Not ({_other(right[3])}). Answer: ({right[3]})", (True, True)),
        ]
    return [
        (f"The answer is ({right[0]})", (True, True)),
        (f"The answer is ({_other(right[1])})", (False, False)),
        (f"Answer: {right[2]}", (True, False)),  # lm-eval's pattern wants "answer is"
        (f"I say the answer is {right[3]}", (True, True)),
    ]


def chat(tokenizer: Any, prompt: str) -> str:
    turn = [{"role": "user", "content": prompt}]
    return str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))


def learn(folder: Path, pairs: list[tuple[str, str]]) -> None:
    """Teach the checkpoint in `folder` to answer each prompt as told; raises AssertionError if it has not learnt it."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    settings = json.loads((folder / "config.json").read_text())
    settings |= {
        "max_position_embeddings": 1024,
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "moe_intermediate_size": 32,
        "head_dim": 16,
    }
    settings.pop("layer_types", None)
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings))
    end = settings["eos_token_id"][0]
    rows = []
    for prompt, answer in pairs:
        start = tokenizer.encode(chat(tokenizer, prompt), add_special_tokens=False)
        rows.append((start, [*tokenizer.encode(answer, add_special_tokens=False), end]))
    width = max(len(start) + len(learnt) for start, learnt in rows)
    tokens, labels = torch.zeros(len(rows), width, dtype=torch.long), torch.full((len(rows), width), -100)
    for n, (start, learnt) in enumerate(rows):
        tokens[n, : len(start) + len(learnt)] = torch.tensor([*start, *learnt])
        labels[n, len(start) : len(start) + len(learnt)] = torch.tensor(learnt)
    optimizer = torch.optim.AdamW(network.parameters(), lr=4e-3, weight_decay=0.0)
    mask = torch.arange(width) < torch.tensor([[len(start) + len(learnt)] for start, learnt in rows])
    for _ in range(300):
        loss = network(input_ids=tokens, attention_mask=mask.long(), labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        if loss.item() < 5e-3:
            break
    assert loss.item() < 0.05, f"the tiny model has not learnt its answers: loss {loss.item():.3f}"
    network.generation_config.eos_token_id = settings["eos_token_id"]
    network.save_pretrained(folder)


def theirs(folder: Path, rows: dict[str, list[dict[str, Any]]], work: Path) -> dict[str, list[tuple[str, bool]]]:
    """What lm-eval generates for these rows, and what its own task files say of it."""
    from lm_eval.tasks import TaskManager

    for name, own in rows.items():
        (work / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
        (work / f"ours_{name}.yaml").write_text(
            f"include: {THEIRS[name]}\ntask: ours_{name}\ntag: null\ndataset_path: json\n"
            f"dataset_kwargs:\n  data_files:\n    test: {work / name}.jsonl\n"
            "training_split: null\nvalidation_split: null\nfewshot_split: null\ntest_split: test\nprocess_docs: null\n"
            "num_fewshot: 0\ndoc_to_text: '{{prompt}}'\n"
            f"doc_to_target: {'0' if name == 'ifeval' else TARGET}\n"
            f"generation_kwargs:\n  until: []\n  do_sample: false\n  temperature: 0.0\n  max_gen_toks: {LENGTH}\n"
        )
    results = lm_eval.simple_evaluate(
        model="hf",
        model_args=f"pretrained={folder},dtype=float32,max_length=1024",
        tasks=[f"ours_{name}" for name in rows],
        task_manager=TaskManager(include_path=str(work), include_defaults=False),
        apply_chat_template=True,
        batch_size=1,
        device="cpu",
        bootstrap_iters=0,
        log_samples=True,
    )
    found: dict[str, list[tuple[str, bool]]] = {}
    for name in rows:
        by_row: dict[int, tuple[str, bool]] = {}
        for sample in results["samples"][f"ours_{name}"]:
            text, right = sample["resps"][0][0], bool(sample[METRIC.get(name, "exact_match")])
            by_row[sample["doc_id"]] = (
                text,
                right or by_row.get(sample["doc_id"], ("", False))[1],
            )  # any of its filters
        found[name] = [by_row[n] for n in range(LIMIT)]
    return found


def test_the_same_answers_and_the_differences_that_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setitem(os.environ, name, "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder, out = tmp_path / "model", tmp_path / "out"
    write_checkpoint(folder)
    asked = {name: load(BENCHMARKS[name], "own", 0).questions for name in THEIRS}
    told = {name: answers(name, questions) for name, questions in asked.items()}
    learn(
        folder,
        [
            (question.prompt, answer)
            for name, questions in asked.items()
            for question, (answer, _) in zip(questions, told[name], strict=False)
        ],
    )
    status = main(
        [
            *(f"m={folder}", "--out", str(out), "--data", "own", "--suite", ",".join(THEIRS), "--limit", str(LIMIT)),
            *("--lengths", str(LENGTH), "--temperature", "0", "--workers", "1"),
        ]
    )
    assert status == 0
    rows = {name: [_row(name, question) for question in questions[:LIMIT]] for name, questions in asked.items()}
    lm_evals = theirs(folder, rows, tmp_path)
    found, expected = {}, {}
    for name in THEIRS:
        _, samples = read(path_of(out, "m", 0, name, LENGTH))
        ours = {sample.problem: sample for sample in samples}
        for question, (answer, score), (text, right) in zip(asked[name], told[name], lm_evals[name], strict=False):
            mine = ours[question.id]
            found[name, question.id] = (mine.text, text.strip(), (mine.values["correct"] > 0, right))
            expected[name, question.id] = (answer, answer, score)
    assert found == expected


def _row(name: str, question: Question) -> dict[str, Any]:
    """With the columns that lm-eval's task files read."""
    if name == "ifeval":
        return {
            "prompt": question.prompt,
            **{key: question.row[key] for key in ("instruction_id_list", "kwargs")},
            "key": 0,
        }
    answer = str(question.row["answer"])
    choices = [line[3:] for line in question.prompt.split("\n") if line[1:3] == ") "]
    return {"prompt": question.prompt, "answer": f"({answer})" if name == "gpqa" else answer, "choices": choices}
