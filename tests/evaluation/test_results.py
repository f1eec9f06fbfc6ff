"""Results as data: rows are complete, never repeated, and the page agrees with them."""

import json
import subprocess
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from lasar.artifacts import FORMAT_VERSION, write_json
from lasar.errors import DataError
from lasar.evaluation.results import (
    append_row,
    check,
    count_parameters,
    current_commit,
    read_rows,
    row_from_run,
    rows_from_run,
    this_device,
    validate_row,
    write_document,
)
from lasar.evaluation.results_page import BEGIN, END, render_page, render_plots

REPOSITORY = Path(__file__).parents[2]


def row(**changes):
    base = {
        "dataset": "beauty",
        "split": "leave_one_out",
        "evaluated_on": "test",
        "method": "sft",
        "seed": 0,
        "params": 1_200_000,
        "train_targets": "all",
        "metrics": {"hr@10": 0.062, "recall@10": 0.062, "ndcg@10": 0.033},
        "intervals": {"hr@10": [0.059, 0.065], "recall@10": [0.059, 0.065], "ndcg@10": [0.031, 0.035]},
        "num_users": 22363,
        "exclude_seen": False,
        "mean_depth": None,
        "teacher": None,
        "train_seconds": 1500.0,
        "device": "a processor, 2 cores",
        "commit": "abc123",
        "recipe": "recipes/beauty.yaml",
    }
    return {**base, **changes}


def test_the_committed_page_agrees_with_the_committed_rows():
    assert check(REPOSITORY / "results" / "results.jsonl", REPOSITORY / "docs" / "results.md") == []


def test_a_row_comes_back_as_it_was(tmp_path):
    append_row(tmp_path / "results" / "rows.jsonl", row())
    append_row(tmp_path / "results" / "rows.jsonl", row(seed=1))
    assert read_rows(tmp_path / "results" / "rows.jsonl") == [row(), row(seed=1)]


def test_the_same_row_twice_is_refused(tmp_path):
    append_row(tmp_path / "rows.jsonl", row())
    with pytest.raises(DataError, match="already there: beauty, sft, seed 0"):
        append_row(tmp_path / "rows.jsonl", row())
    assert len(read_rows(tmp_path / "rows.jsonl")) == 1


@pytest.mark.parametrize("key", sorted(row()))
def test_no_key_may_be_missing(tmp_path, key):
    incomplete = row()
    del incomplete[key]
    with pytest.raises(DataError, match=key):
        append_row(tmp_path / "rows.jsonl", incomplete)
    assert not (tmp_path / "rows.jsonl").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"commit": ""}, "commit is empty"),
        ({"seed": "0"}, "seed"),
        ({"metrics": {"hr@10": 0.1}}, "recall@10"),
        ({"metrics": {"hr@10": 6.2, "recall@10": 0.1, "ndcg@10": 0.1}}, "outside 0..1"),
        ({"metrics": {"hr@10": float("nan"), "recall@10": 0.1, "ndcg@10": 0.1}}, "metrics"),
        ({"note": "x"}, "unknown key 'note'"),
    ],
)
def test_a_wrong_value_is_named(changes, message):
    with pytest.raises(DataError, match=message):
        validate_row(row(**changes), where="row")


def test_a_damaged_file_names_the_line(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps(row()) + "\n{oops\n")
    with pytest.raises(DataError, match=r"rows\.jsonl:2"):
        read_rows(tmp_path / "rows.jsonl")


def finished_run(folder):
    values = {"hr@10": 0.25, "recall@10": 0.2, "ndcg@10": 0.125}
    method = {**values, "ci": {name: [value - 0.01, value + 0.01] for name, value in values.items()}}
    metrics = {"dataset": "shop", "split_kind": "last_basket", "train_targets": "all", "split": "test",
               "num_users": 9, "exclude_seen": True, "model": "sft",
               "methods": {"sft": method, "popularity": method}}  # fmt: skip
    for stage, seconds in (("evaluate", 3.0), ("sft", 77.5)):
        (folder / stage).mkdir(parents=True)
        manifest = {"stage": stage, "format_version": FORMAT_VERSION, "fingerprint": "x", "seed": 5}
        write_json(
            folder / stage / "manifest.json", {**manifest, "outputs": {}, "inputs": {}, "seconds": seconds}
        )
    write_json(folder / "evaluate" / "metrics.json", metrics)
    (folder / "sft" / "model").mkdir()
    weights = {"a": np.zeros((3, 4), np.float32), "b": np.zeros(5, np.float32)}
    save_file(weights, folder / "sft" / "model" / "model.safetensors")
    return folder


