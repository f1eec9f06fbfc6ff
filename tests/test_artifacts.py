"""Artifacts: atomic, skipped when up to date, decided by content, safe to kill at any moment."""

import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lasar import artifacts
from lasar.artifacts import (
    FORMAT_VERSION,
    MANIFEST,
    StageContext,
    content_hash,
    file_sha256,
    is_up_to_date,
    read_json,
    read_manifest,
    run_stage,
    stage_state,
    write_json,
)
from lasar.config import Recipe, StageConfig
from lasar.errors import ArtifactError, DataError


@dataclass(frozen=True, kw_only=True)
class Config(StageConfig):
    source: Path | None = None
    text: str = "x"


@dataclass
class Stage:
    """A stage whose work is a function; counts how often it ran."""

    work: Callable[[Config, StageContext], None]
    upstream: tuple[str, ...] = ()
    runs: int = 0
    Config: type[StageConfig] = Config
    contexts: list[StageContext] = field(default_factory=list)

    def inputs(self, config: Config) -> tuple[str, ...]:
        return self.upstream

    def sources(self, config: Config) -> tuple[Path, ...]:
        return (config.source,) if config.source is not None and not self.upstream else ()

    def run(self, config: Config, context: StageContext) -> None:
        self.runs += 1
        self.contexts.append(context)
        self.work(config, context)


def _write_text(config: Config, context: StageContext) -> None:
    (context.output / "out.txt").write_text(config.text)


def _length_of_upstream(config: Config, context: StageContext) -> None:
    text = (context.inputs["prepare"] / "out.txt").read_text()
    write_json(context.output / "length.json", len(text))


class Shop:
    """A run folder with two stages; `prepare` copies a source, `embed` reads `prepare`."""

    def __init__(self, folder: Path) -> None:
        self.source = folder / "events.csv"
        self.source.write_text("one,two")
        self.run_dir = folder / "run"
        self.prepare = Stage(self._copy_upper)
        self.embed = Stage(_length_of_upstream, upstream=("prepare",))

    @staticmethod
    def _copy_upper(config: Config, context: StageContext) -> None:
        assert config.source is not None
        (context.output / "out.txt").write_text(config.source.read_text().upper())

    def run(self, *, seed: int = 0, text: str = "x") -> tuple[bool, bool]:
        config = Config(source=self.source, text=text)
        recipe = _recipe(self.run_dir, {"prepare": config, "embed": config}, seed=seed)
        return run_stage("prepare", self.prepare, recipe), run_stage("embed", self.embed, recipe)


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    return Shop(tmp_path)


def _recipe(run_dir: Path, configs: dict[str, Config], *, seed: int = 0) -> Recipe:
    return Recipe(name="x", seed=seed, run_dir=run_dir, stages=tuple(configs), configs=configs)


def _run_one(run_dir: Path, stage: Stage, *, seed: int = 0, config: Config | None = None) -> bool:
    return run_stage("sft", stage, _recipe(run_dir, {"sft": config or Config()}, seed=seed))


def _hidden(run_dir: Path) -> list[str]:
    return sorted(path.name for path in run_dir.glob(".*") if path.name != ".lock")


# What a finished artifact is


def test_manifest_says_what_was_made_from_what(shop: Shop) -> None:
    assert shop.run(seed=7) == (True, True)
    manifest = read_manifest(shop.run_dir / "embed")
    assert manifest["stage"] == "embed"
    assert manifest["seed"] == 7
    assert manifest["format_version"] == FORMAT_VERSION
    assert manifest["config"] == {"source": str(shop.source), "text": "x"}
    assert manifest["inputs"] == {"prepare": content_hash(shop.run_dir / "prepare")}
    assert manifest["outputs"] == {"length.json": file_sha256(shop.run_dir / "embed" / "length.json")}
    assert re.fullmatch(r"3\.\d+\.\d+.*", manifest["versions"]["python"])
    assert {"numpy", "torch", "polars"} <= manifest["versions"].keys()
    assert manifest["seconds"] >= 0


def test_nothing_else_is_left_in_the_run_folder(shop: Shop) -> None:
    shop.run()
    assert sorted(path.name for path in shop.run_dir.iterdir()) == [".lock", "embed", "prepare"]


def test_context_of_a_stage(shop: Shop) -> None:
    shop.run(seed=5)
    context = shop.embed.contexts[0]
    assert (context.stage, context.seed) == ("embed", 5)
    assert context.inputs == {"prepare": shop.run_dir / "prepare"}


