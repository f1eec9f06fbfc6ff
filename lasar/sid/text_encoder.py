"""Item texts to vectors with a sentence-transformers model, in shards that survive a kill.

Texts are encoded once each, sorted by length (so that a batch carries little padding), in fixed shards: which
texts form a batch never depends on what an interrupted run had finished, so the result doesn't either.

A shard's file is named by what it was made from, model included, so any number of runs may share one folder of them.
Several processes (`lasar.ranks`) deal the shards out among themselves.
"""

import functools
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from lasar.artifacts import folder_hash
from lasar.errors import DataError, require
from lasar.progress import progress
from lasar.ranks import meet, ranks, tell
from lasar.sid import ngram_encoder

DEFAULT_TEXT_MODEL = "data/all-minilm-l6-v2"

Encode = Callable[[list[str]], NDArray[np.float32]]


def local_model_folder(text_model: str, *, field: str = "embed.text_model") -> Path | None:
    """The model's folder, or None when `text_model` is a hub id.

    A name is taken for a folder when it exists, or looks like a path: absolute, with `.` or `~` in front,
    with more than one slash, or below `data/`.

    Args:
        text_model: local folder or hub id.
        field: the config field it comes from, as errors name it.

    Raises:
        DataError: it looks like a folder, and there is no model in it.
    """
    path = Path(text_model).expanduser()
    for folder in (path, path / "model"):
        if (folder / "modules.json").is_file() or (folder / "config.json").is_file():
            return folder
    looks_local = text_model[:1] in "/.~" or text_model.count("/") > 1 or text_model.startswith("data/")
    if path.exists() or looks_local:
        name = Path(DEFAULT_TEXT_MODEL).name
        fix = f"run: lasar data get {name}" if path.name == name else "give a sentence-transformers folder"
        raise DataError(f"{field}: {text_model}: no text model there; {fix}")
    return None


def load_text_encoder(
    text_model: str, *, batch_size: int, max_tokens: int, field: str = "embed.text_model"
) -> Encode:
    """Load a sentence-transformers model.

    A local folder is read without touching the network. Vectors are what the model gives, not normalised
    further.

    Args:
        text_model: local folder or hub id, or `ngrams` for the encoder that needs no model.
        batch_size: texts per forward pass.
        max_tokens: longer texts are cut, at most at the model's own limit.
        field: the config field that names the model, for errors.

    Raises:
        DataError: the model cannot be loaded.
        MissingExtraError: sentence-transformers is not installed.
    """
    if text_model == ngram_encoder.NAME:
        return ngram_encoder.encode_ngrams
    folder = local_model_folder(text_model, field=field)
    library = require("sentence_transformers", extra="embed")
    transformers_logging = require("transformers.utils.logging", extra="embed")
    showed_bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # for weights that load in a blink
    try:
        model = library.SentenceTransformer(str(folder or text_model), local_files_only=folder is not None)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{field}: {text_model}: cannot be loaded: {reason}") from None
    finally:
        if showed_bars:
            transformers_logging.enable_progress_bar()
    model.max_seq_length = min(max_tokens, model.max_seq_length or max_tokens)

    def encode(texts: list[str]) -> NDArray[np.float32]:
        vectors: Any = model.encode(texts, batch_size=batch_size, show_progress_bar=False)
        return np.asarray(vectors, dtype=np.float32)

    return encode


def encode_texts(
    texts: Sequence[str],
    load_encoder: Callable[[], Encode],
    *,
    folder: Path,
    shard_size: int,
    made_by: str = "",
    field: str = "embed.text_model",
) -> NDArray[np.float32]:
    """Encode texts shard by shard; finished shards are kept in `folder` and not encoded again.

    Args:
        texts: non-empty; equal texts are encoded once.
        load_encoder: called only when there is something left to encode.
        folder: of the shards; made if it is not there.
        shard_size: distinct texts per shard.
        made_by: whatever else the vectors depend on; see `encoder_identity`. May be left out where the folder belongs
            to one model and its settings.
        field: the config field that names the model, for errors.

    Returns:
        float32 [len(texts), E], in the order of `texts`.

    Raises:
        DataError: the model gives a vector that is not finite.
    """
    ordered = sorted(set(texts), key=lambda text: (len(text), text))
    shards = [ordered[begin : begin + shard_size] for begin in range(0, len(ordered), shard_size)]
    paths = [folder / f"{_shard_name(made_by, shard)}.safetensors" for shard in shards]
    done = {n: vectors for n, path in enumerate(paths) if (vectors := _read_shard(path)) is not None}
    missing = tell([number for number in range(len(shards)) if number not in done])
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
        encode, begun = load_encoder(), len(ordered) - sum(len(shards[number]) for number in missing)
        with progress("encoding texts", total=len(ordered), start=begun, unit="texts") as advance:
            for place in range(0, len(missing), ranks().size):
                for number in missing[place + ranks().rank : place + ranks().rank + 1]:
                    done[number] = encode(shards[number])
                    _write_shard(paths[number], done[number])
                advance(sum(len(shards[number]) for number in missing[place : place + ranks().size]))
        meet()  # what the others have made lies in the folder
    vectors = np.concatenate(
        [done[n] if n in done else load_file(path)["vectors"] for n, path in enumerate(paths)]
    )
    if not np.isfinite(vectors).all():
        text = ordered[int(np.argwhere(~np.isfinite(vectors))[0, 0])]
        raise DataError(f"{field} gives NaN or infinity for the text {text[:80]!r}; use another model")
    row_of = {text: row for row, text in enumerate(ordered)}
    return np.asarray(vectors[[row_of[text] for text in texts]], dtype=np.float32)


def sharded_encoder(
    text_model: str,
    *,
    batch_size: int,
    max_tokens: int,
    folder: Path,
    shard_size: int,
    field: str = "embed.text_model",
) -> Encode:
    """An encoder that loads its model once it has to, and never encodes twice what is in `folder`.

    Args:
        text_model: see `load_text_encoder`, as `batch_size`, `max_tokens` and `field`.
        batch_size: texts per forward pass.
        max_tokens: longer texts are cut.
        folder: of finished shards; any number of runs may share it.
        shard_size: distinct texts per shard.
        field: the config field that names the model.
    """
    load = functools.cache(
        lambda: load_text_encoder(text_model, batch_size=batch_size, max_tokens=max_tokens, field=field)
    )
    made_by = encoder_identity(text_model, batch_size=batch_size, max_tokens=max_tokens, field=field)
    return lambda texts: encode_texts(
        texts, load, folder=folder, shard_size=shard_size, made_by=made_by, field=field
    )


def encoder_identity(text_model: str, *, batch_size: int, max_tokens: int, field: str) -> str:
    """What an encoder's vectors depend on beside the texts: the bytes of a local model, the id of one on the hub.

    Raises:
        DataError: see `local_model_folder`.
    """
    folder = None if text_model == ngram_encoder.NAME else local_model_folder(text_model, field=field)
    model = text_model if folder is None else folder_hash(folder)
    return json.dumps([model, batch_size, max_tokens])


def _shard_name(made_by: str, shard: list[str]) -> str:
    return hashlib.sha256(json.dumps([made_by, shard]).encode()).hexdigest()[:32]


def _read_shard(path: Path) -> NDArray[np.float32] | None:
    try:
        return load_file(path)["vectors"]
    except (OSError, SafetensorError, KeyError):
        return None  # never finished, or damaged: encoded again


def _write_shard(path: Path, vectors_IE: NDArray[np.float32]) -> None:
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")  # another run may make the same one
    save_file({"vectors": np.ascontiguousarray(vectors_IE)}, partial)
    partial.replace(path)