def test_rows_of_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr("lasar.evaluation.results.current_commit", lambda: "c0ffee")
    run_dir = finished_run(tmp_path / "run")
    model, baseline = rows_from_run(run_dir, recipe="recipes/shop.yaml", device="a box")
    assert (model["method"], model["seed"], model["params"], model["train_seconds"]) == ("sft", 5, 17, 77.5)
    assert (baseline["method"], baseline["params"], baseline["train_seconds"]) == ("popularity", None, None)
    assert model["metrics"] == {"hr@10": 0.25, "recall@10": 0.2, "ndcg@10": 0.125}
    assert model["intervals"]["hr@10"] == [0.24, 0.26]
    assert (model["commit"], model["device"], model["exclude_seen"]) == ("c0ffee", "a box", True)
    with pytest.raises(DataError, match="there are: sft, popularity"):
        row_from_run(run_dir, recipe="r", method="gru")


def test_parameters_need_a_model(tmp_path):
    with pytest.raises(DataError, match="safetensors"):
        count_parameters(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(DataError, match=r"model\.safetensors: damaged"):
        count_parameters(tmp_path)


def test_the_commit_says_whether_files_differ(tmp_path):
    def git(*words):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *identity, *words], cwd=tmp_path, check=True, capture_output=True)

    with pytest.raises(DataError, match="no git commit"):
        current_commit(tmp_path)
    git("init")
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "-m", "one")
    clean = current_commit(tmp_path)
    assert len(clean) == 12
    (tmp_path / "file").write_text("two")
    assert current_commit(tmp_path) == f"{clean}-dirty"


def test_the_device_names_cores():
    assert "core" in this_device()


def test_the_page_shows_each_number_and_seeds_become_mean_and_sd():
    rows = [row(), row(method="popularity", params=None, train_seconds=None,
                       metrics={"hr@10": 0.01, "recall@10": 0.01, "ndcg@10": 0.005})]  # fmt: skip
    page = render_page(rows)
    assert "## beauty: leave_one_out, test, 22,363 users" in page
    assert "| sft | all | 1.20 M | 0.0620 [0.0590, 0.0650] |" in page
    assert "25.0 min" in page
    assert page.index("| sft |") < page.index("| popularity |")
    other = row(seed=1, metrics={"hr@10": 0.066, "recall@10": 0.066, "ndcg@10": 0.033})
    assert "0.0640 +- 0.0028" in render_page([row(), other])


def test_different_tasks_never_share_a_table():
    rows = [row(), row(exclude_seen=True), row(evaluated_on="valid"), row(num_users=1000)]
    assert render_page(rows).count("\n## ") == 4
    assert len(render_plots(rows)) == 4


def test_plots_are_valid_svg_and_titles_are_escaped():
    plots = render_plots([row(dataset="a<b>", method="x & y")])
    assert list(plots) == ["results-a_b_-leave_one_out-test-all-22363.svg"]
    tree = ET.fromstring(next(iter(plots.values())))
    assert tree.tag.endswith("svg")
    assert "a<b>: leave_one_out" in tree[0].text


def test_the_check_finds_every_disagreement(tmp_path):
    results, docs = tmp_path / "results.jsonl", tmp_path / "docs" / "results.md"
    append_row(results, row())
    assert len(check(results, docs)) == 2
    write_document(results, docs)
    assert check(results, docs) == []
    append_row(results, row(seed=1))
    assert "differs" in check(results, docs)[0]
    write_document(results, docs)
    plot = next(docs.parent.glob("*.svg"))
    plot.write_text(plot.read_text().replace("sft", "better"))
    assert plot.name in check(results, docs)[0]
    results.write_text("")
    write_document(results, docs)
    assert "belongs to no row" in check(results, docs)[0]


def test_prose_around_the_markers_stays(tmp_path):
    docs = tmp_path / "results.md"
    docs.write_text(f"# Ours\n\nbefore\n\n{BEGIN}\nold\n{END}\n\nafter\n")
    append_row(tmp_path / "rows.jsonl", row())
    write_document(tmp_path / "rows.jsonl", docs)
    text = docs.read_text()
    assert text.startswith("# Ours\n\nbefore\n")
    assert text.endswith("\n\nafter\n")
    assert "old" not in text
    docs.write_text("# no markers\n")
    with pytest.raises(DataError, match="must both be there"):
        write_document(tmp_path / "rows.jsonl", docs)


def test_no_rows_give_a_page_all_the_same(tmp_path):
    write_document(tmp_path / "rows.jsonl", tmp_path / "results.md")
    assert "No result yet" in (tmp_path / "results.md").read_text()
