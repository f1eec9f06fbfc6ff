import shutil

import numpy as np
import polars as pl
import pytest
from safetensors.numpy import load_file, save_file

from lasar.artifacts import write_json
from lasar.cot import anchors
from lasar.cot.anchor_sources import Source
from lasar.cot.anchors import AnchorStore, check_disk, number_anchors, write_anchors, write_rows
from lasar.errors import ArtifactError, DataError

VECTORS = np.random.default_rng(0).normal(size=(103, 5)).astype(np.float32)
TEXTS = [f"words of {number}" for number in range(103)]


def source_of(vectors, calls=None, killed_at=None):
    order = np.random.default_rng(1).permutation(len(vectors))
    batches = [order[start : start + 10] for start in range(0, len(vectors), 10)]

    def compute(number):
        if number == killed_at:
            raise KeyboardInterrupt
        if calls is not None:
            calls.append(number)
        return vectors[batches[number]]

    return Source(batches, compute)


@pytest.fixture
def folders(tmp_path):
    for name in ("anchor", "scratch"):
        (tmp_path / name).mkdir()
    return tmp_path / "anchor", tmp_path / "scratch"


@pytest.fixture
def store(folders):
    folder, scratch = folders
    write_anchors(folder / "anchors.safetensors", source_of(VECTORS), hidden_size=5, scratch=scratch)
    write_rows(
        folder,
        user_index_R=np.array([0, 0, 3, 3, 7], np.int32), basket_R=np.array([1, 4, 0, 2, 9], np.int32),
        counts_R=np.array([2, 0, 3, 1, 0]), anchors_S=np.array([5, 6, 100, 5, 102, 0], np.int32), texts=TEXTS,
    )  # fmt: skip
    write_json(folder / "summary.json", {"max_depth": 8})
    return AnchorStore.load(folder)


def test_the_file_is_plain_safetensors_and_read_memory_mapped(store):
    assert np.array_equal(load_file(store.folder / "anchors.safetensors")["anchors"], VECTORS)
    assert np.array_equal(store.vectors_AD, VECTORS)
    assert isinstance(store.vectors_AD, np.memmap)
    assert not store.vectors_AD.flags.writeable


@pytest.mark.parametrize(
    ("user", "basket", "steps"),
    [
        (0, 1, [5, 6]),
        (0, 4, []),
        (3, 0, [100, 5, 102]),
        (3, 2, [0]),
        (7, 9, []),
        (0, 0, []),
        (9, 9, []),
        (2, 1, []),
    ],
)
def test_steps_of_a_row(store, user, basket, steps):
    assert store.steps(user, basket).tolist() == steps
    assert store.num_steps(np.array([user]), np.array([basket])).tolist() == [len(steps)]


def test_steps_of_many_rows_and_words(store):
    users, baskets = np.array([3, 0, 9, 3, 7]), np.array([0, 1, 9, 2, 9])
    assert store.num_steps(users, baskets).tolist() == [3, 2, 0, 1, 0]
    assert store.num_steps(users[:0], baskets[:0]).tolist() == []
    assert (store.max_depth, store.text_of(102)) == (8, "words of 102")


@pytest.mark.parametrize("chunk", [7, 1000])
def test_nearest_is_the_centred_cosine(store, monkeypatch, chunk):
    monkeypatch.setattr(anchors, "_CHUNK", chunk)
    queries = np.random.default_rng(2).normal(size=(6, 5)).astype(np.float32)
    found, distances = store.nearest(queries, 4)
    centred = VECTORS - VECTORS.mean(0)
    moved = queries - VECTORS.mean(0)
    cosine = moved @ centred.T / np.linalg.norm(moved, axis=1)[:, None] / np.linalg.norm(centred, axis=1)
    assert np.array_equal(found, np.argsort(-cosine, axis=1)[:, :4])
    np.testing.assert_allclose(distances, 1 - np.take_along_axis(cosine, found, axis=1), atol=1e-5)
    own, zero = store.nearest(VECTORS[:20], 1)
    assert own[:, 0].tolist() == list(range(20))
    np.testing.assert_allclose(zero, 0, atol=1e-5)
    assert store.nearest(queries, 500)[0].shape == (6, 103)