def test_nested_outputs_are_hashed(tmp_path: Path) -> None:
    def work(config: Config, context: StageContext) -> None:
        (context.output / "model").mkdir()
        (context.output / "model" / "weights").write_bytes(b"\x00")

    _run_one(tmp_path, Stage(work))
    assert list(read_manifest(tmp_path / "sft")["outputs"]) == ["model/weights"]


# When a stage runs


def test_second_run_skips_everything(shop: Shop) -> None:
    shop.run()
    before = {path: path.stat().st_mtime_ns for path in shop.run_dir.rglob("*")}
    assert shop.run() == (False, False)
    assert (shop.prepare.runs, shop.embed.runs) == (1, 1)
    assert {path: path.stat().st_mtime_ns for path in shop.run_dir.rglob("*")} == before


def test_touching_a_file_changes_nothing(shop: Shop) -> None:
    shop.run()
    os.utime(shop.source, (0, 0))
    os.utime(shop.run_dir / "prepare" / "out.txt", (0, 0))
    assert shop.run() == (False, False)


def test_changed_source_reruns_downstream(shop: Shop) -> None:
    shop.run()
    shop.source.write_text("one,two,three")
    assert shop.run() == (True, True)
    assert read_json(shop.run_dir / "embed" / "length.json") == 13


def test_equal_output_skips_downstream(shop: Shop) -> None:
    """Another source, but `prepare` makes the same bytes of it."""
    shop.run()
    shop.source.write_text("ONE,two")
    assert shop.run() == (True, False)


def test_changed_seed_reruns(shop: Shop) -> None:
    shop.run()
    assert shop.run(seed=1) == (True, True)


def test_changed_config_reruns(shop: Shop) -> None:
    shop.run()
    assert shop.run(text="y") == (True, True)
    assert shop.run(text="y") == (False, False)


def test_a_folder_as_source_is_hashed_by_names_and_content(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "a").write_text("1")
    stage, config = Stage(_write_text), Config(source=folder)
    assert _run_one(tmp_path / "run", stage, config=config)
    assert not _run_one(tmp_path / "run", stage, config=config)
    (folder / "sub" / "a").rename(folder / "sub" / "b")
    assert _run_one(tmp_path / "run", stage, config=config)
    (folder / "sub" / "b").write_text("2")
    assert _run_one(tmp_path / "run", stage, config=config)


def test_new_format_version_reruns(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    shop.run()
    monkeypatch.setattr(artifacts, "FORMAT_VERSION", FORMAT_VERSION + 1)
    with pytest.raises(ArtifactError, match=rf"format version {FORMAT_VERSION}, this is version"):
        read_manifest(shop.run_dir / "prepare")
    assert shop.run() == (True, True)


def test_missing_output_file_reruns_its_stage_only(shop: Shop) -> None:
    shop.run()
    (shop.run_dir / "prepare" / "out.txt").unlink()
    assert shop.run() == (True, False)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"format_version": 1}', "\x00", "null"])
def test_damaged_manifest_reruns_its_stage(shop: Shop, content: str) -> None:
    shop.run()
    (shop.run_dir / "prepare" / MANIFEST).write_text(content)
    assert not is_up_to_date(shop.run_dir / "prepare", "anything")
    assert shop.run() == (True, False)


# What goes wrong upstream, in one line


def test_missing_source_is_named_with_the_nearest_file(shop: Shop) -> None:
    shop.source.rename(shop.source.with_name("event.csv"))
    with pytest.raises(DataError) as caught:
        shop.run()
    hint = shop.source.with_name("event.csv")
    expected = f"{shop.source}: no such file or folder, but the stage 'prepare' reads it"
    assert str(caught.value) == f"{expected}; did you mean '{hint}'?"


def test_missing_folder_of_a_source(tmp_path: Path) -> None:
    config = Config(source=tmp_path / "no" / "such" / "file")
    with pytest.raises(DataError, match="no such file or folder"):
        _run_one(tmp_path / "run", Stage(_write_text), config=config)


def test_missing_upstream_names_the_stage_to_run(shop: Shop) -> None:
    shop.run()
    shutil.rmtree(shop.run_dir / "prepare")
    with pytest.raises(ArtifactError) as caught:
        run_stage("embed", shop.embed, _recipe(shop.run_dir, {"embed": Config()}))
    assert str(caught.value) == f"{shop.run_dir / 'prepare'}: no such artifact; run the stage 'prepare' first"


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"format_version": 1}', '{"format_version": 0}'])
def test_damaged_upstream_names_the_stage_to_run(shop: Shop, content: str) -> None:
    shop.run()
    (shop.run_dir / "prepare" / MANIFEST).write_text(content)
    with pytest.raises(ArtifactError, match=r"run the stage 'prepare' again$") as caught:
        run_stage("embed", shop.embed, _recipe(shop.run_dir, {"embed": Config()}))
    assert str(shop.run_dir / "prepare") in str(caught.value)


