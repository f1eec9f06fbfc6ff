"""The whole pipeline on a small made-up shop with a planted rule, through the command line."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import polars as pl
import pytest

from lasar.cli import _keep_few_kernels, main

ROOT = Path(__file__).parents[2]
STAGES = (
    "prepare", "embed", "quantize", "rationalize", "sft", "anchor", "latent_sft", "rl", "evaluate", "report",
)  # fmt: skip


def lasar(*arguments: str, check: bool = True, **options) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from lasar.cli import main; main()", *arguments]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "160"}
    return subprocess.run(
        command, check=check, capture_output=True, text=True, timeout=170, env=env, **options
    )


@pytest.fixture
def inside(capsys, monkeypatch):
    """The command line in this process: seconds faster than a new one, which other tests here start."""
    monkeypatch.setenv("COLUMNS", "160")

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr(sys, "argv", ["lasar", *arguments])
        with pytest.raises(SystemExit) as stopped:
            main()
        output, errors = capsys.readouterr()
        return subprocess.CompletedProcess(["lasar", *arguments], stopped.value.code, output, errors)

    return run


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shop")
    subprocess.run(
        [sys.executable, str(ROOT / "examples" / "make_mini_data.py"), str(folder / "mini")], check=True
    )
    return folder / "mini"


def arguments(shop: Path, run: Path) -> list[str]:
    return [
        str(ROOT / "recipes" / "mini.yaml"),
        f"prepare.source={shop / 'events.csv'}",
        f"prepare.items={shop / 'items.csv'}",
        f"run_dir={run}",
    ]


def fingerprints(run: Path) -> dict[str, dict[str, str]]:
    return {stage: json.loads((run / stage / "manifest.json").read_text())["outputs"] for stage in STAGES}


@pytest.fixture(scope="module")
def finished(shop):
    run = shop.parent / "run"
    output = lasar("run", *arguments(shop, run)).stdout
    return run, output


def test_every_stage_leaves_an_artifact_and_nothing_else(finished):
    run, _ = finished
    assert {path.name for path in run.iterdir()} == {*STAGES, "recipe.json", ".lock"}


def test_the_planted_rule_is_learned(finished):
    run, output = finished
    methods = json.loads((run / "evaluate" / "metrics.json").read_text())["methods"]
    for stage in ("sft", "latent_sft", "rl"):
        assert methods[stage]["hr@5"] > 2 * methods["popularity"]["hr@5"]
        assert methods[stage]["hr@5"] > 0.5
    assert "popularity" in output
    assert "transitions" in output


def test_a_second_run_skips_everything(finished, shop):
    run, _ = finished
    before = fingerprints(run)
    started = time.monotonic()
    output = lasar("run", *arguments(shop, run)).stdout
    assert output.count("up to date, skipped") == len(STAGES)
    assert time.monotonic() - started < 30
    assert fingerprints(run) == before


def test_two_runs_with_one_seed_are_identical(finished, shop):
    run, _ = finished
    lasar("run", *arguments(shop, shop.parent / "again"))
    assert fingerprints(shop.parent / "again") == fingerprints(run)


@pytest.mark.parametrize(
    ("command", "kept"), [("sft", "64"), ("run", "64"), ("serve", None), ("score", None)]
)
def test_training_keeps_few_kernels(command, kept, monkeypatch):
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", raising=False)
    _keep_few_kernels(["--some-option", command, "recipe.yaml"])
    assert os.environ.get("ONEDNN_PRIMITIVE_CACHE_CAPACITY") == kept


def test_status_and_config(finished, shop, inside):
    run, _ = finished
    assert inside("status", str(run)).stdout.count("done") == len(STAGES)
    assert "backbone: tiny" in inside("config", *arguments(shop, run)).stdout


def test_recommend_prints_titles(finished, inside):
    run, _ = finished
    items = pl.read_parquet(run / "prepare" / "items.parquet")
    item_id, title = items["item_id"][0], items["title"][0]
    output = inside("recommend", str(run), "--history", item_id, "--k", "3").stdout
    assert title in output
    found = json.loads(inside("recommend", str(run), "--history", item_id, "--k", "3", "--json").stdout)
    assert len(found) == 3
    assert all(item["title"] for item in found)
    user = pl.read_parquet(run / "prepare" / "users.parquet")["user_id"][0]
    assert "recommended next" in inside("recommend", str(run), "--user", user).stdout


def test_depth_can_be_forced_and_thoughts_read(finished, inside):
    run, _ = finished
    item_id = pl.read_parquet(run / "prepare" / "items.parquet")["item_id"][0]
    lists = {
        depth: inside("recommend", str(run), "--history", item_id, "--depth", depth, "--json").stdout
        for depth in ("auto", "0", "1", "8", "sampled")
    }
    assert all(len(json.loads(found)) == 10 for found in lists.values())
    assert len(set(lists.values())) > 1
    output = inside("explain", str(run), "--history", item_id, "--k", "3").stdout
    assert "latent steps:" in output
    assert "The latest order includes" in output
    assert "(chosen)" in output


def test_an_interrupt_says_how_to_go_on(shop, tmp_path, inside, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("lasar.cli.run_stage", interrupted)
    done = inside("prepare", *arguments(shop, tmp_path / "cut"))
    assert done.returncode == 130
    assert done.stderr.strip().startswith("interrupted; the same command goes on from what was saved")


def test_an_empty_list_says_so(finished, inside):
    run, _ = finished
    item_id = pl.read_parquet(run / "prepare" / "items.parquet")["item_id"][0]
    seen = ("--history", item_id, "--exclude-seen")
    assert "no item is left to recommend" in inside("recommend", str(run), *seen, "--allow", item_id).stdout


def test_thoughts_are_read_with_the_anchors_of_their_training_only(finished, inside, tmp_path):
    run, _ = finished
    item_id = pl.read_parquet(run / "prepare" / "items.parquet")["item_id"][0]
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    manifest = json.loads((copy / "anchor" / "manifest.json").read_text())
    manifest["outputs"]["summary.json"] = "another"
    (copy / "anchor" / "manifest.json").write_text(json.dumps(manifest))
    done = inside("explain", str(copy), "--history", item_id)
    assert done.returncode == 2
    assert "trained with another 'anchor' than" in done.stderr


def test_a_run_can_stop_early(finished, shop, tmp_path):
    later = "sft.backbone=./made_from_what_comes_before"
    lasar("run", *arguments(shop, tmp_path / "early"), later, "--until", "quantize")
    assert not (tmp_path / "early" / "sft").exists()


def test_mistakes_are_one_line(finished, shop, tmp_path, inside):
    run, _ = finished
    item_id = pl.read_parquet(run / "prepare" / "items.parquet")["item_id"][0]
    cases = [
        (["run", str(ROOT / "recipes" / "minni.yaml")], "did you mean"),
        (["sft", *arguments(shop, run), "sft.epoch=3"], "did you mean 'epochs'"),
        (["sft", *arguments(shop, run), "sft.epochs=many"], "sft.epochs"),
        (["run", *arguments(shop, tmp_path / "r"), "prepare.source=nowhere.csv"], "nowhere.csv"),
        (["sft", *arguments(shop, tmp_path / "r2")], "run the stage 'prepare' first"),
        (["recommend", str(run), "--history", "no-such-item"], "no-such-item"),
        (["recommend", str(tmp_path / "nothing"), "--history", "x"], "no such run folder"),
        (["status", str(tmp_path / "nothing")], "not a run folder"),
        (["nonsense"], "No such command 'nonsense'"),
        (["recommend"], "Missing argument 'RUN'"),
        (["recommend", str(run), "--nonsense"], "No such option: --nonsense"),
        (["recommend", str(run)], "give either --history ID (repeat it) or --user ID"),
        (["recommend", str(run), "--history", item_id, "--depth", "x"], "auto, sampled, or a number"),
        (["recommend", str(run), "--history", item_id, "--depth", "9"], "0 to 8 latent steps"),
        (["run", *arguments(shop, run), "--until", "latent"], "did you mean 'latent_sft'"),
        (
            ["run", *arguments(shop, tmp_path / "r3"), "stages=[prepare, quantize]"],
            "quantize reads 'embed', which",
        ),
        (["latent_sft", *arguments(shop, run), "latent_sft.loop.depth=9"], "at most 8 steps"),
        (["run", *arguments(shop, tmp_path / "r4"), "rl.grpo.rewards={exat: 1}"], "did you mean 'exact'"),
        (["run", *arguments(shop, tmp_path / "r4"), "rl.grpo.rewards={}"], "rl.grpo.rewards"),
        (["run", *arguments(shop, tmp_path / "r4"), "rl.grpo.rewards={exact: .inf}"], "rl.grpo.rewards"),
        (["recommend", str(run), "--history", item_id, "--k", "0"], "--k"),
    ]
    for command, expected in cases:
        done = inside(*command)
        assert done.returncode == 2, (command, done)
        assert expected in done.stderr, (command, done.stderr)
        assert "Traceback" not in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_twenty_kills_change_nothing(finished, shop):
    run, _ = finished
    hit = shop.parent / "hit"
    rng = random.Random(0)
    kills = 0
    while kills < 20:
        process = subprocess.Popen(
            [sys.executable, "-c", "from lasar.cli import main; main()", "run", *arguments(shop, hit)],
            env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            process.wait(rng.uniform(1.0, 12.0))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            continue
        # It finished before the kill: start over, so that every kill hits a run that has work left.
        for stage in rng.sample(STAGES, 3):
            (hit / stage / "manifest.json").unlink(missing_ok=True)
    lasar("run", *arguments(shop, hit))
    assert fingerprints(hit) == fingerprints(run)
    assert {path.name for path in hit.iterdir()} == {*STAGES, "recipe.json", ".lock"}
