"""Prompts of rows against transformers' apply_chat_template, token for token, in the public styles of templates."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
from jinja2.exceptions import TemplateError

from megatron_vp2o.config.rows import ChatTemplate, OnBadRow, RowsTaskConfig
from megatron_vp2o.data.rows.columns import BadRow, Columns
from megatron_vp2o.errors import ConfigError, DataError
from megatron_vp2o.rl.types import Split
from megatron_vp2o.tasks import make_task
from megatron_vp2o.tasks.prompts import PromptWriter
from megatron_vp2o.tasks.tokenizer import load_tokenizer
from tests.data.row_files import Row, text, write
from tests.tasks.chat_tokenizers import CONVERSATIONS, STYLES, chat_folder

COLUMNS = Columns("prompt", "answer", None)


def random_conversation(random: Random) -> list[dict[str, Any]]:
    turns = [{"role": "user", "content": text(random)}]
    if random.random() < 0.4:
        turns.insert(0, {"role": "system", "content": text(random)})
    for _ in range(random.randrange(3)):
        thought = random.choice(["", "<think>\nhm\n</think>\n\n"])
        turns += [{"role": "assistant", "content": thought + text(random)}, {"role": "user", "content": text(random)}]
    if random.random() < 0.1:
        turns.append({"role": "user", "content": "and now?"})
    return turns


def written(folder: Path, prompt: Any, **settings: Any) -> tuple[str, list[int]]:
    config = RowsTaskConfig(tokenizer=str(folder), **settings)
    return PromptWriter(load_tokenizer(folder), config).write(COLUMNS.read({"prompt": prompt, "answer": "1"}))


def theirs(folder: Path, messages: list[dict[str, Any]], **arguments: Any) -> tuple[str, list[int]] | None:
    """transformers' own text and token ids; None where it refuses."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    try:
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, **arguments)[
            "input_ids"
        ]
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **arguments), list(
            ids
        )
    except TemplateError:
        return None


@pytest.mark.parametrize("style", [name for name in STYLES if STYLES[name].template])
def test_token_for_token_as_transformers(tmp_path: Path, style: str) -> None:
    folder = chat_folder(tmp_path, style)
    random = Random(style)
    conversations = [*CONVERSATIONS.values(), *(random_conversation(random) for _ in range(12))]
    agreed = refused = 0
    for thinking in (None, False, True):
        arguments = {} if thinking is None else {"enable_thinking": thinking}
        for messages in conversations:
            expected = theirs(folder, messages, **arguments)
            if expected is None:
                with pytest.raises(BadRow, match="the chat template refuses it"):
                    written(folder, messages, enable_thinking=thinking)
                refused += 1
            else:
                assert written(folder, messages, enable_thinking=thinking) == expected
                agreed += 1
    assert (agreed > 30) == (style != "raises") and (refused > 0) == (
        style in ("mistral", "without_system_role", "raises")
    )


@pytest.mark.parametrize("style", STYLES)
def test_texts_written_down_by_hand(tmp_path: Path, style: str) -> None:
    folder = chat_folder(tmp_path, style)
    for name, expected in STYLES[style].expected.items():
        if expected.startswith("!"):
            with pytest.raises(BadRow, match=expected[1:]):
                written(folder, CONVERSATIONS[name])
        else:
            assert written(folder, CONVERSATIONS[name])[0] == expected


def test_thinking_changes_qwen3s_prompt(tmp_path: Path) -> None:
    folder = chat_folder(tmp_path, "qwen3")
    thinking, silent = (written(folder, "Hi", enable_thinking=on)[0] for on in (True, False))
    assert thinking == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n" == written(folder, "Hi")[0]
    assert silent == thinking + "<think>\n\n</think>\n\n"


@pytest.mark.parametrize("style", ["chatml", "llama3", "mistral", "harmony"])
def test_a_system_prompt_of_the_settings(tmp_path: Path, style: str) -> None:
    folder = chat_folder(tmp_path, style)
    system = {"role": "system", "content": "Answer in one word."}
    question = {"role": "user", "content": "Why?"}
    assert written(folder, "Why?", system_prompt=system["content"]) == theirs(folder, [system, question])
    own = [{"role": "system", "content": "Own."}, question]
    assert written(folder, own, system_prompt=system["content"]) == theirs(folder, own)
    form = "Q: {prompt}\nA:"
    assert written(folder, "Why?", prompt_format=form) == theirs(folder, [{"role": "user", "content": "Q: Why?\nA:"}])


