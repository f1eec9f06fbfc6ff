"""The report: one file, nothing loaded from elsewhere, everything escaped, equal bytes."""

import itertools
import re
from html.parser import HTMLParser

import pytest

from lasar.artifacts import run_stage, write_json
from lasar.config import Recipe
from lasar.errors import ArtifactError
from lasar.stages import evaluate, report

VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Checks nesting and collects what a browser would load and what a reader would see."""

    def __init__(self, text):
        super().__init__()
        self.open, self.loads, self.text, self.tags = [], [], [], []
        self.feed(text)
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.loads += [
            value
            for name, value in attributes
            if name in ("src", "href", "xlink:href", "srcset")
            and value
            and not value.startswith(("#", "data:"))
        ]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def recipe(run_dir, **values):
    configs = {
        "evaluate": evaluate.Config(model="sft", also=(), bootstrap_samples=20, tuning_users=10),
        "report": report.Config(**{"include": ("prepare", "quantize", "sft", "evaluate"), **values}),
    }
    return Recipe(name="x", seed=0, run_dir=run_dir, stages=("evaluate", "report"), configs=configs)


def build(run_dir, **values):
    chosen = recipe(run_dir, **values)
    if "evaluate" in chosen.configs["report"].include:
        run_stage("evaluate", evaluate, chosen)
    run_stage("report", report, chosen)
    return (run_dir / "report" / "report.html").read_text(encoding="utf-8")


def test_the_page_shows_everything_and_loads_nothing(order_run, fake_recommender):
    text = build(order_run)
    page = Page(text)
    seen = " ".join(page.text)
    for expected in ("any-hit HR@10", "popularity", "transitions", "Semantic IDs", "Slices", "Training: sft",
                     "Examples", "no hit in the top 10", "60"):  # fmt: skip
        assert expected in seen, expected
    assert page.loads == []
    assert not re.search(r"url\((?!#)|@import|<script", text)
    assert "nan" not in seen.lower().split()


def test_titles_are_escaped(order_run, fake_recommender):
    text = build(order_run, title="Towels <b>& more</b>")
    assert "Tea &amp; &lt;Towel&gt; no." in text
    assert "<Towel>" not in text
    assert "<title>Towels &lt;b&gt;&amp; more&lt;/b&gt;</title>" in text


def test_it_can_be_read_without_seeing_it_and_on_a_phone(sequence_run, fake_recommender):
    page = Page(build(sequence_run))
    tags = page.tags
    assert ("html", {"lang": "en"}) in tags
    assert any(tag == "meta" and a.get("name") == "viewport" for tag, a in tags)
    figures = [a for tag, a in tags if tag == "svg"]
    assert len(figures) == 6
    assert all(a["role"] == "img" and a["aria-label"] for a in figures)
    assert all(a.get("alt") for tag, a in tags if tag == "img")
    assert all(a.get("scope") in ("col", "row") for tag, a in tags if tag == "th")
    headings = [int(tag[1]) for tag, _ in tags if re.fullmatch(r"h[1-6]", tag)]
    assert headings[0] == 1
    assert all(b - a <= 1 for a, b in itertools.pairwise(headings))


def test_equal_bytes_every_time(sequence_run, fake_recommender):
    first = build(sequence_run)
    (sequence_run / "report" / "manifest.json").unlink()
    assert build(sequence_run) == first


def test_the_headline_says_what_one_target_means(sequence_run, fake_recommender):
    seen = " ".join(Page(build(sequence_run)).text)
    assert "the user's next item was in the top 10" in seen
    assert "any-hit" not in seen
    assert "Recall@10" not in seen[: seen.index("Training: sft")]


def test_only_prepare(sequence_run):
    page = Page(build(sequence_run, include=("prepare",)))
    assert "tea_shop" in " ".join(page.text)
    assert [a for tag, a in page.tags if tag == "svg"] == []


def test_curves_and_quality_tolerate_missing_numbers(sequence_run, fake_recommender, seal):
    (sequence_run / "sft" / "curve.jsonl").write_text(
        '{"step": 1, "loss": 2.0, "lr": 0.1}\n\n{"step": 2, "valid_loss": 1.0}\n'
    )
    write_json(sequence_run / "quantize" / "quality.json", {"kind": "rq_vae"})
    seal(sequence_run / "sft")
    seal(sequence_run / "quantize")
    assert "Training: sft" in " ".join(Page(build(sequence_run)).text)


def test_a_damaged_curve_is_named(sequence_run, fake_recommender, seal):
    (sequence_run / "sft" / "curve.jsonl").write_text("{oops\n")
    seal(sequence_run / "sft")
    with pytest.raises(ArtifactError, match=r"curve\.jsonl"):
        build(sequence_run)


def test_prepare_must_be_included(sequence_run):
    with pytest.raises(ArtifactError, match="prepare"):
        build(sequence_run, include=("quantize",))
