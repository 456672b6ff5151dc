"""The character tokenizer against Hugging Face's reading of what it saves."""

from __future__ import annotations

import json
import pickle
import time
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vp2o.errors import ConfigError
from megatron_vp2o.rl.grading import NOT_TEXT, response_text
from megatron_vp2o.tasks.tokenizer import ALPHABET, CharTokenizer, HuggingFaceTokenizer, load_tokenizer

TEXTS = [
    "4 8 6=24:6*(8-4)",
    "S.#|..#|#.G:RDDR",
    "  two  spaces , and 'commas' !  don't ?\n\n",
    "<eos> <pad> [UNK] \\n \t"[:-1],
    ALPHABET,
    "",
]


@given(st.text(ALPHABET))
def test_round_trip(text: str) -> None:
    tokenizer = CharTokenizer()
    ids = tokenizer.encode(text)
    assert len(ids) == len(text)
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    assert tokenizer.decode(ids) == text


def test_ids_are_fixed_for_good() -> None:
    tokenizer = CharTokenizer()
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.vocab_size) == (0, 1, 104)
    assert tokenizer.encode("\n ~019AZaz") == [2, 3, 97, 19, 20, 28, 36, 61, 68, 93]
    assert all(tokenizer.vocab_size % tensor_parallel == 0 for tensor_parallel in (2, 4, 8))


def test_decode_leaves_specials_out() -> None:
    tokenizer = CharTokenizer()
    assert tokenizer.decode([0, *tokenizer.encode("6*4"), 1, 0, 0]) == "6*4"
    assert tokenizer.decode([98, 103]) == "⟨reserved0⟩⟨reserved5⟩"
    for bad in (104, -1):
        with pytest.raises(IndexError):
            tokenizer.decode([bad])


@pytest.mark.parametrize(
    ("text", "quoted"), [("4×6", r"'×' at position 1"), ("a\tb", r"'\\t' at position 1"), ("⟨eos⟩", "'⟨'")]
)
def test_unknown_characters(text: str, quoted: str) -> None:
    with pytest.raises(ConfigError, match=quoted):
        CharTokenizer().encode(text)


def test_speed_and_pickle() -> None:
    tokenizer = pickle.loads(pickle.dumps(CharTokenizer()))
    start = time.process_time()
    assert len(tokenizer.encode("4 8 6=24:" * 10**5)) == 9 * 10**5
    assert time.process_time() - start < 2.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer") / "new"
    CharTokenizer().save(folder)
    return folder


