import hashlib
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from lasar.errors import ArtifactError, ConfigError
from lasar.prompts.text_tokens import (
    TOKENIZER_FILE,
    TextTokenizer,
    pretrained_tokenizer,
    train_tokenizer,
)

TEXTS = [
    f"{colour} {thing} for the garden" for colour in ("red", "blue", "green") for thing in ("hose", "pot")
]
TOKENIZER = train_tokenizer(TEXTS, 300)


@given(st.text())
def test_every_text_comes_back(text):
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text
    assert all(0 <= token < TOKENIZER.size for token in ids)


@given(
    st.lists(st.sampled_from([" ", "\n", "red", "Red ", "<s>", "<pad>", "", "\x00", "\u00e9"])).map("".join)
)
def test_spaces_markers_and_odd_letters_come_back(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_known_words_take_few_tokens():
    assert len(TOKENIZER.encode("red hose for the garden")) <= 6
    assert len(TOKENIZER.encode("qzx")) == 3  # a byte each


def test_size_is_what_was_asked_for_unless_the_texts_hold_too_little():
    assert train_tokenizer(TEXTS, 270).size == 270
    assert 256 < train_tokenizer(["ab ab"], 1000).size < 300
    assert train_tokenizer([], 1000).size == 256


def test_order_of_the_texts_does_not_matter(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    train_tokenizer(TEXTS, 290).save(tmp_path / "a")
    train_tokenizer(reversed(TEXTS), 290).save(tmp_path / "b")
    assert (tmp_path / "a" / TOKENIZER_FILE).read_bytes() == (tmp_path / "b" / TOKENIZER_FILE).read_bytes()


def test_another_process_writes_the_same_bytes(tmp_path):
    code = (
        "import sys, pathlib; from lasar.prompts.text_tokens import train_tokenizer; "
        f"train_tokenizer({TEXTS!r}, 300).save(pathlib.Path(sys.argv[1]))"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    other = hashlib.sha256((tmp_path / TOKENIZER_FILE).read_bytes()).hexdigest()
    TOKENIZER.save(tmp_path)
    assert hashlib.sha256((tmp_path / TOKENIZER_FILE).read_bytes()).hexdigest() == other


def test_round_trip_through_a_folder(tmp_path):
    TOKENIZER.save(tmp_path)
    again = TextTokenizer.load(tmp_path)
    assert again.size == TOKENIZER.size
    for text in (*TEXTS, "zebra \u2603"):
        assert again.encode(text) == TOKENIZER.encode(text)


def test_missing_tokenizer_says_how_to_get_one(tmp_path):
    with pytest.raises(ArtifactError, match=r"trained without text; .*sft\.text\.tasks .*again"):
        TextTokenizer.load(tmp_path)


def test_damaged_tokenizer_is_one_line(tmp_path):
    (tmp_path / TOKENIZER_FILE).write_text('{"version": ')
    with pytest.raises(ArtifactError, match="not a readable tokenizer") as caught:
        TextTokenizer.load(tmp_path)
    assert "\n" not in str(caught.value)


def pretrained_folder(folder):
    """A tokenizer with habits of its own: it cuts, pads, and knows a control token."""
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "red": 1, "hose": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_a_pretrained_tokenizer_is_stored_the_same_way(tmp_path):
    tokenizer = pretrained_tokenizer(str(pretrained_folder(tmp_path)))
    assert tokenizer.size == 4
    assert tokenizer.encode("red hose red") == [1, 2, 1]
    assert tokenizer.encode("red <end>") == [1, 0, 0, 0]  # text, not the control token 3
    tokenizer.save(tmp_path)
    assert TextTokenizer.load(tmp_path).encode("red <end>") == [1, 0, 0, 0]


def test_a_backbone_with_a_slow_tokenizer_only_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "vocab.txt").write_text("red\n")
    with pytest.raises(ConfigError, match=r"no tokenizer\.json, .*save_pretrained"):
        pretrained_tokenizer(str(tmp_path))
    with pytest.raises(ConfigError, match=r"no tokenizer\.json"):
        pretrained_tokenizer("no-such-owner/no-such-model")
