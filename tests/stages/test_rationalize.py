import json

import numpy as np
import polars as pl
import pytest
from rich.console import Console

from lasar.artifacts import StageContext
from lasar.config import parse_section
from lasar.cot import teachers
from lasar.cot.rationale import OUTCOMES, Rationale
from lasar.cot.rows import training_rows
from lasar.data.interactions import Interactions
from lasar.errors import ConfigError, DataError, MissingExtraError
from lasar.stages import rationalize


def run(run_dir, name="rationalize", **values):
    """Run the stage over the made-up shop; returns the table and the summary."""
    output, scratch = run_dir / name, run_dir / f".{name}.scratch"
    output.mkdir(exist_ok=True)
    scratch.mkdir(exist_ok=True)
    config = parse_section(rationalize.Config, values, where="rationalize")
    rationalize.sources(config)
    context = StageContext(
        stage="rationalize", seed=0, inputs={"prepare": run_dir / "prepare"}, output=output, scratch=scratch
    )
    rationalize.run(config, context)
    return pl.read_parquet(output / "rationales.parquet"), json.loads((output / "summary.json").read_text())


@pytest.fixture(params=["sequence_run", "order_run"])
def shop(request):
    return request.getfixturevalue(request.param)


def test_one_rationale_per_training_row_in_order(shop):
    table, summary = run(shop)
    rows = training_rows(Interactions.load(shop / "prepare"))
    assert table.schema == {
        "user_index": pl.Int32,
        "basket": pl.Int32,
        "text": pl.String,
        "outcome": pl.String,
    }
    assert table["user_index"].to_list() == [row.user_index for row in rows]
    assert table["basket"].to_list() == [row.basket for row in rows]
    assert table["outcome"].unique().to_list() == ["ok"]
    assert (summary["teacher"], summary["intent"]) == ("catalogue", "from_target")
    assert summary["num_rows"] == summary["outcomes"]["ok"] == len(rows)
    assert list(summary["outcomes"]) == list(OUTCOMES)
    lengths = [text.count(". ") + 1 for text in table["text"].str.replace_all("no. ", "no ")]
    assert sum(summary["rows_by_sentences"].values()) == len(rows)
    assert max(lengths) <= 6
    assert 0 < summary["num_distinct_sentences"] <= 4 * 40


def test_the_same_run_gives_the_same_bytes(shop):
    run(shop, "first")
    run(shop, "second")
    for file in ("rationales.parquet", "summary.json"):
        assert (shop / "first" / file).read_bytes() == (shop / "second" / file).read_bytes()


def test_held_out_events_change_no_byte(shop):
    run(shop, "first")
    path = shop / "prepare" / "interactions.parquet"
    events = pl.read_parquet(path)
    random_items = pl.Series(np.random.default_rng(0).integers(40, size=len(events)), dtype=pl.Int32)
    events = events.with_columns(
        item_index=pl.when(pl.col("split") == 0).then("item_index").otherwise(random_items)
    )
    events.write_parquet(path)
    run(shop, "second")
    for file in ("rationales.parquet", "summary.json"):
        assert (shop / "first" / file).read_bytes() == (shop / "second" / file).read_bytes()


def test_intent_is_a_field(shop):
    path = shop / "prepare" / "items.parquet"
    kinds = pl.Series([f"Shop > Kind {item % 4}" for item in range(40)])
    pl.read_parquet(path).with_columns(categories=kinds).write_parquet(path)
    first, _ = run(shop, "first", catalogue={"min_items": 5})
    second, summary = run(shop, "second", intent="history_only", catalogue={"min_items": 5})
    assert summary["intent"] == "history_only"
    assert first["text"].to_list() != second["text"].to_list()


def test_only_the_last_row_of_a_user_where_prepare_says_so(sequence_run):
    path = sequence_run / "prepare" / "summary.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "train_targets": "last"}))
    table, _ = run(sequence_run)
    assert table["user_index"].is_unique().all()


def test_show_prints_counts_and_examples_with_titles(shop):
    _, summary = run(shop)
    console = Console(record=True, width=200)
    rationalize.show(shop / "rationalize", console)
    text = console.export_text()
    assert "rationales by catalogue, intent from_target" in text
    assert f"{summary['num_rows']:,}" in text
    for example in summary["examples"][:3]:
        assert example["history"]
        assert " | ".join(example["targets"]) in text  # with its <tags> and [brackets] as they are
        assert example["text"][:100] in " ".join(text.split())


