"""`lasar export`: one folder with everything that recommending needs, and nothing that training left behind.

The folder is laid out like a run folder, so `lasar serve`, `Recommender.load` and (for `MODEL/model`) transformers'
`from_pretrained` open it as it is. Users and their events stay out unless asked for.
"""

import shutil
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from lasar import __version__
from lasar.artifacts import MANIFEST, file_sha256, permit_as, read_manifest, write_json
from lasar.data.interactions import Interactions, ItemTable
from lasar.errors import ArtifactError, DataError
from lasar.recommender import Recommender, last_trained
from lasar.serving.catalogue import COUNTS_FILE
from lasar.serving.item_vectors import EXPORTED_TEXT_MODEL
from lasar.sid.text_encoder import local_model_folder

EXPORT_FILE = "export.json"

_PREPARE_FILES = ("items.parquet", "summary.json")
_USER_FILES = ("users.parquet", "interactions.parquet")
_MODEL_LEFT_OUT = ("curve*.jsonl", "metrics.json")


def export_run(
    run: Path,
    out: Path,
    *,
    model: str | None = None,
    anchors: bool = True,
    users: bool = False,
    text_model: bool = True,
) -> dict[str, Any]:
    """Copy what serving needs.

    Args:
        run: a finished run folder.
        out: the folder to make; must not exist.
        model: training stage; the last one that has an artifact by default.
        anchors: with the rationale segments that put thoughts into words, if the run has them.
        users: with the users of the event log and their events (personal data).
        text_model: with the text encoder for new items, if it is a local folder.

    Returns:
        What was written, as in `export.json`: stages, sha256 of every file, bytes in all.

    Raises:
        ArtifactError: the run is not complete, or `out` exists.
    """
    if out.exists():
        raise ArtifactError(f"{out}: exists already; give a new folder, or remove it")
    Recommender.load(run, model=model)  # refuses what could not be served
    stage = model or last_trained(run)
    partial = out.with_name(out.name + ".partial")
    if partial.exists():
        shutil.rmtree(partial)
    try:
        _copy_prepare(run / "prepare", partial / "prepare", users=users)
        _copy_stage(run / "quantize", partial / "quantize")
        _copy_stage(run / stage, partial / stage, left_out=_MODEL_LEFT_OUT)
        if (run / "embed" / MANIFEST).is_file():
            _copy_stage(run / "embed", partial / "embed")
        if anchors and (run / "anchor" / MANIFEST).is_file():
            _copy_stage(run / "anchor", partial / "anchor")
        copied_text_model = text_model and _copy_text_model(run, partial / EXPORTED_TEXT_MODEL)
        files = {
            path.relative_to(partial).as_posix(): file_sha256(path)
            for path in sorted(partial.rglob("*"))
            if path.is_file()
        }
        facts = {
            "lasar": __version__,
            "model": stage,
            "anchors": (partial / "anchor").is_dir(),
            "users": users,
            "text_model": copied_text_model,
            "num_items": len(ItemTable.load(partial / "prepare")),
            "bytes": sum((partial / name).stat().st_size for name in files),
            "files": files,
        }
        write_json(partial / EXPORT_FILE, facts)
        permit_as(partial / EXPORT_FILE)
        out.parent.mkdir(parents=True, exist_ok=True)
        partial.rename(out)
    except OSError as error:
        raise ArtifactError(f"{error.filename or out}: cannot be written: {error.strerror}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return facts


def _copy_prepare(source: Path, target: Path, *, users: bool) -> None:
    names = [*_PREPARE_FILES, *(_USER_FILES if users else ())]
    _copy_files(source, target, names)
    if (source / "interactions.parquet").is_file():
        # Which items are well known; says nothing about anyone.
        write_json(target / COUNTS_FILE, Interactions.load(source).train_counts().tolist())
    _copy_manifest(source, target)


def _copy_stage(source: Path, target: Path, *, left_out: Iterable[str] = ()) -> None:
    names = [path.relative_to(source).as_posix() for path in sorted(source.rglob("*")) if path.is_file()]
    left_out = (MANIFEST, *left_out)
    _copy_files(
        source, target, [name for name in names if not any(fnmatch(name, pattern) for pattern in left_out)]
    )
    _copy_manifest(source, target)


def _copy_files(source: Path, target: Path, names: Iterable[str]) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)


def _copy_manifest(source: Path, target: Path) -> None:
    """The stage's manifest, its outputs limited to what was copied."""
    if not (source / MANIFEST).is_file():
        return
    manifest = read_manifest(source)
    outputs = {name: digest for name, digest in manifest["outputs"].items() if (target / name).is_file()}
    write_json(target / MANIFEST, manifest | {"outputs": outputs})


def _copy_text_model(run: Path, target: Path) -> bool:
    if not (run / "embed" / MANIFEST).is_file():
        return False
    config = read_manifest(run / "embed")["config"]
    exported = run / EXPORTED_TEXT_MODEL
    try:
        folder = exported if exported.is_dir() else local_model_folder(config["text_model"])
    except DataError:
        return False
    if config["kind"] in ("collaborative", "given") or folder is None:
        return False
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.bin", "*.pt", "*.pkl", "*.h5", ".git*"))
    return True
