"""A script for test_artifacts: kill a two-stage run at every file operation it makes, and rerun it.

Usage: kill_every_step.py FOLDER. Each trial is a fork, so that hundreds take a few seconds. Prints one
JSON line: how many kill points there were, and for each that went wrong what was found.
"""

import json
import os
import shutil
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from lasar.artifacts import MANIFEST, StageContext, file_sha256, read_json, run_stage, write_json
from lasar.config import Recipe, StageConfig

FILE_EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")
NUM_SHARDS = 4


@dataclass(frozen=True, kw_only=True)
class Config(StageConfig):
    source: Path


def prepare(config: Config, context: StageContext) -> None:
    (context.output / "parts").mkdir()
    for part in ("a", "b"):
        text = f"{part} {config.source.read_text()} {context.seed}"
        (context.output / "parts" / f"{part}.txt").write_text(text)


def train(config: Config, context: StageContext) -> None:
    """Resumable: every shard follows from the one before, finished ones are read back from scratch."""
    value = sum(len(path.read_text()) for path in sorted((context.inputs["prepare"] / "parts").iterdir()))
    for index in range(NUM_SHARDS):
        shard = context.scratch / f"{index}.json"
        if not shard.exists():
            write_json(shard, (value * 31 + context.seed) % 1009)
        value = read_json(shard)
    write_json(context.output / "model.json", value)


STAGES: dict[str, Any] = {
    "prepare": SimpleNamespace(
        inputs=lambda config: (), sources=lambda config: (config.source,), run=prepare
    ),
    "train": SimpleNamespace(inputs=lambda config: ("prepare",), sources=lambda config: (), run=train),
}


def run_all(run_dir: Path, source: Path, seed: int) -> None:
    config = Config(source=source)
    recipe = Recipe(
        name="x", seed=seed, run_dir=run_dir, stages=tuple(STAGES), configs=dict.fromkeys(STAGES, config)
    )
    for name, module in STAGES.items():
        run_stage(name, module, recipe)


def run_and_die(run_dir: Path, source: Path, seed: int, at_event: int) -> bool:
    """Run in a child that kills itself at file operation `at_event`; False when it lived to the end."""
    child = os.fork()
    if child == 0:
        seen = 0

        def count(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal seen
            if event in FILE_EVENTS and str(run_dir) in str(arguments[0]):
                seen += 1
                if seen == at_event:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        run_all(run_dir, source, seed)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def snapshot(run_dir: Path) -> dict[str, Any]:
    """Every file below the run folder and what is in it, less how long things took."""
    found: dict[str, Any] = {}
    for path in sorted(run_dir.rglob("*")):
        if path.name == MANIFEST:
            found[str(path.relative_to(run_dir))] = {**read_json(path), "seconds": 0, "cpu_seconds": 0}
        elif path.name != ".lock":
            found[str(path.relative_to(run_dir))] = path.read_bytes().decode() if path.is_file() else "/"
    return found


def half_written(run_dir: Path) -> list[str]:
    """Visible artifact folders whose content is not what their manifest says."""
    wrong = []
    for folder in run_dir.glob("[!.]*"):
        files = {p.relative_to(folder).as_posix(): file_sha256(p) for p in folder.rglob("*") if p.is_file()}
        files.pop(MANIFEST, None)
        if not (folder / MANIFEST).is_file() or read_json(folder / MANIFEST)["outputs"] != files:
            wrong.append(folder.name)
    return wrong


def main(folder: Path) -> None:
    source = folder / "source.csv"
    source.write_text("events")
    run_all(folder / "reference", source, 2)
    wanted = snapshot(folder / "reference")
    run_all(folder / "old", source, 1)
    failures = []
    kills = {}
    for start in ("fresh", "old"):  # nothing there, or artifacts of another seed that get replaced
        at_event = 1
        while True:
            run_dir = folder / f"{start}-{at_event}"
            if start == "old":
                shutil.copytree(folder / "old", run_dir)
            died = run_and_die(run_dir, source, 2, at_event)
            torn = half_written(run_dir)
            run_all(run_dir, source, 2)
            found = snapshot(run_dir)
            different = [key for key in wanted | found if wanted.get(key) != found.get(key)]
            if torn or different:
                failures.append({"start": start, "at_event": at_event, "torn": torn, "different": different})
            shutil.rmtree(run_dir)
            if not died:
                break
            at_event += 1
        kills[start] = at_event - 1
    print(json.dumps({"kills": kills, "failures": failures}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