class FakeTeacher:
    """Gives outcomes in turn, and remembers what it was built from."""

    outcomes = OUTCOMES

    def __init__(self, **arguments):
        type(self).arguments = arguments
        self.name = "endpoint:fake"

    def write(self, rows):
        outcomes = [self.outcomes[n % len(self.outcomes)] for n in range(len(rows))]
        return [Rationale("One. Two." if o == "ok" else "", o, 10, 2 * (o == "ok")) for o in outcomes]


@pytest.fixture
def fake(monkeypatch):
    fresh = type("Fresh", (FakeTeacher,), {})
    monkeypatch.setitem(teachers.TEACHERS, "endpoint", fresh)
    return fresh


def endpoint(**values):
    return {"teacher": "endpoint", "endpoint": {"url": "http://127.0.0.1:9/v1", "model": "fake", **values}}


def test_outcomes_of_a_language_model_are_counted(sequence_run, fake, monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-secret")
    table, summary = run(sequence_run, **endpoint(api_key_variable="MY_KEY", token_budget=7))
    assert summary["teacher"] == "endpoint:fake"
    assert summary["outcomes"] == {o: table["outcome"].to_list().count(o) for o in OUTCOMES}
    assert summary["completion_tokens"] == 2 * summary["outcomes"]["ok"]
    assert summary["mean_sentences"] == 2.0
    assert summary["num_distinct_sentences"] == 2
    assert (table["text"] != "").to_list() == (table["outcome"] == "ok").to_list()
    assert fake.arguments["endpoint"].api_key == "sk-secret"
    assert fake.arguments["endpoint"].token_budget == 7
    assert fake.arguments["cache"] == sequence_run / ".rationalize.scratch" / "answers"
    written = [path.read_bytes() for path in (sequence_run / "rationalize").iterdir()]
    assert not any(b"sk-secret" in content for content in written)


def test_every_teacher_is_asked_about_the_same_rows(sequence_run, fake):
    fake.outcomes = ("ok",)
    asked = []
    for teacher in (endpoint(), {}):
        table, summary = run(sequence_run, **teacher, max_rows=5)
        assert summary["outcomes"]["ok"] == 5
        assert summary["outcomes"]["over_budget"] == len(table) - 5 > 0
        asked.append((table["outcome"] == "ok").to_list())
    assert asked[0] == asked[1]


def test_a_cache_outlives_the_stage(sequence_run, fake, tmp_path):
    run(sequence_run, **endpoint(cache=str(tmp_path / "answers")))
    assert fake.arguments["cache"] == tmp_path / "answers"


def test_no_usable_rationale_at_all_is_an_error(sequence_run, fake):
    fake.outcomes = ("refused", "empty")
    with pytest.raises(
        DataError, match=r"endpoint:fake wrote no usable rationale \(refused \d+, empty \d+\)"
    ):
        run(sequence_run, **endpoint())


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"url": ""}, "rationalize.endpoint.url: needed"),
        ({"model": ""}, "rationalize.endpoint.model: needed"),
        ({"url": "localhost:8000"}, "rationalize.endpoint.url: must begin with http:// or https://"),
    ],
)
def test_an_endpoint_must_be_described_before_anything_runs(values, expected):
    with pytest.raises(ConfigError, match=expected):
        rationalize.sources(parse_section(rationalize.Config, endpoint(**values), where="rationalize"))


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"max_history": 0}, "max_history"),
        ({"teacher": "catalog"}, "teacher"),
        ({"catalogue": {"min_items": 0}}, "catalogue.min_items"),
        ({"endpoint": {"concurrency": 0}}, "endpoint.concurrency"),
        ({"endpoint": {"temperature": -1.0}}, "endpoint.temperature"),
    ],
)
def test_values_out_of_range_are_named(values, key):
    with pytest.raises(ConfigError, match=f"rationalize.{key}"):
        parse_section(rationalize.Config, values, where="rationalize")


def test_the_missing_extra_is_named(sequence_run, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "openai", None)
    with pytest.raises(MissingExtraError, match=r"lasar\[teacher\]"):
        run(sequence_run, **endpoint())
