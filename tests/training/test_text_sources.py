import json

import polars as pl
import pytest

from lasar.artifacts import write_json
from lasar.errors import ArtifactError
from lasar.prompts.text_tasks import TextBatch
from lasar.prompts.vocabulary import Vocabulary
from lasar.training.text_sources import load_text

# Two users; the last event of each is test, the one before it validation.
EVENTS = [(0, 0, 0, 0), (0, 1, 1, 0), (0, 2, 1, 0), (0, 3, 2, 1), (0, 4, 3, 2), (1, 4, 0, 0), (1, 3, 1, 1)]
TITLES = ["Red hose", "Blue pot", "", "Green rake", "Gloves"]
RATIONALES = [
    (0, 0, "", "refused"), (0, 1, "After a hose, something to fill.", "ok"), (1, 0, "Starts with gloves.", "ok"),
]  # fmt: skip


@pytest.fixture
def inputs(tmp_path):
    prepared, rationalized = tmp_path / "prepare", tmp_path / "rationalize"
    prepared.mkdir()
    rationalized.mkdir()
    columns = {"user_index": pl.Int32, "item_index": pl.Int32, "basket": pl.Int32, "split": pl.Int8}
    pl.DataFrame(EVENTS, schema=columns, orient="row").write_parquet(prepared / "interactions.parquet")
    pl.DataFrame({"item_id": list("abcde"), "title": TITLES, "text": TITLES}).write_parquet(
        prepared / "items.parquet"
    )
    facts = {"num_users": 2, "num_items": 5, "split": "last_basket", "train_targets": "all"}
    write_json(prepared / "summary.json", facts)
    write_rationales(rationalized, RATIONALES)
    return {"prepare": prepared, "rationalize": rationalized}


def write_rationales(folder, rows):
    columns = {"user_index": pl.Int32, "basket": pl.Int32, "text": pl.String, "outcome": pl.String}
    pl.DataFrame(rows, schema=columns, orient="row").write_parquet(folder / "rationales.parquet")


def load(inputs, *tasks, **changes):
    settings = {"backbone": "tiny", "vocabulary_size": 300, "max_tokens": 20, "batch_tokens": 100, "seed": 0}
    return load_text(inputs, num_rows=dict.fromkeys(tasks, 4), **{**settings, **changes})


def plain(rows):
    return [(row.history.tolist(), row.baskets.tolist(), row.targets.tolist(), row.rationale) for row in rows]


def test_without_tasks_nothing_is_read(tmp_path):
    assert load({"prepare": tmp_path / "nowhere"}) is None


def test_items_without_a_title_are_no_rows(inputs):
    text = load({"prepare": inputs["prepare"]}, "sid_to_title", "title_to_sid")
    assert [row.targets.tolist() for row in text.sources["items"]] == [[0], [1], [3], [4]]
    assert set(text.sources) == {"items"}


def test_histories_and_rationales_are_of_training_rows_only(inputs):
    text = load(inputs, "history_to_title", "history_to_rationale")
    assert plain(text.sources["histories"]) == [([0], [0], [1, 2], "")]
    assert plain(text.sources["rationales"]) == [
        ([0], [0], [1, 2], "After a hose, something to fill."),
        ([], [], [4], "Starts with gloves."),
    ]


def test_what_is_kept_for_reinforcement_learning_is_no_row(inputs):
    summary = json.loads((inputs["prepare"] / "summary.json").read_text())
    write_json(inputs["prepare"] / "summary.json", {**summary, "rl_share": 1.0})
    text = load(inputs, "history_to_title", "history_to_rationale")
    assert plain(text.sources["histories"]) == []
    assert plain(text.sources["rationales"]) == [([], [], [4], "Starts with gloves.")]


def test_one_target_per_user_keeps_the_last_row_only(inputs):
    summary = json.loads((inputs["prepare"] / "summary.json").read_text())
    write_json(inputs["prepare"] / "summary.json", {**summary, "train_targets": "last"})
    write_rationales(inputs["rationalize"], RATIONALES[1:])
    text = load(inputs, "history_to_rationale")
    assert [row.targets.tolist() for row in text.sources["rationales"]] == [[1, 2], [4]]


def test_a_rationale_of_a_held_out_basket_is_refused(inputs):
    write_rationales(inputs["rationalize"], [*RATIONALES, (0, 3, "They will want gloves.", "ok")])
    with pytest.raises(ArtifactError, match="1 rationales are of no training row"):
        load(inputs, "history_to_rationale")


def test_unreadable_rationales_name_the_stage(inputs):
    (inputs["rationalize"] / "rationales.parquet").write_bytes(b"PAR1")
    with pytest.raises(ArtifactError, match="run the stage 'rationalize' again"):
        load(inputs, "history_to_rationale")


def test_rationales_teach_the_tokenizer(inputs):
    plain_text, with_rationales = load(inputs, "sid_to_title"), load(inputs, "history_to_rationale")
    sentence = "something to fill"
    assert len(with_rationales.tokenizer.encode(sentence)) < len(plain_text.tokenizer.encode(sentence))
    assert plain_text.size == plain_text.tokenizer.size <= 300


def test_text_batches_stand_among_the_histories(inputs):
    text = load(inputs, "sid_to_title", "history_to_rationale")
    vocabulary = Vocabulary(num_levels=1, codebook_size=5, base_size=text.size, orders=True)
    tokens_IL = vocabulary.item_tokens(pl.Series([0, 1, 2, 3, 4]).to_numpy()[:, None])
    mixed = text.among([1, 2, 3], vocabulary, tokens_IL, epoch=0)
    texts = [batch for batch in mixed if isinstance(batch, TextBatch)]
    assert [batch for batch in mixed if not isinstance(batch, TextBatch)] == [1, 2, 3]
    assert sum(len(batch.ids_BT) for batch in texts) == 8
    assert text.facts() == {
        "text_tokens": text.size,
        "text_rows_per_epoch": {"sid_to_title": 4, "history_to_rationale": 4},
    }
