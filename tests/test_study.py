"""`lasar study`: files that are wrong are refused, cells are run once, and the table says what they measured."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import yaml
from typer.testing import CliRunner

from lasar.cli import app
from lasar.errors import ArtifactError, ConfigError
from lasar.evaluation.study_table import read_studies, write_study
from lasar.evaluation.study_view import render_study
from lasar.recommender import Recommender
from lasar.stages import STAGES, latent_sft
from lasar.study.files import load_study
from lasar.study.reading import finished_cells, study_result
from lasar.study.running import run_study
from lasar.study.timing import read_latency, time_arms

ROOT = Path(__file__).parents[1]
STUDY = {
    "name": "steps",
    "base": "base.yaml",
    "seeds": [3, 4],
    "once": ["prepare", "embed", "quantize", "rationalize"],
    "per_seed": ["sft", "anchor"],
    "per_arm": ["latent_sft", "evaluate"],
    "reference": "none",
    "model": "latent_sft",
    "arms": {"none": {"latent_sft.loop.depth": 0}, "one": {"latent_sft.loop.depth": 1}},
    "also_report": {"valid nats": "latent_sft/metrics.json:end.nll", "loss": "latent_sft/curve.jsonl:loss"},
}
BASE = {
    "prepare": {"dataset": "mini", "split": "last_basket"},
    "embed": {"kind": "collaborative", "collaborative_width": 8},
    "quantize": {"num_levels": 2, "codebook_size": 16},
    "sft": {"backbone": "tiny", "epochs": 1, "batch_tokens": 1024, "max_history": 20, "precision": "fp32"},
    "anchor": {"text_model": "ngrams"},
    "latent_sft": {"epochs": 1, "batch_tokens": 1024, "precision": "fp32"},
    "evaluate": {"model": "latent_sft", "also": ["sft"], "beam_width": 20, "baselines": [], "max_users": 90,
                 "bootstrap_samples": 50, "num_examples": 0},
}  # fmt: skip


def write(folder: Path, **changes) -> Path:
    (folder / "base.yaml").write_text(yaml.safe_dump(BASE))
    (folder / "study.yaml").write_text(yaml.safe_dump({**STUDY, **changes}, sort_keys=False))
    return folder / "study.yaml"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": [1]}, "unknown key 'seed'; did you mean 'seeds'"),
        ({"seeds": []}, "seeds: give at least one"),
        ({"seeds": [1, 1]}, "twice"),
        ({"seeds": ["a"]}, "seeds"),
        ({"name": "a/b"}, "no folder name"),
        ({"reference": "non"}, "reference: no arm is called 'non'; did you mean 'none'"),
        ({"model": "latent_sf"}, "model: 'latent_sf' is not evaluated.*did you mean 'latent_sft'"),
        ({"base": "bas.yaml"}, "no such recipe; did you mean .*base.yaml"),
        ({"once": ["prepare", "embd"]}, "once: unknown stage 'embd'; did you mean 'embed'"),
        ({"per_arm": ["latent_sft"]}, "per_arm: must hold 'evaluate'"),
        ({"per_arm": ["sft", "latent_sft", "evaluate"]}, "'sft' is in 'per_seed' already"),
        ({"once": ["prepare", "quantize", "rationalize"]}, "once: 'quantize' reads 'embed'"),
        ({"per_seed": ["sft"]}, "per_arm: 'latent_sft' reads 'anchor'"),
        ({"arms": {}}, "arms: give at least one"),
        ({"arms": {"none": {}, "sft": {}}}, "'sft' is the name of a stage"),
        ({"arms": {"none": {"sft.epochs": 3}}}, r"arms.none: 'sft.epochs' changes nothing.*run per arm"),
        ({"arms": {"none": {"latent_sft.epoch": 3}}}, r"arms.none: .*'epoch'; did you mean 'epochs'"),
        ({"arms": {"none": {"latent_sft.epochs": "two"}}}, r"arms.none: .*latent_sft.epochs"),
        ({"also_report": {"nats": "metrics.json"}}, r"also_report.nats: expected stage/file.json:key.path"),
    ],
)
def test_a_wrong_study_file_is_refused_before_anything_runs(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        load_study(write(tmp_path, **changes))


def test_what_the_study_decides_cannot_be_overridden(tmp_path):
    with pytest.raises(ConfigError, match="choose with --seed"):
        load_study(write(tmp_path), overrides=["seed=1"])


STUDIES = [path for path in sorted(ROOT.glob("recipes/study/*.yaml")) if "\narms:" in path.read_text()]


@pytest.mark.parametrize("file", STUDIES, ids=lambda path: path.stem)
def test_every_study_of_the_project_can_be_run(file):
    study = load_study(file)
    assert study.root == Path("runs/study") / file.stem


@pytest.mark.parametrize("file", sorted(ROOT.glob("recipes/study/stage2_*.yaml")), ids=lambda path: path.stem)
def test_the_arms_of_a_committed_study_differ_as_they_say(file):
    study = load_study(file)
    resolved = {arm: study.of_cell(study.file.seeds[1], arm).configs["latent_sft"] for arm in study.arms}
    assert len(study.file.seeds) == 3
    unaligned = {arm for arm, config in resolved.items() if config.loop.depth == 0}
    assert {arm: config.alignment for arm, config in resolved.items() if arm not in unaligned} == {
        "no_alignment": "none", "kl": "kl", "mse": "mse", "cosine": "cosine",
    }  # fmt: skip
    assert unaligned == {arm for arm in study.arms if arm.startswith("no_latent")} != set()
    assert len({config.epochs for config in resolved.values()}) == 1
    assert study.root == Path("runs/study") / file.stem


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shop")
    script = ROOT / "examples" / "make_mini_data.py"
    subprocess.run([sys.executable, str(script), str(folder / "mini")], check=True, capture_output=True)
    return folder


def overrides(shop: Path) -> list[str]:
    data = shop / "mini"
    return [
        f"prepare.source={data / 'events.csv'}",
        f"prepare.items={data / 'items.csv'}",
        f"run_dir={shop / 'run'}",
    ]


@pytest.fixture(scope="module")
def finished(shop):
    """A study that was killed in its second cell and run again; with the stages that ran each time."""
    study = load_study(write(shop), overrides=overrides(shop))
    said: list[list[str]] = []
    train = latent_sft.run

    def killed(config, context):
        if config.loop.depth == 1:
            raise KeyboardInterrupt
        train(config, context)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(STAGES["latent_sft"], "run", killed)
        said.append([])
        with pytest.raises(KeyboardInterrupt):
            run_study(study, say=said[-1].append)
    said.append([])
    run_study(study, say=said[-1].append)
    return study, said


def test_a_killed_study_runs_only_what_is_left(finished, shop):
    study, (first, second) = finished
    ran = [{line.partition(": done")[0] for line in lines if ": done" in line} for lines in (first, second)]
    seed_3, seed_4, once = shop / "run" / "seed-3", shop / "run" / "seed-4", shop / "run" / "once"
    before = [once / stage for stage in STUDY["once"]] + [seed_3 / "sft", seed_3 / "anchor"]
    before += [seed_3 / "none" / stage for stage in STUDY["per_arm"]]
    assert ran[0] == {str(folder) for folder in before}
    assert "cell 2 of 4: seed 3, one" in second
    later = [seed_4 / stage for stage in STUDY["per_seed"]]
    later += [
        cell / stage
        for cell in (seed_3 / "one", seed_4 / "none", seed_4 / "one")
        for stage in STUDY["per_arm"]
    ]
    assert ran[1] == {str(folder) for folder in later}
    again: list[str] = []
    run_study(study, seeds=[4], arms=["one"], say=again.append)
    assert "cell 1 of 1: seed 4, one" in again
    assert not any(": done" in line for line in again)


def test_cells_in_processes_of_their_own_are_the_same(finished, shop):
    study, _ = finished
    folder, said = shop / "run" / "seed-4" / "one" / "evaluate", []
    before = json.loads((folder / "metrics.json").read_text())
    shutil.rmtree(folder)
    run_study(study, seeds=[4], arms=["one"], processes=2, say=said.append)
    assert [line for line in said if "done;" in line] == ["seed-4: done; 1 of 2", "seed-4/one: done; 2 of 2"]
    assert f"{folder}: done in" in (shop / "run" / "logs" / "seed-4-one.log").read_text()
    assert json.loads((folder / "metrics.json").read_text()) == before


def test_what_is_shared_is_a_relative_link_and_ran_with_the_right_seed(finished, shop):
    run = shop / "run"
    assert os.readlink(run / "seed-4" / "one" / "sft") == "../sft"
    for link in (run / "seed-4" / "prepare", run / "seed-4" / "one" / "prepare"):
        assert link.is_symlink()
        assert not os.path.isabs(os.readlink(link))
        assert link.resolve() == (run / "once" / "prepare").resolve()
    seeds = {
        part: json.loads((run / part / "manifest.json").read_text())["seed"]
        for part in ("once/prepare", "seed-3/sft", "seed-4/sft", "seed-4/one/latent_sft")
    }
    assert list(seeds.values()) == [3, 3, 4, 4]


def test_a_cell_is_a_run_folder(finished, shop):
    cell = shop / "run" / "seed-4" / "one"
    recommender = Recommender.load(cell)
    history = recommender.items.item_ids[:2]
    assert len(recommender.recommend(history, k=3, depth=1)) == 3
    output = CliRunner().invoke(app, ["status", str(cell)]).output
    assert output.count("done") == 2  # its own stages


def test_the_table_is_what_was_measured(finished, shop):
    study, _ = finished
    cells, stale = finished_cells(study)
    assert (len(cells), stale) == (6, [])
    result = study_result(study, cells, device="a box", commit="c0ffee")
    sft, none, one = result.rows
    assert [(row.arm, row.kind, row.seeds) for row in result.rows] == [
        ("sft", "before", (3, 4)), ("none", "arm", (3, 4)), ("one", "arm", (3, 4)),
    ]  # fmt: skip
    values = {}
    for seed in (3, 4):
        for arm in ("none", "one"):
            folder = shop / "run" / f"seed-{seed}" / arm
            metrics = json.loads((folder / "evaluate" / "metrics.json").read_text())
            values[arm, seed] = metrics["methods"]["latent_sft"]["ndcg@10"]
            values["sft", seed] = metrics["methods"]["sft"]["ndcg@10"]
            nll = json.loads((folder / "latent_sft" / "metrics.json").read_text())["end"]["nll"]
            row = none if arm == "none" else one
            assert row.reported["valid nats"].by_seed[seed - 3] == nll
            curve = (folder / "latent_sft" / "curve.jsonl").read_text().splitlines()
            losses = [json.loads(line)["loss"] for line in curve][-10:]
            assert row.reported["loss"].by_seed[seed - 3] == pytest.approx(sum(losses) / len(losses))
    for row in result.rows:
        assert row.metrics["ndcg@10"].by_seed == pytest.approx([values[row.arm, seed] for seed in (3, 4)])
    assert (one.depth.mean, none.depth.mean, sft.depth) == (1.0, 0.0, None)
    frames = [
        pl.read_parquet(shop / "run" / f"seed-{seed}" / arm / "evaluate" / "per_user.parquet")
        .filter(pl.col("method") == "latent_sft").select("user_index", pl.col("ndcg@10").alias(arm))
        for seed in (3, 4) for arm in ("none", "one")
    ]  # fmt: skip
    per_seed = [a.join(b, on="user_index") for a, b in (frames[:2], frames[2:])]
    expected = np.mean([(frame["one"] - frame["none"]).mean() for frame in per_seed])
    found = one.against_reference["ndcg@10"]
    assert found.difference == pytest.approx(expected)
    assert found.num_users == len(set(pl.concat(per_seed)["user_index"])) > 90  # each seed drew others
    assert none.against_reference is None
    assert one.settings["latent_sft"]["loop"]["depth"] == 1


def test_the_command_saves_the_table_without_paths_of_this_machine(finished, shop, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    saved = shop / "studies"
    command = ["study", str(shop / "study.yaml"), *overrides(shop), "--save", "--results", str(saved)]
    done = CliRunner().invoke(app, [*command, "--device", "a box"])
    assert done.exit_code == 0, done.output
    assert "4 of 4 cells are finished" in done.output
    assert "one: NDCG@10 minus none: tie" in done.output
    text = (saved / "steps.json").read_text()
    assert str(shop) not in text
    assert '"device": "a box"' in text
    (result,) = read_studies(saved)
    assert result.shared["prepare"]["source"] == "events.csv"
    assert result.shared["sft"]["epochs"] == 1
    assert [row.arm for row in result.rows] == ["sft", "none", "one"]
    assert result.versions[0]["torch"]


def test_a_cell_made_with_other_settings_is_named_and_not_shown(finished, shop, tmp_path):
    arms = {"none": {"latent_sft.loop.depth": 0}, "one": {"latent_sft.loop.depth": 1, "latent_sft.epochs": 5}}
    changed = load_study(write(tmp_path, arms=arms), overrides=overrides(shop))
    cells, stale = finished_cells(changed)
    assert {cell.arm for cell in cells} == {"sft", "none"}
    assert stale == [f"seed {seed}, one: latent_sft.epochs was 1, is 5" for seed in (3, 4)]
    elsewhere = load_study(write(tmp_path), overrides=[*overrides(shop), "quantize.codebook_size=32"])
    cells, stale = finished_cells(elsewhere)
    assert cells == []
    assert stale[0] == "seed 3, none: quantize.codebook_size was 16, is 32"


def test_a_setting_that_is_new_since_is_no_difference(finished, shop):
    study, _ = finished
    path = shop / "run" / "seed-3" / "one" / "latent_sft" / "manifest.json"
    text = path.read_text()
    manifest = json.loads(text)
    del manifest["config"]["loop"]["markers"]
    try:
        path.write_text(json.dumps(manifest))
        assert finished_cells(study)[1] == []
        manifest["inputs"]["anchor"] = "another"
        path.write_text(json.dumps(manifest))
        assert finished_cells(study)[1] == ["seed 3, one: latent_sft was run on another anchor"]
    finally:
        path.write_text(text)


def test_an_unknown_seed_or_arm_is_refused(finished):
    study, _ = finished
    with pytest.raises(ConfigError, match=r"--seed 9: .* which has 3, 4"):
        run_study(study, seeds=[9], say=print)
    with pytest.raises(ConfigError, match=r"--arm two: .* which has none, one"):
        run_study(study, arms=["two"], say=print)


def test_an_artifact_is_never_replaced_by_a_link(tmp_path, shop):
    changes = {
        "seeds": [0],
        "once": ["prepare"],
        "per_seed": [],
        "per_arm": ["embed", "quantize", "sft", "evaluate"],
    }
    changes |= {"model": "sft", "arms": {"none": {}}, "also_report": {}}
    moved = [f"run_dir={tmp_path / 'run'}", "evaluate.model=sft", "evaluate.also=[]"]
    study = load_study(write(tmp_path, **changes), overrides=[*overrides(shop), *moved])
    own = tmp_path / "run" / "seed-0" / "prepare"
    own.mkdir(parents=True)
    with pytest.raises(ArtifactError, match="holds an artifact of its own"):
        run_study(study, say=lambda _: None)
    assert own.is_dir()
    assert not own.is_symlink()


def test_nothing_finished_is_no_table(tmp_path):
    command = ["study", str(write(tmp_path)), f"run_dir={tmp_path / 'run'}"]
    assert "0 of 4 cells" in CliRunner().invoke(app, [*command, "--table"]).output
    assert isinstance(CliRunner().invoke(app, [*command, "--save"]).exception, ArtifactError)


@pytest.fixture(scope="module")
def several(shop, tmp_path_factory):
    """Two systems of different stages, one of them with one seed, and counting beside them."""
    folder = tmp_path_factory.mktemp("several")
    base = {**BASE, "sasrec": {"hidden_size": 8, "epochs": 1, "training": {"precision": "fp32"}}}
    base["gru4rec"] = {"hidden_size": 8, "epochs": 1, "training": {"precision": "fp32"}}
    changes = {
        "name": "systems", "per_arm": ["latent_sft", "sasrec", "gru4rec", "evaluate"], "reference": "ours",
        "arms": {
            "ours": {"evaluate.baselines": ["popularity"], "evaluate.also": ["sft"]},
            "SASRec": {"evaluate.model": "sasrec", "evaluate.also": []},
            "both": {"evaluate.model": "sasrec", "evaluate.also": ["gru4rec"]},
        },
        "only_seeds": {"both": [4]}, "also_report": {"nats": "latent_sft/metrics.json:end.nll"},
    }  # fmt: skip
    path = write(folder, **changes)
    (folder / "base.yaml").write_text(yaml.safe_dump(base))
    path.write_text(
        yaml.safe_dump(
            {k: v for k, v in yaml.safe_load(path.read_text()).items() if k != "model"}, sort_keys=False
        )
    )
    study = load_study(path, overrides=[*overrides(shop)[:2], f"run_dir={folder / 'run'}"])
    said: list[str] = []
    run_study(study, arms=["SASRec"], seeds=[3], say=said.append)
    assert not (folder / "run" / "seed-3" / "sft").exists(), "what no chosen arm needs is not run"
    assert [cell.arm for cell in finished_cells(study)[0]] == ["SASRec"]
    run_study(study, say=said.append)
    return study, said


def test_arms_of_different_systems_run_only_what_they_need(several):
    study, said = several
    assert "cell 5 of 5: seed 4, both" in said
    cells, stale = finished_cells(study)
    assert stale == []
    rows = study_result(study, cells, device="a box", commit="c0ffee").rows
    assert [(row.arm, row.kind, row.seeds) for row in rows] == [
        ("popularity", "untrained", (3, 4)), ("sft", "before", (3, 4)), ("both/gru4rec", "before", (4,)),
        ("ours", "arm", (3, 4)), ("SASRec", "arm", (3, 4)), ("both", "arm", (4,)),
    ]  # fmt: skip
    by_arm = {row.arm: row for row in rows}
    assert not (study.root / "seed-3" / "SASRec" / "latent_sft").exists()
    assert by_arm["SASRec"].reported == {"nats": None}
    assert by_arm["ours"].reported["nats"] is not None
    assert by_arm["popularity"].seconds is by_arm["popularity"].parameters is None
    manifests = [
        json.loads((study.root / "seed-3" / "SASRec" / stage / "manifest.json").read_text())["seconds"]
        for stage in ("sasrec",)
    ]
    assert by_arm["SASRec"].pipeline_seconds.by_seed[0] == pytest.approx(sum(manifests))
    assert by_arm["ours"].pipeline_seconds.mean > by_arm["ours"].seconds.mean
    assert by_arm["SASRec"].parameters < by_arm["ours"].parameters
    assert by_arm["both"].metrics["ndcg@10"].mean == by_arm["SASRec"].metrics["ndcg@10"].by_seed[1]


def test_latency_is_measured_in_turns_and_shown(several, tmp_path, monkeypatch):
    study, _ = several
    said: list[str] = []
    time_arms(study, say=said.append, batches=2)
    assert [line.partition(":")[0] for line in said] == ["ours", "SASRec"]  # seed 3
    result = study_result(study, finished_cells(study)[0], device="a box", commit="c0ffee")
    latency = {row.arm: row.latency for row in result.rows if row.latency}
    assert set(latency) == {"ours", "SASRec"}
    assert all(
        set(found.milliseconds) == {1, 32} and min(found.milliseconds.values()) > 0
        for found in latency.values()
    )
    assert latency["SASRec"].steps == 0 < latency["ours"].steps
    write_study(tmp_path / "systems.json", result)
    (read,) = read_studies(tmp_path)
    assert read.rows[-1].arm == "both"
    assert "ms, batch 32" in render_study(read)
    timed = json.loads((study.root / "latency.json").read_text())
    timed["arms"]["ours"]["model"] = "another"
    (study.root / "latency.json").write_text(json.dumps(timed))
    assert set(read_latency(study)) == {"SASRec"}, "a model that was trained again was not timed"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"only_seeds": {"non": [3]}}, "only_seeds: no arm is called 'non'; did you mean 'none'"),
        ({"only_seeds": {"none": [5]}}, r"only_seeds.none: \[5\]: give some of the seeds \[3, 4\]"),
        ({"per_arm": ["latent_sft", "sasrec", "evaluate"]}, "per_arm: no arm's evaluation reads 'sasrec'"),
    ],
)
def test_what_no_arm_needs_is_refused(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        load_study(write(tmp_path, **changes))