def test_missing_file_of_upstream_is_named(shop: Shop) -> None:
    shop.run()
    (shop.run_dir / "prepare" / "out.txt").unlink()
    with pytest.raises(ArtifactError, match=r"prepare/out\.txt: missing; run the stage 'prepare' again"):
        run_stage("embed", shop.embed, _recipe(shop.run_dir, {"embed": Config()}))


def test_changed_file_of_upstream_is_named_and_nothing_is_made_from_it(shop: Shop) -> None:
    shop.run()
    (shop.run_dir / "prepare" / "out.txt").write_text("bent")
    with pytest.raises(
        ArtifactError, match=r"prepare/out\.txt: not the file that the stage 'prepare' wrote; run"
    ):
        run_stage("embed", shop.embed, _recipe(shop.run_dir, {"embed": Config(text="y")}))


def test_run_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match=r"cannot be written: .*; set run_dir=PATH"):
        _run_one(tmp_path / "file" / "run", Stage(_write_text))


# Failure and interruption


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_stage_that_raises_leaves_no_artifact(tmp_path: Path, kind: type[BaseException]) -> None:
    def work(config: Config, context: StageContext) -> None:
        (context.output / "half").write_text("")
        raise kind("stop")

    with pytest.raises(kind):
        _run_one(tmp_path, Stage(work))
    assert not (tmp_path / "sft").exists()
    assert all("scratch" in name for name in _hidden(tmp_path))
    assert _run_one(tmp_path, Stage(_write_text))  # and the lock is free


def test_a_stage_that_raises_keeps_the_old_artifact(tmp_path: Path) -> None:
    def work(config: Config, context: StageContext) -> None:
        (context.output / "out.txt").write_text("half")
        raise ValueError("stop")

    _run_one(tmp_path, Stage(_write_text))
    with pytest.raises(ValueError, match="stop"):
        _run_one(tmp_path, Stage(work), seed=1)
    assert (tmp_path / "sft" / "out.txt").read_text() == "x"
    assert not _run_one(tmp_path, Stage(_write_text))


def test_a_stage_always_starts_with_an_empty_output(tmp_path: Path) -> None:
    (tmp_path / ".sft.partial").mkdir()
    (tmp_path / ".sft.partial" / "half").write_text("")
    _run_one(tmp_path, Stage(_write_text))
    assert sorted(path.name for path in (tmp_path / "sft").iterdir()) == [MANIFEST, "out.txt"]


def _resumable(limit: int) -> Stage:
    """A stage that counts in scratch and fails at `limit`."""

    def work(config: Config, context: StageContext) -> None:
        count = context.scratch / "count.json"
        start = read_json(count) if count.exists() else 0
        for step in range(start, 4):
            if step == limit:
                raise ValueError("killed")
            write_json(count, step + 1)
        write_json(context.output / "started_at.json", start)

    return Stage(work)


def test_scratch_survives_for_the_same_fingerprint(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="killed"):
        _run_one(tmp_path, _resumable(limit=2))
    assert len(_hidden(tmp_path)) == 1
    _run_one(tmp_path, _resumable(limit=9))
    assert read_json(tmp_path / "sft" / "started_at.json") == 2
    assert _hidden(tmp_path) == []


def test_a_stage_that_fails_at_once_leaves_nothing_to_go_on_from(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="killed"):
        _run_one(tmp_path, _resumable(limit=0))
    assert _hidden(tmp_path) == []


@pytest.mark.parametrize("change", [{"seed": 1}, {"config": Config(text="y")}])
def test_scratch_of_another_fingerprint_goes(tmp_path: Path, change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="killed"):
        _run_one(tmp_path, _resumable(limit=2))
    _run_one(tmp_path, _resumable(limit=9), **change)
    assert read_json(tmp_path / "sft" / "started_at.json") == 0
    assert _hidden(tmp_path) == []


def test_scratch_of_an_unfinished_recipe_survives_a_skip(tmp_path: Path) -> None:
    _run_one(tmp_path, _resumable(limit=9))
    with pytest.raises(ValueError, match="killed"):
        _run_one(tmp_path, _resumable(limit=2), seed=1)
    assert not _run_one(tmp_path, _resumable(limit=9))
    _run_one(tmp_path, _resumable(limit=9), seed=1)
    assert read_json(tmp_path / "sft" / "started_at.json") == 2