def test_saved_files_are_the_same_each_time(folder: Path, tmp_path: Path) -> None:
    CharTokenizer().save(tmp_path)
    names = ["special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(path.name for path in folder.iterdir()) == names
    for name in names:
        assert (folder / name).read_bytes() == (tmp_path / name).read_bytes()


def test_transformers_reads_it(folder: Path) -> None:
    from transformers import AutoTokenizer

    ours, theirs = CharTokenizer(), AutoTokenizer.from_pretrained(folder, local_files_only=True)
    assert (len(theirs), theirs.pad_token_id, theirs.eos_token_id) == (ours.vocab_size, ours.pad_id, ours.eos_id)
    for text in TEXTS:
        ids = ours.encode(text)
        assert theirs.encode(text) == theirs(text)["input_ids"] == ids
        assert theirs.decode(ids) == text
        assert theirs.decode([*ids, 1, 0], skip_special_tokens=True) == ours.decode([*ids, 1, 0]) == text
    everything = list(range(ours.vocab_size))
    assert theirs.decode(everything, skip_special_tokens=True) == ours.decode(everything)
    with pytest.raises(Exception, match="WordLevel"):  # an error there too, not an unknown token
        theirs.encode("é")


def test_load_tokenizer(folder: Path, tmp_path: Path) -> None:
    ours, loaded = CharTokenizer(), load_tokenizer(folder)
    assert isinstance(loaded, HuggingFaceTokenizer)
    loaded.save(tmp_path)
    for tokenizer in (loaded, load_tokenizer(str(tmp_path)), pickle.loads(pickle.dumps(loaded))):
        assert (tokenizer.vocab_size, tokenizer.pad_id, tokenizer.eos_id) == (104, 0, 1)
        for text in TEXTS:
            assert tokenizer.encode(text) == ours.encode(text)
            assert tokenizer.decode([*ours.encode(text), 1, 0]) == text


def test_a_tokenizer_of_another_kind(tmp_path: Path) -> None:
    """Words, no padding token, a template that adds tokens: encoding must not add them."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = {"<s>": 0, "</s>": 1, "a": 2, "b": 7}
    pipeline = Tokenizer(models.WordLevel(words, unk_token="<s>"))
    pipeline.pre_tokenizer = pre_tokenizers.Whitespace()
    pipeline.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    pipeline.save(str(tmp_path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("a b a") == [2, 7, 2]
    assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size) == (1, 1, 8)  # no padding token: end-of-sequence
    assert tokenizer.decode([2, 7, 1]) == "a b"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    with pytest.raises(ConfigError, match="no end-of-sequence token"):
        load_tokenizer(tmp_path)


def test_folders_without_a_tokenizer(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"neither tokenizer_config\.json nor tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text((folder / "tokenizer.json").read_text()[:300])
    with pytest.raises(ConfigError, match="cannot read the tokenizer"):
        load_tokenizer(tmp_path)


def words_folder(folder: Path, **files: object) -> Path:
    """A folder with a tokenizer of words (ids 0 to 7; `<end>` is 3, padding is 1, which is the tokenizer's end too)."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    folder.mkdir(parents=True, exist_ok=True)
    pipeline = Tokenizer(
        models.WordLevel({"<s>": 0, "</s>": 1, "a": 2, "<end>": 3, "b": 4, "<mark>": 5, "c": 6, "d": 7}, "<s>")
    )
    pipeline.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    pipeline.decoder = decoders.Fuse()
    pipeline.add_special_tokens([AddedToken(token, special=True) for token in ("<s>", "</s>", "<end>", "<mark>")])
    pipeline.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    for name, content in {"tokenizer_config": settings, **files}.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / f"{name}.json").write_text(text)
    return folder


@pytest.mark.parametrize(
    ("files", "ends"),
    [
        ({}, (1,)),
        ({"generation_config": {"eos_token_id": [3, 1, 3]}}, (1, 3)),
        ({"generation_config": {"eos_token_id": 3}}, (1, 3)),
        ({"generation_config": {"eos_token_id": None}}, (1,)),
        ({"generation_config": {"temperature": 0.6}}, (1,)),
        ({"generation_config": {"eos_token_id": [1, 4]}, "config": {"eos_token_id": 3}}, (1, 4)),
        ({"config": {"eos_token_id": [3, 1]}}, (1, 3)),  # as transformers does without a generation_config.json
        ({"generation_config": {"eos_token_id": [3, 900]}}, (1, 3)),  # an id that the tokenizer has not
    ],
)
def test_all_ids_that_end_a_response(tmp_path: Path, files: dict[str, object], ends: tuple[int, ...]) -> None:
    tokenizer = load_tokenizer(words_folder(tmp_path / "there", **files))
    assert tokenizer.eos_id == 1 and tuple(sorted(tokenizer.eos_ids)) == ends and tokenizer.eos_ids[0] == 1
    tokenizer.save(tmp_path / "copy")
    assert load_tokenizer(tmp_path / "copy").eos_ids == tokenizer.eos_ids


@pytest.mark.parametrize(
    "content", ["{", "[1]", '{"eos_token_id": "x"}', '{"eos_token_id": [1, true]}', '{"eos_token_id": -1}', "[" * 10**5]
)
def test_damaged_generation_configs(tmp_path: Path, content: str) -> None:
    with pytest.raises(ConfigError, match=r"generation_config\.json"):
        load_tokenizer(words_folder(tmp_path, generation_config=content))


def test_graders_see_no_end_and_every_other_special_token(tmp_path: Path) -> None:
    """Random ids: a response loses one end, whichever; anything special that is left cannot be read as nothing."""
    tokenizer = load_tokenizer(words_folder(tmp_path, generation_config={"eos_token_id": [3, 1]}))
    names = {0: "<s>", 2: "a", 4: "b", 5: "<mark>", 6: "c", 7: "d"}
    random = Random(3)
    for _ in range(300):
        ids = [random.randrange(8) for _ in range(random.randrange(7))]
        body = ids[:-1] if ids and ids[-1] in (1, 3) else ids
        expected = NOT_TEXT if {1, 3} & set(body) else "".join(names[i] for i in body)
        assert response_text(tokenizer, ids) == expected


@pytest.mark.parametrize(
    "content",
    [
        '{"version": "9.0", "model": {"type": "Hologram"}}',
        "[]",
        "{}",
        "null",
        '"text"',
        "\ud83d",
        '{"model": null}',
        "\0",
    ],
)
def test_a_tokenizer_that_cannot_be_read_is_one_line(folder: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer_config.json").write_text((folder / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(ConfigError, match="cannot read the tokenizer") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    "content", ["[]", "{", '{"tokenizer_class": 3}', '{"tokenizer_class": "Nobody", "eos_token": []}']
)
def test_settings_of_a_tokenizer_that_cannot_be_read(folder: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer_config.json").write_text(content)
    (tmp_path / "tokenizer.json").write_text((folder / "tokenizer.json").read_text())
    with pytest.raises(ConfigError) as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)
