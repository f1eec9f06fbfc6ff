"""Artifact folders: written atomically, described by a manifest, skipped when up to date.

A stage reads artifact folders and writes exactly one. It works in a hidden partial folder that becomes the
artifact by one rename after its manifest is complete, so a killed stage leaves nothing that looks finished.
What a stage needs to continue after a kill (checkpoints, shards) goes to its scratch folder, which survives
until the stage completes or anything it depends on changes.

Whether a stage is up to date is decided by content, never by time: its fingerprint covers the format version,
its config, the seed, and the sha256 of every file it reads.
"""

import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from lasar.config import Recipe, StageConfig
from lasar.errors import ArtifactError, DataError, LasarError, nearest
from lasar.ranks import alone, ranks, tell

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
_VERSIONED_LIBRARIES = (
    "lasar", "torch", "transformers", "tokenizers", "numpy", "polars", "faiss-cpu",
    "sentence-transformers", "openai",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class StageContext:
    """What a stage's `run` gets beside its config.

    Attributes:
        stage: the stage's name.
        seed: the run's seed.
        inputs: artifact folder of every upstream stage it asked for, by stage name.
        output: an empty folder; everything written here becomes the artifact.
        scratch: a folder that survives a kill; checkpoints and finished shards go here.
        shard_layers: several processes hold parts of a trained model's layers.
    """

    stage: str
    seed: int
    inputs: Mapping[str, Path]
    output: Path
    scratch: Path
    shard_layers: bool = False


class StageModule(Protocol):
    """The four names a stage file defines: `Config`, `inputs`, `sources`, `run`."""

    @property
    def Config(self) -> type[StageConfig]:
        """The stage's config dataclass."""

    def inputs(self, config: Any) -> tuple[str, ...]:
        """Names of the upstream stages whose artifacts are read."""

    def sources(self, config: Any) -> tuple[Path, ...]:
        """Files and folders outside the run folder that are read (hashed into the fingerprint)."""

    def run(self, config: Any, context: StageContext) -> None:
        """Read the inputs, write the output folder."""


def run_stage(name: str, module: StageModule, recipe: Recipe) -> bool:
    """Run one stage unless its artifact is up to date; of several processes the first writes it.

    Returns:
        True if the stage ran, False if it was skipped.

    Raises:
        ArtifactError: an upstream artifact is missing or damaged, or another process is writing this one.
        DataError: a file or folder that the stage reads is missing or unreadable.
    """
    if ranks().rank == 0:
        ran = _run_stage(name, module, recipe)
        tell("done")
        return ran
    scratch = tell()
    if scratch == "done":
        return False
    if recipe.configs[name].in_ranks:
        inputs = {upstream: recipe.run_dir / upstream for upstream in module.inputs(recipe.configs[name])}
        with tempfile.TemporaryDirectory() as unread:
            context = StageContext(
                stage=name, seed=recipe.seed, inputs=inputs, output=Path(unread), scratch=Path(scratch),
                shard_layers=recipe.shard_layers,
            )  # fmt: skip
            module.run(recipe.configs[name], context)
    tell()
    return True


def _run_stage(name: str, module: StageModule, recipe: Recipe) -> bool:
    config, run_dir = recipe.configs[name], recipe.run_dir
    inputs = {upstream: run_dir / upstream for upstream in module.inputs(config)}
    sources = module.sources(config)
    fingerprint = stage_fingerprint(name, config, seed=recipe.seed, inputs=inputs, sources=sources)
    if is_up_to_date(run_dir / name, fingerprint):
        _remove_leftovers(run_dir, name, _scratch(run_dir, name, fingerprint))
        return False
    with exclusive(run_dir, who=f"the stage {name!r}"):
        # Again, now that nobody else can write: another process may just have finished an upstream stage.
        fingerprint = stage_fingerprint(name, config, seed=recipe.seed, inputs=inputs, sources=sources)
        if is_up_to_date(run_dir / name, fingerprint):
            return False
        for folder in inputs.values():
            refuse_damaged(folder)
        scratch = _scratch(run_dir, name, fingerprint)
        _remove_hidden(run_dir, name, keep=scratch)
        scratch.mkdir(exist_ok=True)
        partial = run_dir / f".{name}.partial"
        partial.mkdir()
        context = StageContext(
            stage=name, seed=recipe.seed, inputs=inputs, output=partial, scratch=scratch,
            shard_layers=recipe.shard_layers,
        )  # fmt: skip
        try:
            started, cpu_started = time.perf_counter(), time.process_time()
            tell(str(scratch))  # the others begin
            with contextlib.nullcontext() if config.in_ranks else alone():
                module.run(config, context)
            manifest = {
                "stage": name,
                "format_version": FORMAT_VERSION,
                "fingerprint": fingerprint,
                "seed": recipe.seed,
                "config": config.as_dict(),
                "inputs": {upstream: content_hash(folder) for upstream, folder in inputs.items()},
                "outputs": _file_hashes(partial),
                "versions": library_versions(),
                "seconds": round(time.perf_counter() - started, 2),
                "cpu_seconds": round(time.process_time() - cpu_started, 2),
            }
            write_json(partial / MANIFEST, manifest)
            permit_as(partial / MANIFEST)
        except BaseException:
            shutil.rmtree(partial)
            with contextlib.suppress(OSError):
                scratch.rmdir()  # there is nothing to go on from, unless something is in it
            raise
        _replace_folder(partial, run_dir / name)
        _remove_hidden(run_dir, name)
    return True


def stage_state(name: str, module: StageModule, recipe: Recipe) -> str:
    """Where a stage stands: `done`, `out of date`, `interrupted` (a rerun continues it) or `not run`."""
    run_dir, config = recipe.run_dir, recipe.configs[name]
    stale = "out of date" if (run_dir / name / MANIFEST).is_file() else "not run"
    try:
        inputs = {upstream: run_dir / upstream for upstream in module.inputs(config)}
        fingerprint = stage_fingerprint(
            name, config, seed=recipe.seed, inputs=inputs, sources=module.sources(config)
        )
    except LasarError:
        return stale
    if is_up_to_date(run_dir / name, fingerprint):
        return "done"
    return "interrupted" if _scratch(run_dir, name, fingerprint).is_dir() else stale


def stage_fingerprint(
    name: str, config: StageConfig, *, seed: int, inputs: Mapping[str, Path], sources: Sequence[Path]
) -> str:
    """Hash of everything a stage's output depends on.

    Raises:
        ArtifactError: an upstream artifact is missing or damaged.
        DataError: a source is missing or unreadable.
    """
    facts = {
        "stage": name,
        "format_version": FORMAT_VERSION,
        "seed": seed,
        "config": config.as_dict(),
        "inputs": {upstream: content_hash(folder) for upstream, folder in inputs.items()},
        "sources": [_source_hash(path, name) for path in sources],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def is_up_to_date(folder: Path, fingerprint: str) -> bool:
    """Whether `folder` holds a complete artifact with this fingerprint; a damaged one does not."""
    try:
        manifest = read_manifest(folder)
    except ArtifactError:
        return False
    same = bool(manifest["fingerprint"] == fingerprint)
    return same and all(
        (folder / file).is_file() and file_sha256(folder / file) == digest
        for file, digest in manifest["outputs"].items()
    )


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read an artifact's manifest.

    Raises:
        ArtifactError: the artifact is missing, damaged, or from another format version.
    """
    if not (folder / MANIFEST).is_file():
        raise ArtifactError(f"{folder}: no such artifact; run the stage {folder.name!r} first")
    try:
        manifest = read_json(folder / MANIFEST)
    except ArtifactError as error:
        raise ArtifactError(f"{error}; run the stage {folder.name!r} again") from None
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if not isinstance(version, int):
        raise ArtifactError(f"{folder / MANIFEST}: not a manifest; run the stage {folder.name!r} again")
    if version != FORMAT_VERSION:
        raise ArtifactError(
            f"{folder}: written in format version {version}, this is version {FORMAT_VERSION}; "
            f"run the stage {folder.name!r} again"
        )
    if not isinstance(manifest.get("outputs"), dict) or "fingerprint" not in manifest:
        raise ArtifactError(f"{folder / MANIFEST}: incomplete; run the stage {folder.name!r} again")
    return dict(manifest)


def content_hash(folder: Path) -> str:
    """Hash of an artifact's content, from its manifest: equal bytes, equal hash, whenever they were made.

    Raises:
        ArtifactError: the manifest or a file is missing; `refuse_damaged` also reads the files.
    """
    outputs = read_manifest(folder)["outputs"]
    missing = [file for file in outputs if not (folder / file).is_file()]
    if missing:
        raise ArtifactError(f"{folder / missing[0]}: missing; run the stage {folder.name!r} again")
    return hashlib.sha256(json.dumps(outputs, sort_keys=True).encode()).hexdigest()


def refuse_damaged(folder: Path) -> None:
    """Compare every file of an artifact with its manifest.

    Raises:
        ArtifactError: a file is missing, or is not the one that was written.
    """
    for file, digest in read_manifest(folder)["outputs"].items():
        path = folder / file
        if not path.is_file() or file_sha256(path) != digest:
            raise ArtifactError(
                f"{path}: not the file that the stage {folder.name!r} wrote; run the stage {folder.name!r} again"
            )


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        ArtifactError: the file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path}: not a readable JSON file: {error}") from None


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, keys in the order given, floats as they are, numpy values as numbers.

    Raises:
        TypeError: a value is neither JSON, a path nor numpy; better than a metric that became a string.
    """
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=1, default=_plain) + "\n", encoding="utf-8")
    partial.replace(path)


