"""What the report and the terminal say about reasoning, from plain JSON values."""

import io

import pytest
from rich.console import Console

from lasar.evaluation.report_latent import depth_section, latent_section
from lasar.evaluation.summary_view import print_metrics

START = {
    "stage1_nll": 6.125, "nll": 6.25, "probe_ce": 5.5, "probe_alignment": 0.75, "probe_depth_accuracy": 0.125,
    "probe_norm_ratio": 51.0, "probe_alignment_1": 0.5, "probe_alignment_2": 1.0, "probe_step_1": 0.1,
}  # fmt: skip
END = {**START, "nll": 5.875, "probe_alignment": 0.25, "probe_depth_accuracy": 0.875}
LATENT = {
    "start": START, "end": END, "teacher": "catalogue", "alignment": "kl", "alpha": 0.01234,
    "valid_depths": [0, 3, 5, 0],
}  # fmt: skip
DEPTH = {
    "choice": "auto",
    "mean": 1.75,
    "by_chosen": [
        {"depth": 1, "num_users": 400, "hr@10": 0.21, "ndcg@10": 0.11},
        {"depth": 2, "num_users": 1200, "hr@10": 0.22, "ndcg@10": 0.12},
    ],
    "forced": [
        {"depth": 0, "num_users": 1000, "hr@10": 0.2, "ndcg@10": 0.1,
         "hr@10_minus_chosen": [-0.0125, -0.02, 0.001], "ndcg@10_minus_chosen": [-0.03, -0.04, -0.02]},
    ],
}  # fmt: skip
VALUES = {"hr@10": 0.3, "ndcg@10": 0.2, "mrr": 0.1}
METRICS = {
    "main_k": 10, "mean_targets": 1, "split_kind": "leave_one_out", "dataset": "tea_shop", "split": "test",
    "num_users": 1600, "num_items": 40, "model": "latent_sft", "depth": DEPTH, "paired": {},
    "methods": {"latent_sft": {**VALUES, "ci": {name: [0.05, 0.4] for name in VALUES}}},
}  # fmt: skip
LATENCY = {"users": 32, "seconds": {"auto": 2.0, "0": 1.5}}


def cells(section):
    """Every table as rows of words, the small print too."""
    return [
        [[str(value) for cell in row["cells"] for value in cell.values() if value] for row in table["rows"]]
        for table in section["tables"]
    ]


def test_stage_2_before_and_after():
    found = latent_section("latent_sft", LATENT)
    text = " ".join(found["text"])
    for fact in ("catalogue", "kl", "0.0123", "6.250 nats", "6.125"):
        assert fact in text
    (rows,) = cells(found)
    numbers = [row[1:] for row in rows]
    assert numbers == [
        ["6.250", "5.875"], ["5.500", "5.500"], ["0.750", "0.250"], ["0.125", "0.875"], ["51.000", "51.000"],
    ]  # fmt: skip


def test_figures_are_of_steps_and_of_depths():
    assert len(latent_section("latent_sft", LATENT)["figures"]) == 3
    never = {**LATENT, "valid_depths": [8, 0, 0, 0]}
    assert len(latent_section("latent_sft", never)["figures"]) == 2


def test_a_control_without_steps_has_only_losses():
    plain = {"stage1_nll": 6.0, "nll": 6.0, "probe_ce": 5.0}
    found = latent_section(
        "control", {**LATENT, "start": plain, "end": {"nll": 5.0, "probe_ce": 4.0}, "valid_depths": [8, 0]}
    )
    assert [row[1:] for row in cells(found)[0]] == [["6.000", "5.000"], ["5.000", "4.000"]]
    assert found["figures"] == []


def test_quality_by_depth_with_and_without_seconds():
    found = depth_section(METRICS, LATENCY)
    chosen, forced = cells(found)
    assert chosen == [["1", "400", "0.2100", "0.1100"], ["2", "1,200", "0.2200", "0.1200"]]
    (row,) = forced
    assert row[:3] == ["0", "1,000", "0.2000"]
    assert row[3] == "-0.0125 (-0.0200 to +0.0010)"
    assert row[-1] == "0.75"  # 1.5 s against 2 s
    (row,) = cells(depth_section(METRICS, None))[1]
    assert row[-1] == "-0.0300 (-0.0400 to -0.0200)"
    assert "1.75 latent steps" in " ".join(found["text"])
    for table in found["tables"]:
        assert all(len(row["cells"]) == len(table["header"]) for row in table["rows"])


def test_without_forced_depths_there_is_one_table():
    assert len(depth_section({**METRICS, "depth": {**DEPTH, "forced": []}}, None)["tables"]) == 1


def printed(metrics):
    stream = io.StringIO()
    print_metrics(metrics, Console(file=stream, width=200))
    return stream.getvalue()


def test_the_terminal_shows_depth_only_where_the_model_reasons():
    text = printed(METRICS)
    for fact in ("1.75 on average (auto)", "chosen 2", "1,200", "forced 0", "-0.0300 [-0.0400, -0.0200]"):
        assert fact in text
    assert "latent steps" not in printed({**METRICS, "depth": {**DEPTH, "mean": 0.0, "forced": []}})


@pytest.mark.parametrize(("kind", "name"), [("leave_one_out", "HR@10"), ("last_basket", "any-hit HR@10")])
def test_hits_are_called_what_they_are(kind, name):
    values = {**VALUES, "recall@10": 0.25}
    methods = {"latent_sft": {**values, "ci": {key: [0.05, 0.4] for key in values}}}
    text = printed({**METRICS, "split_kind": kind, "methods": methods})
    assert name in text
    assert ("any-hit" in text) == ("Recall@10" in text) == (kind == "last_basket")
