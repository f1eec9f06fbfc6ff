import json
import socket

import numpy as np
import polars as pl
import pytest
from safetensors.numpy import load_file

from lasar.artifacts import StageContext
from lasar.config import parse_section
from lasar.errors import ConfigError, DataError
from lasar.sid import text_encoder
from lasar.stages import embed

NUM_ITEMS = 12


@pytest.fixture
def prepared(tmp_path):
    """Twelve items: two tastes of five, one nobody took (11); item 3 and 11 have no text."""
    folder = tmp_path / "prepare"
    folder.mkdir()
    texts = [f"soap number {i}" if i % 2 else f"a comb, the {i} th of its kind" for i in range(NUM_ITEMS)]
    texts[3] = texts[11] = "  "
    ids = [f"i{i}" for i in range(NUM_ITEMS)]
    indices = np.arange(NUM_ITEMS, dtype=np.int32)
    pl.DataFrame({"item_index": indices, "item_id": ids, "title": texts, "text": texts}).write_parquet(
        folder / "items.parquet"
    )
    write_events(folder, held_out_item=10)
    return folder


def write_events(folder, held_out_item):
    rng = np.random.default_rng(0)
    rows = []
    for user in range(30):
        items = [*(rng.permutation(5) + 5 * (user % 2)).tolist(), held_out_item]
        splits = [0, 0, 0, 0, 1, 2]
        rows += [(user, item, n, n, split) for n, (item, split) in enumerate(zip(items, splits, strict=True))]
    frame = pl.DataFrame(
        rows,
        schema={
            "user_index": pl.Int32,
            "item_index": pl.Int32,
            "timestamp": pl.Int64,
            "basket": pl.Int32,
            "split": pl.Int8,
        },
        orient="row",
    )
    frame.write_parquet(folder / "interactions.parquet")
    facts = {"num_users": 30, "num_items": NUM_ITEMS, "split": "leave_one_out", "train_targets": "all"}
    (folder / "summary.json").write_text(json.dumps(facts))


def fake_vector(text):
    return np.random.default_rng(list(text.encode())).normal(size=6)


@pytest.fixture
def fake_encoder(monkeypatch):
    """Instead of a model; `calls_left` runs down to a kill."""
    state = {"calls_left": 99}

    def load(text_model, *, batch_size, max_tokens, field):
        def encode(texts):
            if state["calls_left"] == 0:
                raise KeyboardInterrupt
            state["calls_left"] -= 1
            return np.array([fake_vector(text) for text in texts], dtype=np.float32)

        return encode

    monkeypatch.setattr(text_encoder, "load_text_encoder", load)
    monkeypatch.setattr(text_encoder, "local_model_folder", lambda *_, **__: None)  # it need not be there
    return state


def run(prepared, name="out", scratch="scratch", **values):
    output = prepared.parent / name
    scratch_folder = prepared.parent / scratch
    output.mkdir(exist_ok=True)
    scratch_folder.mkdir(exist_ok=True)
    config = parse_section(embed.Config, values, where="embed")
    context = StageContext(
        stage="embed", seed=0, inputs={"prepare": prepared}, output=output, scratch=scratch_folder
    )
    embed.run(config, context)
    vectors = load_file(output / "embeddings.safetensors")["item_embeddings"]
    return vectors, json.loads((output / "summary.json").read_text())


def test_text_vectors_with_the_mean_for_items_without_text(prepared, fake_encoder):
    vectors, summary = run(prepared, kind="text")
    assert vectors.shape == (NUM_ITEMS, 6)
    assert vectors.dtype == np.float32
    texts = pl.read_parquet(prepared / "items.parquet")["text"].to_list()
    known = [i for i in range(NUM_ITEMS) if i not in (3, 11)]
    expected = np.array([fake_vector(texts[i]) for i in known])
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(vectors[known], expected, atol=1e-6)
    np.testing.assert_allclose(vectors[[3, 11]], [expected.mean(axis=0)] * 2, atol=1e-6)
    assert summary == {"kind": "text", "text_width": 6, "items_without_text": 2, "num_items": 12, "width": 6}


def test_collaborative_vectors_find_planted_tastes(prepared):
    vectors, summary = run(prepared, kind="collaborative", collaborative_width=2)
    similar = vectors @ vectors.T
    same = np.arange(10)[:, None] // 5 == np.arange(10) // 5
    assert similar[:10, :10][same].min() > 0.8 > 0.2 > similar[:10, :10][~same].max()
    assert summary["items_without_cooccurrence"] == 2  # 10 is only ever held out, 11 never taken
    assert not vectors[10:].any()


def test_held_out_events_change_nothing(prepared):
    first, _ = run(prepared, kind="collaborative", collaborative_width=4)
    write_events(prepared, held_out_item=0)
    second, _ = run(prepared, kind="collaborative", collaborative_width=4)
    assert np.array_equal(first, second)


def test_fused_is_both_parts_weighted(prepared, fake_encoder):
    text, _ = run(prepared, kind="text")
    company, _ = run(prepared, kind="collaborative", collaborative_width=4)
    fused, summary = run(
        prepared, kind="fused", collaborative_width=4, text_weight=4.0, collaborative_weight=0.25
    )
    np.testing.assert_allclose(fused, np.concatenate([2 * text, 0.5 * company], axis=1), atol=1e-6)
    assert summary["width"] == 10
    whitened, _ = run(prepared, kind="fused", collaborative_width=4, normalise="whiten")
    np.testing.assert_allclose(whitened[:, :6].mean(axis=0), 0, atol=1e-6)