def permit_as(usual: Path) -> None:
    """Give every file beside and below one its permissions; safetensors files are born for their owner alone."""
    mode = usual.stat().st_mode & 0o777
    for path in usual.parent.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"cannot be written as JSON: {value!r}")


def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries whose behaviour can change a result."""
    versions = {"python": platform.python_version()}
    for library in _VERSIONED_LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[library] = importlib.metadata.version(library)
    return versions


def file_sha256(path: Path) -> str:
    """Hex sha256 of one file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def folder_hash(folder: Path) -> str:
    """Hash of the names and contents of a folder's files."""
    return hashlib.sha256(json.dumps(_file_hashes(folder)).encode()).hexdigest()


def _file_hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): file_sha256(path) for path in files}


def _source_hash(path: Path, stage: str) -> str:
    try:
        if path.is_dir():
            return folder_hash(path)
        return file_sha256(path)
    except FileNotFoundError:
        siblings = [str(other) for other in path.parent.glob("*")]
        hint = nearest(str(path), siblings)
        raise DataError(f"{path}: no such file or folder, but the stage {stage!r} reads it{hint}") from None
    except OSError as error:
        raise DataError(f"{error.filename or path}: cannot be read: {error.strerror}") from None


def _scratch(run_dir: Path, stage: str, fingerprint: str) -> Path:
    return run_dir / f".{stage}.scratch-{fingerprint[:12]}"