@pytest.mark.parametrize("killed_at", [0, 1, 5, 10])
def test_a_killed_run_continues_from_the_last_commit(folders, monkeypatch, killed_at):
    monkeypatch.setattr(anchors, "_COMMIT_EVERY", 2)
    folder, scratch = folders
    target = folder / "anchors.safetensors"
    with pytest.raises(KeyboardInterrupt):
        write_anchors(target, source_of(VECTORS, killed_at=killed_at), hidden_size=5, scratch=scratch)
    assert not target.exists()
    calls = []
    write_anchors(target, source_of(VECTORS, calls), hidden_size=5, scratch=scratch)
    assert np.array_equal(load_file(target)["anchors"], VECTORS)
    assert calls == list(range(killed_at - killed_at % 2, 11))


def test_a_vector_that_is_not_finite_stops_the_stage(folders):
    folder, scratch = folders
    broken = VECTORS.copy()
    broken[50, 3] = np.nan
    with pytest.raises(DataError, match="an anchor is NaN or infinite"):
        write_anchors(folder / "a", source_of(broken), hidden_size=5, scratch=scratch)


@pytest.mark.parametrize("damage", ["cut", "header", "missing", "empty", "type"])
def test_a_damaged_file_of_anchors_is_named(store, damage):
    path = store.folder / "anchors.safetensors"
    if damage == "missing":
        path.unlink()
    elif damage == "type":
        save_file({"anchors": VECTORS.astype(np.float16)}, path)
    else:
        data = path.read_bytes()
        path.write_bytes({"cut": data[:-8], "header": b"\xff" * 40 + data[40:], "empty": b""}[damage])
    with pytest.raises(ArtifactError, match=r"anchors\.safetensors.*run the stage 'anchor' again"):
        AnchorStore.load(store.folder)


def test_damaged_rows_and_texts_are_named(store):
    (store.folder / "texts.parquet").write_bytes(b"x")
    with pytest.raises(ArtifactError, match=r"texts\.parquet"):
        AnchorStore.load(store.folder).text_of(0)
    rows = load_file(store.folder / "rows.safetensors")
    save_file({**rows, "anchor": rows["anchor"] + 1}, store.folder / "rows.safetensors")
    with pytest.raises(ArtifactError, match=r"rows\.safetensors: names anchors that do not exist"):
        AnchorStore.load(store.folder)
    (store.folder / "rows.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"rows\.safetensors: not readable"):
        AnchorStore.load(store.folder)


def test_a_disk_that_is_too_small_is_refused_and_what_is_there_already_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9e9, 9e9, 2**30))
    check_disk(tmp_path, 2**29)
    with pytest.raises(DataError, match=r"1\.10 GiB are needed for anchors, 1\.00 GiB are free; set run_dir"):
        check_disk(tmp_path, 2**30)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9e9, 9e9, 0))
    (tmp_path / "anchors.safetensors").write_bytes(b"x" * 200_000)
    check_disk(tmp_path, 100_000)


def test_equal_words_share_an_anchor_unless_read_in_context():
    words = ["soap.", " comb.", " soap."]
    assert number_anchors(words, shared=True)[0] == ["soap.", "comb."]
    assert number_anchors(words, shared=True)[1].tolist() == [0, 1, 0]
    texts, numbers = number_anchors(words, shared=False)
    assert (texts, numbers.tolist()) == (["soap.", "comb.", "soap."], [0, 1, 2])


def test_texts_are_written_by_anchor(store):
    table = pl.read_parquet(store.folder / "texts.parquet")
    assert table.schema == {"anchor": pl.Int32, "text": pl.String}
    assert table["text"].to_list() == TEXTS
