"""A row's prompt as the model reads it: through the checkpoint's own chat template, or as plain text."""

from __future__ import annotations

import numpy as np

from megatron_vp2o.config.rows import ChatTemplate, RowsTaskConfig
from megatron_vp2o.data.rows.columns import BadRow, Example, Message
from megatron_vp2o.data.rows.index import Index
from megatron_vp2o.errors import ConfigError
from megatron_vp2o.rl.interfaces import Tokenizer
from megatron_vp2o.tasks.tokenizer import HuggingFaceTokenizer

PLACE = "{prompt}"
BORDER = 16


class PromptWriter:
    """Prompts to text and token ids, under the settings of a task of rows."""

    def __init__(self, tokenizer: Tokenizer, config: RowsTaskConfig) -> None:
        """
        Raises:
            ConfigError: the settings ask for a chat template that the tokenizer has not.
        """
        self.tokenizer, self.config = tokenizer, config
        template = tokenizer.chat_template if isinstance(tokenizer, HuggingFaceTokenizer) else None
        if config.chat_template is ChatTemplate.always and template is None:
            raise ConfigError(
                f"task.chat_template=always, but the tokenizer (task.tokenizer={config.tokenizer}) has no chat template: take "
                "that of an instruction-tuned checkpoint, or task.chat_template=auto"
            )
        self.chat = template is not None and config.chat_template is not ChatTemplate.never
        if not self.chat:
            for name in ("system_prompt", "enable_thinking"):
                if getattr(config, name) is not None:
                    raise ConfigError(
                        f"task.{name}={getattr(config, name)} needs a chat template, but none is used "
                        f"(task.tokenizer={config.tokenizer}, task.chat_template={config.chat_template.name}): set it to null, "
                        "or name a tokenizer with a chat template"
                    )

    def write(self, example: Example) -> tuple[str, list[int]]:
        """Text and token ids.

        Raises:
            BadRow: the chat template or the tokenizer refuses the row, or it is a conversation and there is no template.
        """
        prompt = example.prompt
        if isinstance(prompt, str):
            prompt = self.config.prompt_format.replace(PLACE, prompt)
            if not self.chat:
                return prompt, self._plain(prompt)
            messages = [{"role": "user", "content": prompt}]
        elif not self.chat:
            raise BadRow(
                "its prompt is a conversation, but the tokenizer has no chat template (or task.chat_template=never)"
            )
        else:
            messages = list(prompt)
        text = self._template(messages)
        assert isinstance(self.tokenizer, HuggingFaceTokenizer)
        return text, self.tokenizer.encode(text)

    def overhead(self, index: Index) -> int:
        """Tokens that the template adds to the texts of a prompt, over the kinds of conversations that a file has, and some more:
        texts meet the template's tokens at their borders."""
        most = 0
        for number in range(len(index.kinds)):
            example = index.example(int(np.argmax(index.entries["kind"] == number)))
            try:
                _, tokens = self.write(example)
                inner = sum(len(self.tokenizer.encode(text)) for text in example.texts())
            except (BadRow, ConfigError):
                continue
            most = max(most, len(tokens) - inner)
        return most + BORDER

    def _template(self, messages: list[Message]) -> str:
        system = self.config.system_prompt
        if system is not None and messages[0]["role"] not in ("system", "developer"):
            messages = [{"role": "system", "content": system}, *messages]
        assert isinstance(self.tokenizer, HuggingFaceTokenizer)
        try:
            return self.tokenizer.render(messages, enable_thinking=self.config.enable_thinking)
        except ValueError as error:
            raise BadRow(str(error)) from None

    def _plain(self, text: str) -> list[int]:
        try:
            if isinstance(self.tokenizer, HuggingFaceTokenizer):
                return self.tokenizer.encode_start(text)
            return self.tokenizer.encode(text)
        except (ConfigError, ValueError, KeyError) as error:
            raise BadRow(f"the tokenizer refuses its prompt: {error}") from None
