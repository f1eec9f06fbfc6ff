import numpy as np
import pytest

from lasar.errors import DataError
from lasar.sid.text_encoder import encode_texts, encoder_identity, local_model_folder

TEXTS = ["soap", "a much longer text about soap", "soap", "comb", "towel", "brush"]


def fake_vector(text):
    return [len(text), sum(map(ord, text)), 1.0]


class FakeEncoder:
    """Counts its calls, and is killed after a few of them."""

    def __init__(self, calls_left=99):
        self.batches = []
        self.calls_left = calls_left

    def __call__(self, texts):
        if self.calls_left == 0:
            raise KeyboardInterrupt
        self.calls_left -= 1
        self.batches.append(texts)
        return np.array([fake_vector(text) for text in texts], dtype=np.float32)


def test_each_distinct_text_once_in_order_of_length_and_back(tmp_path):
    encoder = FakeEncoder()
    vectors = encode_texts(TEXTS, lambda: encoder, folder=tmp_path, shard_size=2)
    assert vectors.tolist() == [fake_vector(text) for text in TEXTS]
    assert vectors.dtype == np.float32
    assert encoder.batches == [["comb", "soap"], ["brush", "towel"], ["a much longer text about soap"]]


@pytest.mark.parametrize("killed_after", [0, 1, 2])
def test_a_killed_run_continues_with_the_same_batches(tmp_path, killed_after):
    other = tmp_path / "whole"
    other.mkdir()
    whole = FakeEncoder()
    expected = encode_texts(TEXTS, lambda: whole, folder=other, shard_size=2)
    first, second = FakeEncoder(killed_after), FakeEncoder()
    with pytest.raises(KeyboardInterrupt):
        encode_texts(TEXTS, lambda: first, folder=tmp_path, shard_size=2)
    assert np.array_equal(encode_texts(TEXTS, lambda: second, folder=tmp_path, shard_size=2), expected)
    assert first.batches + second.batches == whole.batches


def test_a_finished_run_does_not_even_load_the_model_and_a_damaged_shard_is_made_again(tmp_path):
    encoder = FakeEncoder()
    expected = encode_texts(TEXTS, lambda: encoder, folder=tmp_path, shard_size=2)
    assert np.array_equal(encode_texts(TEXTS, lambda: 1 / 0, folder=tmp_path, shard_size=2), expected)
    shards = sorted(tmp_path.iterdir())
    assert len(shards) == 3
    shards[1].write_bytes(b"half")
    again = FakeEncoder()
    assert np.array_equal(encode_texts(TEXTS, lambda: again, folder=tmp_path, shard_size=2), expected)
    assert len(again.batches) == 1
    assert sorted(tmp_path.iterdir()) == shards


def test_a_shared_folder_keeps_models_settings_and_texts_apart(tmp_path):
    cache = tmp_path / "not" / "there" / "yet"
    first = encode_texts(TEXTS, FakeEncoder, folder=cache, shard_size=2, made_by="a")
    again = encode_texts(TEXTS[:4], lambda: 1 / 0, folder=cache, shard_size=2, made_by="a")
    assert np.array_equal(again, first[:4])
    other = FakeEncoder()
    encode_texts(TEXTS, lambda: other, folder=cache, shard_size=2, made_by="b")
    assert sum(map(len, other.batches)) == 5
    assert len(list(cache.iterdir())) == 3 + 3


def test_an_encoder_is_known_by_its_bytes_and_settings(tmp_path):
    folder = tmp_path / "encoder"
    folder.mkdir()
    (folder / "modules.json").write_text("[]")

    def identity(model=str(folder), **settings):
        settings = {"batch_size": 8, "max_tokens": 16, "field": "f"} | settings
        return encoder_identity(model, **settings)

    before = identity()
    assert before == identity(field="g")
    assert (
        len({before, identity(batch_size=9), identity(max_tokens=9), identity("ngrams"), identity("hub/id")})
        == 5
    )
    (folder / "weights").write_text("other")
    assert identity() != before


def test_a_vector_that_is_not_finite_is_named(tmp_path):
    def encode(texts):
        return np.array([[np.nan if text == "comb" else 1.0] for text in texts], dtype=np.float32)

    with pytest.raises(DataError, match="'comb'"):
        encode_texts(TEXTS, lambda: encode, folder=tmp_path, shard_size=9)


@pytest.mark.parametrize("inner", ["", "model"])
def test_a_folder_with_a_model_is_found(tmp_path, inner):
    folder = tmp_path / "encoder" / inner
    folder.mkdir(parents=True)
    (folder / "modules.json").write_text("[]")
    assert local_model_folder(str(tmp_path / "encoder")) == folder


def test_a_missing_model_says_what_to_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="run: lasar data get all-minilm-l6-v2"):
        local_model_folder("data/all-minilm-l6-v2")
    (tmp_path / "empty").mkdir()
    for name in ("empty", "./nowhere", "/nowhere/at/all", "a/b/c"):
        with pytest.raises(DataError, match=f"{name}: no text model there; give a sentence-transformers"):
            local_model_folder(name)


@pytest.mark.parametrize("name", ["all-mpnet-base-v2", "sentence-transformers/all-MiniLM-L6-v2"])
def test_a_hub_id_is_not_a_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert local_model_folder(name) is None