def test_another_stage_with_a_longer_name_is_left_alone(tmp_path: Path) -> None:
    for name in (".latent_sft.partial", ".sft_two.partial"):
        (tmp_path / name).mkdir()
    _run_one(tmp_path, Stage(_write_text))
    assert _hidden(tmp_path) == [".latent_sft.partial", ".sft_two.partial"]


def test_killed_at_every_file_operation_and_rerun_equals_uninterrupted(tmp_path: Path) -> None:
    """SIGKILL at each file operation of a run, on an empty folder and over older artifacts."""
    script = Path(__file__).with_name("kill_every_step.py")
    environment = os.environ | {"PYTHONPATH": str(script.parent.parent)}
    ended = subprocess.run(
        [sys.executable, script, tmp_path], env=environment, capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    assert found["failures"] == []
    assert min(found["kills"].values()) >= 20


# What `lasar status` says


def test_states_of_a_stage(tmp_path: Path) -> None:
    def state(**change: Any) -> str:
        recipe = _recipe(tmp_path, {"sft": change.pop("config", Config())}, **change)
        return stage_state("sft", _resumable(limit=9), recipe)

    assert state() == "not run"
    with pytest.raises(ValueError, match="killed"):
        _run_one(tmp_path, _resumable(limit=2))
    assert state() == "interrupted"
    assert state(seed=1) == "not run"
    _run_one(tmp_path, _resumable(limit=9))
    assert state() == "done"
    assert state(seed=1) == "out of date"
    with pytest.raises(ValueError, match="killed"):
        _run_one(tmp_path, _resumable(limit=2), seed=1)
    assert (state(), state(seed=1)) == ("done", "interrupted")
    (tmp_path / "sft" / "started_at.json").unlink()
    assert state() == "out of date"
    assert state(config=Config(source=tmp_path / "missing")) == "out of date"


def test_state_of_a_stage_whose_upstream_is_missing(shop: Shop) -> None:
    recipe = _recipe(shop.run_dir, {"embed": Config()})
    assert stage_state("embed", shop.embed, recipe) == "not run"
    shop.run()
    shutil.rmtree(shop.run_dir / "prepare")
    assert stage_state("embed", shop.embed, recipe) == "out of date"


# Two processes


def test_a_second_process_gets_a_clear_error(tmp_path: Path) -> None:
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        stage = Stage(_write_text)
        with pytest.raises(ArtifactError) as caught:
            _run_one(tmp_path, stage)
    assert stage.runs == 0
    expected = f"{tmp_path}: another process is writing here, the stage 'sft' cannot"
    assert str(caught.value).startswith(expected)
    assert _run_one(tmp_path, stage)


def test_the_lock_is_held_while_a_stage_runs(tmp_path: Path) -> None:
    def work(config: Config, context: StageContext) -> None:
        with (tmp_path / ".lock").open("w") as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)

    assert _run_one(tmp_path, Stage(work))


def test_an_up_to_date_stage_is_skipped_while_another_process_writes(shop: Shop) -> None:
    shop.run()
    with (shop.run_dir / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert shop.run() == (False, False)


# JSON


def test_json_round_trip(tmp_path: Path) -> None:
    value = {"b": [1, 2.5, None, True], "a": {"é": "x"}}
    write_json(tmp_path / "x.json", value)
    assert read_json(tmp_path / "x.json") == value
    assert list(read_json(tmp_path / "x.json")) == ["b", "a"]
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_numpy_and_paths_are_written_as_what_they_are(tmp_path: Path) -> None:
    write_json(
        tmp_path / "x.json", {"a": np.float32(0.5), "b": np.arange(3), "c": np.int64(2), "d": Path("p")}
    )
    assert read_json(tmp_path / "x.json") == {"a": 0.5, "b": [0, 1, 2], "c": 2, "d": "p"}


def test_other_objects_are_refused_and_the_old_file_stays(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", 1)
    with pytest.raises(TypeError, match="cannot be written as JSON"):
        write_json(tmp_path / "x.json", {"a": object()})
    assert read_json(tmp_path / "x.json") == 1


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b""])
def test_unreadable_json_names_the_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"x\.json: not a readable JSON file"):
        read_json(tmp_path / "x.json")


def test_missing_json_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"x\.json: not a readable JSON file"):
        read_json(tmp_path / "x.json")
