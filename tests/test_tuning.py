"""`lasar tune`: wrong files are refused, a budget ends a method, and the table says what validation chose."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from lasar.cli import app
from lasar.errors import ConfigError, DataError
from lasar.evaluation.results import write_document
from lasar.evaluation.tuning_table import read_tunings
from lasar.study.tuning import load_tuning, run_tuning, tuning_result

ROOT = Path(__file__).parents[1]
BASE = {
    "prepare": {"dataset": "mini", "split": "last_basket"},
    "embed": {"kind": "collaborative", "collaborative_width": 8},
    "quantize": {"num_levels": 2, "codebook_size": 16},
    "sasrec": {"hidden_size": 8, "epochs": 1, "training": {"precision": "fp32", "validation_users": 50}},
    "gru4rec": {"hidden_size": 8, "epochs": 1, "training": {"precision": "fp32", "validation_users": 50}},
}
TUNING = {
    "name": "small", "base": "base.yaml", "seed": 3, "minutes": 10, "shared": ["prepare"],
    "methods": {
        "attention": {"stage": "sasrec", "trials": [{}, {"sasrec.epochs": 4, "sasrec.learning_rate": 0.01}]},
        "recurrent": {"stage": "gru4rec", "settings": {"gru4rec.dropout": 0.1}, "trials": [{}]},
    },
}  # fmt: skip


def write(folder: Path, **changes) -> Path:
    (folder / "base.yaml").write_text(yaml.safe_dump(BASE))
    (folder / "tuning.yaml").write_text(yaml.safe_dump({**TUNING, **changes}, sort_keys=False))
    return folder / "tuning.yaml"


def one(**method) -> dict:
    return {"methods": {"m": {"stage": "sasrec", "trials": [{}], **method}}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"minute": 3}, "unknown key 'minute'; did you mean 'minutes'"),
        ({"minutes": 0}, "minutes"),
        ({"name": "a/b"}, "no folder name"),
        ({"methods": {}}, "methods: give at least one"),
        ({"methods": {"a b": {"stage": "sasrec", "trials": [{}]}}}, "methods: 'a b' is no folder name"),
        ({"shared": ["prepar"]}, "shared: unknown stage 'prepar'; did you mean 'prepare'"),
        (one(stage="sasrek"), "unknown stage 'sasrek'; did you mean 'sasrec'"),
        (one(stage="prepare"), "'prepare' is in 'shared', too"),
        (one(trials=[]), "trials: give at least one"),
        (one(trials=[{"gru4rec.epochs": 2}]), "'gru4rec.epochs' does not change 'sasrec'"),
        (one(trials=[{"sasrec.epoch": 2}]), "methods.m: trial 0: .*'epoch'; did you mean 'epochs'"),
        (one(stage="tiger"), "'tiger' reads 'quantize'; name it in 'shared'"),
    ],
)
def test_a_wrong_tuning_file_is_refused_before_anything_runs(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        load_tuning(write(tmp_path, **changes))


@pytest.mark.parametrize("file", sorted(ROOT.glob("recipes/tune/*.yaml")), ids=lambda path: path.stem)
def test_committed_tunings_are_valid_and_their_studies_say_what_they_chose(file):
    tuning = load_tuning(file)
    assert {declared.stage for declared in tuning.file.methods.values()} >= {
        "sasrec",
        "gru4rec",
        "rearec",
        "tiger",
        "sft",
    }
    with pytest.raises(ConfigError, match="the file decides it"):
        load_tuning(file, overrides=["seed=1"])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuning")
    script = ROOT / "examples" / "make_mini_data.py"
    subprocess.run([sys.executable, str(script), str(folder / "mini")], check=True, capture_output=True)
    overrides = [
        f"prepare.source={folder / 'mini' / 'events.csv'}", f"prepare.items={folder / 'mini' / 'items.csv'}",
        f"run_dir={folder / 'run'}",
    ]  # fmt: skip
    command = ["tune", str(write(folder)), *overrides]
    first = CliRunner().invoke(app, [*command, "--method", "attention"])
    assert first.exit_code == 0, first.output
    assert not (folder / "run" / "recurrent-0").exists()
    assert "attention: trial 2 of 2" in first.output
    return folder, overrides, command


def test_the_best_validated_trial_is_chosen(finished):
    folder, overrides, _ = finished
    tuning = load_tuning(write(folder), overrides=overrides)
    said: list[str] = []
    run_tuning(tuning, say=said.append)
    assert [line for line in said if ": done" in line] == [
        line for line in said if "recurrent-0/gru4rec: done" in line
    ]
    result, stale = tuning_result(tuning, device="a box", commit="c0ffee")
    assert stale == []
    attention = result.methods["attention"]
    metrics = [
        json.loads((folder / "run" / f"attention-{n}" / "sasrec" / "metrics.json").read_text())
        for n in range(2)
    ]
    assert [trial.value for trial in attention.trials] == [m["valid_ndcg@10"] for m in metrics]
    assert attention.trials[attention.chosen].value == max(m["valid_ndcg@10"] for m in metrics)
    assert metrics[0] != metrics[1]
    assert all(trial.cpu_seconds > 0 and trial.users == 50 for trial in attention.trials)
    assert result.shared["prepare"]["source"] == "events.csv"
    assert (
        result.seed == json.loads((folder / "run/attention-0/sasrec/manifest.json").read_text())["seed"] == 3
    )


def test_a_method_whose_minutes_are_used_begins_no_further_trial(finished):
    folder, overrides, _ = finished
    tuning = load_tuning(write(folder, minutes=1e-6), overrides=overrides)
    said: list[str] = []
    run_tuning(tuning, methods=["attention"], say=said.append)
    assert "attention: 1e-06 CPU minutes used, 1 trials left out" in said
    with pytest.raises(ConfigError, match=r"--method atention: .*did you mean 'attention'"):
        run_tuning(tuning, methods=["atention"], say=said.append)


def test_it_is_saved_shown_and_read_again(finished, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    folder, _, command = finished
    results = folder / "results"
    done = CliRunner().invoke(
        app, [*command, "--save", "--results", str(results / "tunings"), "--device", "a box"]
    )
    assert done.exit_code == 0, done.output
    (result,) = read_tunings(results / "tunings")
    assert str(folder) not in (results / "tunings" / "small.json").read_text()
    write_document(results / "results.jsonl", folder / "docs" / "results.md")
    page = (folder / "docs" / "results.md").read_text()
    assert "## Tuning `small`: mini, validation" in page
    chosen = result.methods["attention"].trials[result.methods["attention"].chosen]
    row = next(line for line in page.splitlines() if line.endswith("| yes |") and "attention" in line)
    assert f"{chosen.value:.4f}" in row
    (results / "tunings" / "small.json").write_text('{"name": 3}')
    with pytest.raises(DataError, match=r"small\.json: not the result of a tuning"):
        read_tunings(results / "tunings")


def test_a_trial_made_with_other_settings_is_named_and_left_out(finished):
    folder, overrides, _ = finished
    methods = {"attention": {"stage": "sasrec", "trials": [{"sasrec.epochs": 2}]}}
    result, stale = tuning_result(
        load_tuning(write(folder, methods=methods), overrides=overrides), device="", commit=""
    )
    assert stale == ["attention, trial 0: sasrec.epochs was 1, is 2"]
    assert result.methods == {}


def test_nothing_to_save_says_what_to_run(tmp_path):
    command = ["tune", str(write(tmp_path)), f"run_dir={tmp_path / 'run'}", "--save"]
    assert "nothing to save; run: lasar tune" in str(CliRunner().invoke(app, command).exception)