@pytest.mark.parametrize("killed_after", [0, 1, 3])
def test_killed_and_rerun_gives_the_same_bytes(prepared, fake_encoder, killed_after):
    run(prepared, "whole", "whole_scratch", shard_size=3)
    fake_encoder["calls_left"] = killed_after
    with pytest.raises(KeyboardInterrupt):
        run(prepared, shard_size=3)
    fake_encoder["calls_left"] = 4 - killed_after  # ten texts in four shards: not one more than needed
    run(prepared, shard_size=3)
    for name in ("embeddings.safetensors", "summary.json"):
        assert (prepared.parent / "out" / name).read_bytes() == (
            prepared.parent / "whole" / name
        ).read_bytes()


def test_no_text_at_all_names_the_way_out(prepared, fake_encoder):
    path = prepared / "items.parquet"
    pl.read_parquet(path).with_columns(text=pl.lit("")).write_parquet(path)
    with pytest.raises(DataError, match=r"items.parquet: no item has text; set embed.kind=collaborative"):
        run(prepared, kind="text")


def test_no_co_occurrence_at_all_names_the_way_out(prepared):
    path = prepared / "interactions.parquet"
    pl.read_parquet(path).filter(pl.col("basket") == 0).write_parquet(path)
    with pytest.raises(DataError, match="no two items co-occur"):
        run(prepared, kind="collaborative")


def test_sources_are_the_local_model_only_where_it_is_used(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="run: lasar data get all-minilm-l6-v2"):
        embed.sources(embed.Config())
    assert embed.sources(embed.Config(kind="collaborative")) == ()
    assert embed.sources(embed.Config(text_model="org/name")) == ()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    assert embed.sources(embed.Config(text_model=str(tmp_path / "model"))) == (tmp_path / "model",)


@pytest.mark.parametrize(
    ("field", "value"),
    [("max_tokens", 0), ("shard_size", 0), ("window", -1), ("text_weight", -1.0), ("collaborative_width", 0)],
)
def test_values_out_of_range_are_named(field, value):
    with pytest.raises(ConfigError, match=f"embed.{field}"):
        embed.sources(embed.Config(**{"kind": "collaborative", field: value}))


def tiny_model(folder):
    """A two-layer BERT with random weights, saved as a sentence-transformers folder."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *[f"##{c}" for c in letters]]
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(folder)
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    (folder / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 16, "pooling_mode_mean_tokens": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling")]
    modules = [
        {"idx": n, "name": str(n), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for n, (path, kind) in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    return folder


def test_a_local_sentence_transformers_folder_without_any_network(prepared, monkeypatch):
    model = tiny_model(prepared.parent / "tiny")

    def refuse(*_args, **_kwargs):
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    first, summary = run(prepared, kind="text", text_model=str(model), batch_size=2)
    assert summary["text_width"] == 16
    assert np.isfinite(first).all()
    # The same text alone and in a batch, padded or not, is the same vector.
    second, _ = run(prepared, scratch="other", kind="text", text_model=str(model), batch_size=1)
    np.testing.assert_allclose(first, second, atol=1e-5)


def test_a_broken_model_is_one_clear_error(prepared):
    model = tiny_model(prepared.parent / "tiny")
    (model / "model.safetensors").unlink()
    with pytest.raises(DataError, match="tiny: cannot be loaded"):
        run(prepared, kind="text", text_model=str(model))


def write_vectors(folder, rows):
    path = folder / "vectors.parquet"
    pl.DataFrame(rows, schema=["item_id", "vector"], orient="row").write_parquet(path)
    return path


def test_given_vectors_are_put_in_the_order_of_the_catalogue(prepared, tmp_path):
    rows = [(f"i{i}", [float(i + 1), 1.0]) for i in (*reversed(range(NUM_ITEMS)), 77)]
    vectors, summary = run(prepared, kind="given", vectors=str(write_vectors(tmp_path, rows)))
    expected = np.array([[i + 1, 1.0] for i in range(NUM_ITEMS)])
    np.testing.assert_allclose(vectors, expected / np.linalg.norm(expected, axis=1, keepdims=True), rtol=1e-6)
    assert (summary["kind"], summary["width"], vectors.dtype) == ("given", 2, np.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[:-2], "2 items have no vector, the first is 'i10'"),
        (lambda rows: [*rows, rows[4]], "item 'i4' has more than one vector"),
        (lambda rows: [*rows[:-1], ("i11", [1.0])], "not equally long; the shortest is that of item 'i11'"),
        (lambda rows: [*rows[:-1], ("i11", [1.0, float("nan")])], "item 'i11' holds something that is not"),
    ],
)
def test_given_vectors_that_will_not_do_are_named(prepared, tmp_path, change, message):
    rows = change([(f"i{i}", [float(i), 1.0]) for i in range(NUM_ITEMS)])
    with pytest.raises(DataError, match=message):
        run(prepared, kind="given", vectors=str(write_vectors(tmp_path, rows)))


def test_given_vectors_need_their_file_and_columns(prepared, tmp_path):
    for values in ({"kind": "given"}, {"kind": "text", "vectors": "v.parquet"}):
        with pytest.raises(ConfigError, match="set both or neither"):
            run(prepared, **values)
    config = parse_section(embed.Config, {"kind": "given", "vectors": "nowhere.parquet"}, where="embed")
    with pytest.raises(DataError, match=r"nowhere\.parquet: no such file"):
        embed.sources(config)
    pl.DataFrame({"item_id": ["i1"], "vectors": [[1.0]]}).write_parquet(tmp_path / "v.parquet")
    with pytest.raises(DataError, match="no column 'vector'; it has 'item_id', 'vectors'"):
        run(prepared, kind="given", vectors=str(tmp_path / "v.parquet"))