@pytest.mark.parametrize("style", STYLES)
def test_plain_text_begins_as_the_tokenizer_has_it(tmp_path: Path, style: str) -> None:
    """Beginning-of-sequence where the tokenizer puts one, once; never an end."""
    from transformers import AutoTokenizer

    folder = chat_folder(tmp_path, style)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    prompt, tokens = written(folder, "2+2=", chat_template=ChatTemplate.never)
    assert prompt == "2+2=" and tokens == tokenizer("2+2=")["input_ids"]
    assert (tokens[0] == tokenizer.bos_token_id) == STYLES[style].puts_bos
    ours = load_tokenizer(folder)
    assert (ours.eos_id, ours.pad_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)


def test_an_end_that_the_tokenizer_puts_is_left_out(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, processors

    folder = chat_folder(tmp_path, "no_template")
    pipeline = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = {token: pipeline.token_to_id(token) for token in ("<s>", "</s>")}
    pipeline.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=list(ids.items()))
    pipeline.save(str(folder / "tokenizer.json"))
    _, tokens = written(folder, "2+2=")
    assert tokens[0] == ids["<s>"] and tokens[-1] != ids["</s>"] and ids["</s>"] not in tokens


def test_a_response_that_is_begun(tmp_path: Path) -> None:
    """A prompt that ends with the assistant's words goes on in the middle of them, as transformers has it."""
    from transformers import AutoTokenizer

    for style in ("chatml", "qwen3", "llama3"):
        folder = chat_folder(tmp_path / style, style)
        messages = [{"role": "user", "content": "Sum of 1, 2?"}, {"role": "assistant", "content": "The sum is"}]
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        text, tokens = written(folder, messages)
        assert text == tokenizer.apply_chat_template(messages, tokenize=False, continue_final_message=True)
        assert text.endswith("The sum is") and tokenizer.decode(tokens).endswith("The sum is")


def test_rows_that_the_template_refuses(tmp_path: Path) -> None:
    folder = chat_folder(tmp_path / "tokenizer", "mistral")
    random = Random(0)
    rows: list[Row] = [{"prompt": [{"role": "user", "content": text(random)}], "answer": "1"} for _ in range(20)]
    for at in (4, 11):
        rows[at]["prompt"] *= 2
    path = str(write(tmp_path / "a.jsonl", rows))
    settings: dict[str, Any] = {"path": path, "tokenizer": str(folder), "validation_size": 1, "test_size": 0}
    with pytest.raises(
        DataError, match=r"2 rows cannot be put into the chat template \(.*line 5 \(user,user\).*must alternate"
    ):
        make_task(RowsTaskConfig(**settings))
    task = make_task(RowsTaskConfig(**settings, on_bad_row=OnBadRow.skip))
    assert task.size(Split.train) == 17
    with pytest.raises(DataError, match=r"line 1.*is a base model"):
        make_task(RowsTaskConfig(**settings | {"tokenizer": str(chat_folder(tmp_path / "raises", "raises"))}))


def test_tools_are_named_as_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = chat_folder(tmp_path / "tokenizer", "chatml")
    rows: list[Row] = [
        {"prompt": f"q {i}", "answer": "1", "tools": [{"name": "search"}] if i % 2 else []} for i in range(10)
    ]
    path = str(write(tmp_path / "a.jsonl", rows))
    config = RowsTaskConfig(path=path, tokenizer=str(folder), validation_size=1, test_size=0)
    with caplog.at_level("WARNING"):
        make_task(config, progress=True)
    assert "5 rows have tools, which are not shown to the model" in caplog.text


def test_settings_about_templates(tmp_path: Path) -> None:
    folder = chat_folder(tmp_path, "no_template")
    with pytest.raises(ConfigError, match=r"chat_template=always.*has no chat template"):
        written(folder, "x", chat_template=ChatTemplate.always)
    with pytest.raises(BadRow, match="is a conversation"):
        written(folder, [{"role": "user", "content": "x"}])
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "eos_token": "</s>",
                "chat_template": "{% for m in messages %}{{ m['content'] {% endfor %}",  # does not parse
            }
        )
    )
    with pytest.raises(BadRow, match="the chat template refuses it"):
        written(folder, "x")