def _remove_hidden(run_dir: Path, stage: str, *, keep: Path | None = None) -> None:
    """Remove a stage's partial, retired and scratch folders."""
    for path in run_dir.glob(f".{stage}.*"):
        if path != keep and path.is_dir():
            shutil.rmtree(path)


def _remove_leftovers(run_dir: Path, stage: str, scratch: Path) -> None:
    """Finish the tidying of a run that was killed after its artifact was in place.

    Scratch of another fingerprint stays: it is the progress of a recipe that was not finished.
    """
    hidden = (run_dir / f".{stage}.partial", run_dir / f".{stage}.retired", scratch)
    if any(path.is_dir() for path in hidden):
        with contextlib.suppress(ArtifactError), exclusive(run_dir, who=f"the stage {stage!r}"):
            for path in hidden:
                shutil.rmtree(path, ignore_errors=True)


def _replace_folder(source: Path, target: Path) -> None:
    retired = target.parent / f".{target.name}.retired"
    if target.exists():
        target.rename(retired)
    source.rename(target)


@contextlib.contextmanager
def exclusive(folder: Path, *, who: str, elsewhere: str = "set run_dir=PATH") -> Iterator[None]:
    """Hold a folder's lock, made if it is not there; the kernel releases it when the process dies.

    Raises:
        ArtifactError: another process holds it, or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise ArtifactError(f"{folder}: cannot be written: {error.strerror}; {elsewhere}") from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ArtifactError(
            f"{folder}: another process is writing here, {who} cannot; wait for it, or {elsewhere}"
        ) from None
    else:
        yield
    finally:
        os.close(handle)
