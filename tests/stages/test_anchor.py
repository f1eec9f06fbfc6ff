import io
import json
import logging

import numpy as np
import polars as pl
import pytest
from rich.console import Console

from lasar.artifacts import StageContext
from lasar.config import parse_section
from lasar.cot.anchors import AnchorStore
from lasar.cot.rows import training_rows
from lasar.data.interactions import Interactions
from lasar.errors import ArtifactError, ConfigError, DataError
from lasar.model.backbone import Backbone, build_preset, load_backbone, save_backbone
from lasar.prompts.text_tokens import train_tokenizer
from lasar.prompts.vocabulary import Vocabulary
from lasar.sid import text_encoder
from lasar.sid.catalog import SidCatalog
from lasar.stages import anchor

NUM_ITEMS = 40
KINDS = ["tea", "towels", "soap", "combs"]


@pytest.fixture
def finished(order_run):
    """prepare, quantize, sft with a text vocabulary, and rationales for three rows in four."""
    codes_IL = np.array([[item % 8, item // 8] for item in range(NUM_ITEMS)], dtype=np.int32)
    SidCatalog(codes_IL, 8).save(order_run / "quantize")
    tokenizer = train_tokenizer(["Buys tea. Likes soap."], 300)
    tokenizer.save(order_run / "sft")
    vocabulary = Vocabulary(num_levels=2, codebook_size=8, base_size=tokenizer.size, orders=True)
    model = build_preset("tiny", vocabulary=vocabulary, seed=0)
    save_backbone(Backbone(model=model, vocabulary=vocabulary), order_run / "sft")
    write_rationales(
        order_run, lambda number: f"Buys {KINDS[number % 4]} a lot. Buys {KINDS[number % 4]} now. Likes it."
    )
    return order_run


def write_rationales(run_dir, text_of, *, shift=0):
    (run_dir / "rationalize").mkdir(exist_ok=True)
    records = [
        (
            row.user_index,
            row.basket + shift,
            text_of(number) if number % 4 else "",
            "ok" if number % 4 else "refused",
        )
        for number, row in enumerate(training_rows(Interactions.load(run_dir / "prepare")))
    ]
    schema = {"user_index": pl.Int32, "basket": pl.Int32, "text": pl.String, "outcome": pl.String}
    pl.DataFrame(records, schema=schema, orient="row").write_parquet(
        run_dir / "rationalize" / "rationales.parquet"
    )
    (run_dir / "rationalize" / "summary.json").write_text(json.dumps({"teacher": "catalogue"}))


@pytest.fixture(autouse=True)
def state(monkeypatch):
    """A text model that knows kinds of things; `calls_left` runs down to a kill."""
    counts = {"calls_left": 99, "sentences": []}

    def load(text_model, *, batch_size, max_tokens, field):
        assert field == "anchor.text_model"

        def encode(texts):
            if counts["calls_left"] == 0:
                raise KeyboardInterrupt
            counts["calls_left"] -= 1
            counts["sentences"] += texts
            kinds = [[kind in text for kind in KINDS] for text in texts]
            rest = [[len(text) % 5 / 50, text.startswith("Likes"), 0.1] for text in texts]
            return np.hstack([kinds, rest]).astype(np.float32)

        return encode

    monkeypatch.setattr(text_encoder, "load_text_encoder", load)
    return counts


def run(run_dir, name="anchor", **values):
    config = parse_section(anchor.Config, {"text_model": "any", **values}, where="anchor")
    anchor.sources(config)
    for folder in (run_dir / name, run_dir / f"{name}-scratch"):
        folder.mkdir(exist_ok=True)
    inputs = {stage: run_dir / stage for stage in anchor.inputs(config)}
    context = StageContext(
        stage="anchor", seed=0, inputs=inputs, output=run_dir / name, scratch=run_dir / f"{name}-scratch"
    )
    anchor.run(config, context)
    return AnchorStore.load(run_dir / name), json.loads((run_dir / name / "summary.json").read_text())


def test_encoder_anchors_and_their_summary(finished, state):
    store, summary = run(finished, segments_mean=2)
    rows = training_rows(Interactions.load(finished / "prepare"))
    steps = [store.steps(row.user_index, row.basket) for row in rows]
    assert [len(step) for step in steps] == [2 if number % 4 else 0 for number in range(len(rows))]
    for number, step in enumerate(steps):
        kind = KINDS[number % 4]
        expected = [f"Buys {kind} a lot. Buys {kind} now.", "Likes it."] if number % 4 else []
        assert [store.text_of(int(a)) for a in step] == expected
    assert store.vectors_AD.shape == (4, 32)  # three kinds, and one segment that all share
    assert summary["histogram"] == [
        sum(n % 4 == 0 for n in range(len(rows))),
        0,
        3 * len(rows) // 4,
        0,
        0,
        0,
        0,
        0,
        0,
    ]
    assert (summary["teacher"], summary["source"], summary["segments_mean"]) == ("catalogue", "encoder", 2.0)
    assert (summary["attainable"], summary["num_anchors"], summary["hidden_size"]) == (True, 4, 32)
    assert summary["projection"]["num_items"] == NUM_ITEMS - 1  # one has no text
    assert len(state["sentences"]) == len(set(state["sentences"]))
    used = store.vectors_AD[np.concatenate(steps)]
    spread = np.sqrt(np.square(used - used.mean(0)).sum(1).mean())
    assert spread == pytest.approx(summary["projection"]["state_spread"], rel=1e-4)
    unscaled, narrow = run(finished, "narrow", segments_mean=2, rescale=False)
    assert narrow["projection"]["scale"] == 1.0
    assert np.abs(unscaled.vectors_AD - store.vectors_AD).max() > 0.01


def test_backbone_anchors_alone_and_in_context(finished):
    from lasar.prompts.text_tokens import TextTokenizer

    model = load_backbone(finished / "sft" / "model")
    vocabulary = Vocabulary.load(finished / "sft" / "vocabulary.json")
    encode = TextTokenizer.load(finished / "sft").encode
    tokens_IL = vocabulary.item_tokens(SidCatalog.load(finished / "quantize").codes_IL)
    row = next(r for r in training_rows(Interactions.load(finished / "prepare"))[5:] if len(r.history) > 3)

    def state_of(prompt, text):
        import torch

        ids = torch.tensor([[*prompt, vocabulary.latent_start, *encode(text)]])
        with torch.no_grad():
            return model(ids, output_hidden_states=True).hidden_states[-1][0, -1].numpy()

    alone, summary = run(finished, source="backbone", segments_mean=2)
    assert (len(alone.vectors_AD), summary["projection"]) == (4, None)
    for number in range(4):
        np.testing.assert_allclose(alone.vectors_AD[number], state_of([], alone.text_of(number)), atol=1e-5)
    store, _ = run(finished, "context", source="backbone", context="in_context", segments_mean=2)
    prompt = vocabulary.render_history(tokens_IL, row.history, row.baskets, open_order=True)
    steps = store.steps(row.user_index, row.basket)
    assert len(store.vectors_AD) == len(store.anchors_S)
    texts = [store.text_of(int(a)) for a in steps]
    for number, step in enumerate(steps):
        expected = state_of(prompt, " ".join(texts[: number + 1]))
        np.testing.assert_allclose(store.vectors_AD[step], expected, atol=1e-5)


@pytest.mark.parametrize("killed_after", [0, 1])
def test_a_killed_run_repeats_nothing_and_ends_with_the_same_bytes(finished, state, killed_after):
    run(finished, "whole")
    state["calls_left"] = killed_after
    with pytest.raises(KeyboardInterrupt):
        run(finished)
    state["calls_left"], state["sentences"] = 99, []
    run(finished)
    assert any("Buys" in text for text in state["sentences"]) == (killed_after == 0)
    for file in ("anchors.safetensors", "rows.safetensors", "texts.parquet", "summary.json"):
        assert (finished / "anchor" / file).read_bytes() == (finished / "whole" / file).read_bytes()


def test_show_prints_the_histogram_and_segments(finished):
    run(finished, segments_mean=2)
    stream = io.StringIO()
    anchor.show(finished / "anchor", Console(file=stream, width=160))
    text = stream.getvalue()
    assert "2.00 (wanted 2)" in text
    assert "held-out R2" in text
    assert "2 Likes it." in text
    assert "near: Tea & <Towel> no." in text


def test_an_unreachable_mean_is_said(finished, caplog):
    with caplog.at_level(logging.INFO):
        _, summary = run(finished, segments_mean=5)
    assert (summary["attainable"], summary["segments_mean"]) == (False, 3.0)
    assert (
        "segments_mean=5 is out of reach of rationales with 3.00 sentences each; reached 3.00" in caplog.text
    )
    assert "distinct, 32 wide: 0.0 MiB" in caplog.text


def test_what_cannot_be_done_is_refused_before_any_work(finished, state, monkeypatch):
    with pytest.raises(ConfigError, match=r"anchor\.context=in_context: a sentence encoder cannot read"):
        run(finished, context="in_context")
    with pytest.raises(DataError, match=r"anchor\.text_model: ./nowhere: no text model there"):
        run(finished, text_model="./nowhere")
    assert state["sentences"] == []


def test_a_disk_that_is_too_small_is_refused_before_the_backbone_runs(finished, monkeypatch):
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, -(2**40)))
    monkeypatch.setattr("lasar.cot.projection.item_states", lambda *_, **__: pytest.fail("worked"))
    with pytest.raises(DataError, match="are needed for anchors"):
        run(finished)


def test_a_backbone_without_text_says_what_to_set(finished):
    (finished / "sft" / "text_tokenizer.json").unlink()
    with pytest.raises(ArtifactError, match=r"anchor\.source=backbone: .*; or set anchor\.source=encoder"):
        run(finished, source="backbone")


def test_rationales_of_other_rows_or_none_at_all_are_refused(finished):
    write_rationales(finished, lambda number: "Buys tea.", shift=1)
    with pytest.raises(
        ArtifactError, match="rationales are of no training row; run the stage 'rationalize' again"
    ):
        run(finished)
    path = finished / "rationalize" / "rationales.parquet"
    pl.read_parquet(path).with_columns(outcome=pl.lit("refused")).write_parquet(path)
    with pytest.raises(DataError, match="no rationale is ok"):
        run(finished)
    path.write_bytes(b"x")
    with pytest.raises(ArtifactError, match="not readable"):
        run(finished)


def test_a_catalogue_without_text_has_no_anchors(finished, state):
    store, summary = run(finished, source="none", text_model="no/such/model")
    assert summary == {
        "source": "none",
        "teacher": "nobody",
        "max_depth": 8,
        "num_rows": len(store.user_index_R),
    }
    assert len(store.user_index_R) == len(training_rows(Interactions.load(finished / "prepare")))
    assert store.num_steps(store.user_index_R, store.basket_R).sum() == 0
    assert store.typical_depth == 1
    assert [found.shape for found in store.nearest(np.ones((2, 32), dtype=np.float32), 3)] == [(2, 0)] * 2
    assert state["sentences"] == []
    with pytest.raises(
        ConfigError, match=r"^loop.depth=rationale needs anchors, and .*; set latent_sft.loop.depth"
    ):
        store.require("loop.depth=rationale")
    console = Console(file=io.StringIO())
    anchor.show(store.folder, console)
    assert "no anchors for" in console.file.getvalue()
