import pytest

from lasar.cot import answer_store
from lasar.cot.answer_store import Answer, AnswerStore, answer_key
from lasar.errors import DataError


def answer(n):
    return Answer(f"text {n}\nwith \N{SNOWMAN}", "stop", n, 2 * n)


def test_answers_are_found_by_another_store_after_a_flush(tmp_path):
    store = AnswerStore(tmp_path / "a" / "b")
    for n in range(5):
        store.add(f"k{n}", answer(n))
    assert AnswerStore(tmp_path / "a" / "b").find(["k1"]) == {}
    store.flush()
    store.flush()
    assert AnswerStore(tmp_path / "a" / "b").find(["k1", "k4", "other"]) == {"k1": answer(1), "k4": answer(4)}
    assert len(list((tmp_path / "a" / "b").iterdir())) == 1


def test_answers_reach_the_disk_by_themselves(tmp_path, monkeypatch):
    monkeypatch.setattr(answer_store, "_FLUSH_ANSWERS", 3)
    store = AnswerStore(tmp_path)
    for n in range(7):
        store.add(f"k{n}", answer(n))
    assert len(AnswerStore(tmp_path).find([f"k{n}" for n in range(7)])) == 6
    monkeypatch.setattr(answer_store, "_FLUSH_SECONDS", -1.0)
    store.add("k7", answer(7))
    assert len(AnswerStore(tmp_path).find([f"k{n}" for n in range(8)])) == 8


def test_two_stores_share_a_folder(tmp_path):
    first, second = AnswerStore(tmp_path), AnswerStore(tmp_path)
    first.add("a", answer(1))
    second.add("b", answer(2))
    first.flush()
    second.flush()
    assert AnswerStore(tmp_path).find(["a", "b"]) == {"a": answer(1), "b": answer(2)}


def test_a_damaged_shard_is_as_good_as_none(tmp_path):
    store = AnswerStore(tmp_path)
    store.add("a", answer(1))
    store.flush()
    (tmp_path / "answers-0.parquet").write_bytes(b"not parquet")
    (tmp_path / "answers-1.parquet.partial").write_bytes(b"")
    assert AnswerStore(tmp_path).find(["a"]) == {"a": answer(1)}
    next(tmp_path.glob("answers-*[a-f]*.parquet")).write_bytes(b"")
    assert AnswerStore(tmp_path).find(["a"]) == {}


def test_a_key_covers_model_messages_and_sampling():
    request = {"model": "m", "messages": [{"role": "user", "content": "x"}], "max_tokens": 5}
    assert answer_key(request) == answer_key(dict(reversed(request.items())))
    changed = [{**request, "model": "n"}, {**request, "max_tokens": 6}, {**request, "temperature": 0.0},
               {**request, "messages": [{"role": "user", "content": "y"}]}]  # fmt: skip
    assert len({answer_key(one) for one in (request, *changed)}) == 5


def test_a_folder_that_cannot_be_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"file/x: cannot keep answers there"):
        AnswerStore(tmp_path / "file" / "x")
