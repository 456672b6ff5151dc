"""A character-level tokenizer that every task shares, in Hugging Face format, and a loader for other tokenizers.

Ids are fixed for good, so that a model trained on one task can go on with another:

    0            padding, 1 end-of-sequence
    2            newline
    3 ... 97     the printable ASCII characters, space to tilde
    98 ... 103   reserved; the vocabulary of 104 is a multiple of 8, so tensor parallelism of 2, 4 or 8 divides it
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_vp2o.errors import ConfigError
from megatron_vp2o.rl.interfaces import Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# The names of special tokens hold characters that are not in the alphabet: no text can spell a special token.
PAD, EOS = "⟨pad⟩", "⟨eos⟩"
ALPHABET = "\n" + "".join(map(chr, range(ord(" "), ord("~") + 1)))
GENERATION_CONFIG = "generation_config.json"
RESERVED = tuple(f"⟨reserved{i}⟩" for i in range(6))
VOCABULARY = (PAD, EOS, *ALPHABET, *RESERVED)


class CharTokenizer:
    """One token per character of `ALPHABET`. It holds no state: every instance is equal to every other."""

    __slots__ = ()

    vocab_size = len(VOCABULARY)
    pad_id = VOCABULARY.index(PAD)
    eos_id = VOCABULARY.index(EOS)
    eos_ids: tuple[int, ...] = (eos_id,)

    def encode(self, text: str) -> list[int]:
        """Ids of the characters, without end-of-sequence. Raises ConfigError for a character outside the alphabet."""
        try:
            return [_IDS[character] for character in text]
        except KeyError as error:
            raise ConfigError(
                f"character {error.args[0]!r} at position {text.index(error.args[0])} is not in the task tokenizer's "
                "alphabet, which is printable ASCII and newline: remove it, or name a tokenizer that has it "
                "(algorithm.data.tokenizer)"
            ) from None

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; padding and end-of-sequence are left out, reserved ids show by name (and so verify wrong).

        Raises IndexError for an id outside the vocabulary.
        """
        if len(ids) and min(ids) < 0:
            raise IndexError(f"token id {min(ids)} is below 0")
        return "".join([_TEXTS[i] for i in ids])

    def save(self, folder: Path) -> None:
        """Write the files that transformers' AutoTokenizer reads: tokenizer.json and two of settings."""
        from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
        from tokenizers import Tokenizer as Pipeline

        # No unknown token: an unknown character is an error there too, not a silent replacement.
        pipeline = Pipeline(models.WordLevel(vocab={token: i for i, token in enumerate(VOCABULARY)}))
        pipeline.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        pipeline.decoder = decoders.Fuse()
        pipeline.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (PAD, EOS)])
        folder.mkdir(parents=True, exist_ok=True)
        pipeline.save(str(folder / "tokenizer.json"))
        specials = {"pad_token": PAD, "eos_token": EOS}
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **specials}
        for name, content in (("tokenizer_config.json", settings), ("special_tokens_map.json", specials)):
            (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


_IDS = {token: i for i, token in enumerate(VOCABULARY) if token in ALPHABET}
_TEXTS = tuple("" if token in (PAD, EOS) else token for token in VOCABULARY)


class HuggingFaceTokenizer:
    """Any Hugging Face tokenizer behind the project's protocol."""

    __slots__ = ("_inner", "eos_id", "eos_ids", "pad_id", "vocab_size")

    def __init__(self, inner: PreTrainedTokenizerBase, ends: Sequence[int] = ()) -> None:
        """`ends` are further ids that end a response, as the model's generation_config.json has them."""
        if inner.eos_token_id is None:
            raise ConfigError(
                f"the tokenizer in {inner.name_or_path} has no end-of-sequence token: add eos_token to its "
                "tokenizer_config.json"
            )
        self._inner = inner
        self.eos_id = int(inner.eos_token_id)
        self.pad_id = int(inner.pad_token_id) if inner.pad_token_id is not None else self.eos_id
        self.vocab_size = max(inner.get_vocab().values()) + 1
        if unknown := [token for token in ends if token >= self.vocab_size]:
            logger.warning(
                "%s names end-of-sequence ids %s, but its tokenizer has only ids below %d: they are left out",
                inner.name_or_path,
                unknown,
                self.vocab_size,
            )
        self.eos_ids = tuple(dict.fromkeys([self.eos_id, *(token for token in ends if token < self.vocab_size)]))

    def encode(self, text: str) -> list[int]:
        """Ids of the text, with nothing added before or after."""
        return self._inner.encode(text, add_special_tokens=False)

    def encode_start(self, text: str) -> list[int]:
        """Ids of a text that the model is to go on with: with what the tokenizer puts before a text (beginning-of-sequence, where
        it has one), without what it puts after it."""
        ids = list(self._inner.encode(text))
        bare = self.encode(text)
        while len(ids) > len(bare) and ids[-1] in self.eos_ids and ids[-len(bare) :] != bare:
            ids.pop()
        return ids

    @property
    def chat_template(self) -> str | None:
        """The checkpoint's own template of conversations."""
        template = self._inner.chat_template
        if isinstance(template, dict):  # several by name, as transformers allows
            template = template.get("default")
        return template

    def render(self, messages: Sequence[Mapping[str, Any]], *, enable_thinking: bool | None = None) -> str:
        """A conversation as text, up to where the assistant is to speak (or in the middle of its last message, if that is the
        assistant's); encoding it adds nothing.

        Args:
            enable_thinking: handed to the template where it is not None; those of thinking models know it.

        Raises:
            ValueError: the template refuses the conversation.
        """
        from jinja2.exceptions import TemplateError

        prefilled = messages[-1]["role"] == "assistant"
        extra = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
        try:
            text = self._inner.apply_chat_template(
                [dict(message) for message in messages],
                tokenize=False,
                add_generation_prompt=not prefilled,
                continue_final_message=prefilled,
                **extra,
            )
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise ValueError(f"the chat template refuses it: {error}") from error
        assert isinstance(text, str)
        return text

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids` without padding and end-of-sequence. Other special tokens show by name, as in `CharTokenizer`: left
        out, they could make a right answer of a broken one, and some models mark their answer with them."""
        kept = [i for i in ids if i != self.pad_id and i not in self.eos_ids]
        text = self._inner.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)  # one sequence in, one text out
        return text

    def save(self, folder: Path) -> None:
        """Write the tokenizer's files to `folder`, and all ids that end a response where they are more than one."""
        self._inner.save_pretrained(folder)
        if len(self.eos_ids) > 1:
            content = {"eos_token_id": list(self.eos_ids), "pad_token_id": self.pad_id}
            (folder / GENERATION_CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def ends_in(folder: Path) -> list[int]:
    """Ids that end a response as the model's files say: generation_config.json, else config.json, else none.

    Raises:
        ConfigError: a file that is no JSON object, or whose eos_token_id is no id nor list of ids.
    """
    for name in (GENERATION_CONFIG, "config.json"):
        path = folder / name
        if not path.is_file():
            continue
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(
                f"{path} cannot be read ({error}): it needs to be the model's own, a JSON object"
            ) from error
        if not isinstance(content, dict):
            raise ConfigError(f"{path} holds {type(content).__name__}, not a JSON object: take the model's own file")
        given = content.get("eos_token_id")
        ids = [] if given is None else given if isinstance(given, list) else [given]
        if any(isinstance(token, bool) or not isinstance(token, int) or token < 0 for token in ids):
            raise ConfigError(
                f"{path}: eos_token_id={given!r} is no token id nor a list of them: take the model's own file"
            )
        return ids
    return []


#: What transformers raises for files that are damaged, of another kind, or need a package that is not installed.
_UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, ImportError, RuntimeError)


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a local folder, whatever its kind; never downloads and never runs code from the folder.

    Raises:
        ConfigError: the folder is missing, holds no tokenizer that transformers can read, or the tokenizer has no
            end-of-sequence token.
    """
    path = Path(folder)
    if not path.is_dir():
        raise ConfigError(f"tokenizer folder {folder} does not exist: name one with a Hugging Face tokenizer in it")
    if not any((path / name).is_file() for name in ("tokenizer_config.json", "tokenizer.json")):
        raise ConfigError(
            f"{folder} has neither tokenizer_config.json nor tokenizer.json: name one with a Hugging Face tokenizer"
        )
    from transformers import AutoTokenizer

    try:
        inner = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        # tokenizers, in Rust, raises Exception itself for a file of another version or kind.
        if type(error) is not Exception and not isinstance(error, _UNREADABLE):
            raise
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ConfigError(
            f"transformers {metadata.version('transformers')} cannot read the tokenizer in {folder} ({reason}): "
            "save it anew with this version's save_pretrained, or name another folder"
        ) from error
    return HuggingFaceTokenizer(inner, ends_in(path))
