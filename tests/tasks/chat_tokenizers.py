"""Tokenizers with chat templates of the public kinds: byte-level BPE, and templates written by hand after their models'."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

CORPUS = [
    "What is the sum of three and four? The answer is 7, because 3+4=7.",
    "Find all x with x^2 = 16. Answer: \\boxed{4} or \\boxed{-4}.",
    "You are a helpful assistant. Think step by step. Be brief, please!",
    "user assistant system developer tool final analysis channel message",
    "été naïve 数学 \U0001f600 résumé <think> </think> [INST] [/INST]",
]


@dataclass(frozen=True)
class Style:
    """A chat template with the special tokens that it writes."""

    template: str
    specials: tuple[str, ...]
    eos: str
    bos: str | None = None
    puts_bos: bool = False  # the tokenizer itself puts it before every text, too
    added: tuple[str, ...] = ()  # tokens of their own that are not special
    expected: dict[str, str] = field(
        default_factory=dict
    )  # of CONVERSATIONS by name: text, or "!" and a part of the error


USER = [{"role": "user", "content": "Hi there"}]
SYSTEM = [{"role": "system", "content": "Be brief."}, *USER]
SEVERAL = [*USER, {"role": "assistant", "content": "<think>hm</think>Hello"}, {"role": "user", "content": " 1+1? "}]
TWICE = [*USER, *USER]
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {"user": USER, "system": SYSTEM, "several": SEVERAL, "twice": TWICE}

CHATML = """{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}\
{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

QWEN3 = """{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=0) %}
{%- for message in messages %}{%- if message.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {%- set content = message.content %}
        {%- if '</think>' in content and loop.index0 < ns.last %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' + content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""

LLAMA3 = """{{- bos_token }}{% for message in messages %}\
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}\
{% endfor %}{% if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""

MISTRAL = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] + '\n\n' %}\
{% set turns = messages[1:] %}{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}\
{% for message in turns %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}\
{% if message['role'] == 'user' %}{{ '[INST] ' + (system if loop.last else '') + message['content'] + ' [/INST]' }}\
{% else %}{{ ' ' + message['content'] | trim + eos_token }}{% endif %}{% endfor %}"""

DEEPSEEK = """{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}\
{% set ns = namespace(system='') %}{%- for message in messages %}{%- if message['role'] == 'system' %}\
{% set ns.system = message['content'] %}{%- endif %}{%- endfor %}{{ bos_token }}{{ ns.system }}\
{%- for message in messages %}{%- if message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}{%- endif %}\
{%- if message['role'] == 'assistant' %}{% set content = message['content'] %}\
{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}\
{{ '<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>' }}{%- endif %}{%- endfor -%}\
{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\n' }}{% endif %}"""

HARMONY = """{{- '<|start|>system<|message|>You are ChatGPT.\n\nReasoning: ' + (reasoning_effort | default('medium')) }}\
{{- '\n\n# Valid channels: analysis, commentary, final.<|end|>' }}\
{%- for message in messages %}{%- if message.role == 'system' or message.role == 'developer' %}\
{{- '<|start|>developer<|message|># Instructions\n\n' + message.content + '<|end|>' }}\
{%- elif message.role == 'user' %}{{- '<|start|>user<|message|>' + message.content + '<|end|>' }}\
{%- else %}{{- '<|start|>assistant<|channel|>final<|message|>' + message.content + '<|end|>' }}{%- endif %}\
{%- endfor %}{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}"""

GEMMA = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}\
{% for message in messages %}{% if message['role'] == 'assistant' %}{% set role = 'model' %}{% else %}\
{% set role = message['role'] %}{% endif %}\
{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""

RAISES = "{{ raise_exception('This checkpoint is a base model') }}"

STYLES: dict[str, Style] = {
    "chatml": Style(
        CHATML,
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        "<|im_end|>",
        expected={
            "system": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n",
            "twice": "<|im_start|>user\nHi there<|im_end|>\n" * 2 + "<|im_start|>assistant\n",
        },
    ),
    "qwen3": Style(
        QWEN3,
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        "<|im_end|>",
        added=("<think>", "</think>"),
        expected={
            "several": "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>user\n 1+1? "
            "<|im_end|>\n<|im_start|>assistant\n",
        },
    ),
    "llama3": Style(
        LLAMA3,
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|eot_id|>",
        bos="<|begin_of_text|>",
        puts_bos=True,
        expected={
            "user": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi there<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        },
    ),
    "mistral": Style(
        MISTRAL,
        ("<s>", "</s>", "[INST]", "[/INST]"),
        "</s>",
        bos="<s>",
        puts_bos=True,
        expected={
            "system": "<s>[INST] Be brief.\n\nHi there [/INST]",
            "several": "<s>[INST] Hi there [/INST] <think>hm</think>Hello</s>[INST]  1+1?  [/INST]",
            "twice": "!must alternate",
        },
    ),
    "deepseek": Style(
        DEEPSEEK,
        ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"),
        "<｜end▁of▁sentence｜>",
        bos="<｜begin▁of▁sentence｜>",
        puts_bos=True,
        added=("<think>", "</think>"),
        expected={
            "several": "<｜begin▁of▁sentence｜><｜User｜>Hi there<｜Assistant｜>Hello<｜end▁of▁sentence｜><｜User｜> 1+1? "
            "<｜Assistant｜><think>\n",
        },
    ),
    "harmony": Style(
        HARMONY,
        ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>", "<|endoftext|>"),
        "<|return|>",
        expected={
            "system": "<|start|>system<|message|>You are ChatGPT.\n\nReasoning: medium\n\n# Valid channels: analysis, commentary, "
            "final.<|end|><|start|>developer<|message|># Instructions\n\nBe brief.<|end|><|start|>user<|message|>Hi there<|end|>"
            "<|start|>assistant",
        },
    ),
    "without_system_role": Style(
        GEMMA,
        ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
        "<end_of_turn>",
        bos="<bos>",
        puts_bos=True,
        expected={
            "user": "<bos><start_of_turn>user\nHi there<end_of_turn>\n<start_of_turn>model\n",
            "system": "!System role not supported",
        },
    ),
    "raises": Style(RAISES, ("<eos>",), "<eos>", expected=dict.fromkeys(CONVERSATIONS, "!is a base model")),
    "no_template": Style("", ("<s>", "</s>"), "</s>", bos="<s>", puts_bos=True),
}


@cache
def _pipeline(specials: tuple[str, ...], added: tuple[str, ...], bos: str | None) -> str:
    """tokenizer.json of a byte-level BPE with a few merges."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    pipeline = Tokenizer(models.BPE())
    pipeline.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pipeline.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    pipeline.train_from_iterator(CORPUS * 3, trainer)
    pipeline.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    pipeline.add_tokens([AddedToken(token, normalized=False) for token in added])
    if bos is not None:
        pipeline.post_processor = processors.TemplateProcessing(
            single=f"{bos}:0 $A:0", pair=f"{bos}:0 $A:0 $B:0", special_tokens=[(bos, pipeline.token_to_id(bos))]
        )
    return pipeline.to_str()


def chat_folder(folder: Path, style: str) -> Path:
    """A folder as a checkpoint has it, in one of the styles."""
    it = STYLES[style]
    folder.mkdir(parents=True, exist_ok=True)
    bos = it.bos if it.puts_bos else None
    (folder / "tokenizer.json").write_text(_pipeline(it.specials, it.added, bos), encoding="utf-8")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "eos_token": it.eos,
    }
    settings |= {"pad_token": it.specials[0]} | ({} if it.bos is None else {"bos_token": it.bos})
    if it.template:
        settings["chat_template"] = it.template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, ensure_ascii=False), encoding="utf-8")
    return folder


def chatml_folder(folder: Path) -> Path:
    return chat_folder(folder, "chatml")
