"""A character-level tokenizer that every task shares, in Hugging Face format, and a loader for other tokenizers.

Ids are fixed for good, so that a model trained on one task can go on with another:

    0            padding, 1 end-of-sequence
    2            newline
    3 ... 97     the printable ASCII characters, space to tilde
    98 ... 103   reserved; the vocabulary of 104 is a multiple of 8, so tensor parallelism of 2, 4 or 8 divides it
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_vp2o.errors import ConfigError
from megatron_vp2o.rl.types import Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The names of special tokens hold characters that are not in the alphabet: no text can spell a special token.
PAD, EOS = "⟨pad⟩", "⟨eos⟩"
ALPHABET = "\n" + "".join(map(chr, range(ord(" "), ord("~") + 1)))
RESERVED = tuple(f"⟨reserved{i}⟩" for i in range(6))
VOCABULARY = (PAD, EOS, *ALPHABET, *RESERVED)


class CharTokenizer:
    """One token per character of `ALPHABET`. It holds no state: every instance is equal to every other."""

    __slots__ = ()

    vocab_size = len(VOCABULARY)
    pad_id = VOCABULARY.index(PAD)
    eos_id = VOCABULARY.index(EOS)

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

    __slots__ = ("_inner", "eos_id", "pad_id", "vocab_size")

    def __init__(self, inner: PreTrainedTokenizerBase) -> None:
        if inner.eos_token_id is None:
            raise ConfigError(
                f"the tokenizer in {inner.name_or_path} has no end-of-sequence token: add eos_token to its "
                "tokenizer_config.json"
            )
        self._inner = inner
        self.eos_id = int(inner.eos_token_id)
        self.pad_id = int(inner.pad_token_id) if inner.pad_token_id is not None else self.eos_id
        self.vocab_size = max(inner.get_vocab().values()) + 1

    def encode(self, text: str) -> list[int]:
        """Ids of the text, with nothing added before or after."""
        return self._inner.encode(text, add_special_tokens=False)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids` without special tokens."""
        text = self._inner.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)  # one sequence in, one text out
        return text

    def save(self, folder: Path) -> None:
        """Write the tokenizer's files to `folder`."""
        self._inner.save_pretrained(folder)


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
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"transformers cannot read the tokenizer in {folder}: {str(error).partition(chr(10))[0]}"
        ) from error
    return HuggingFaceTokenizer(inner)
