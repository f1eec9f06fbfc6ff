"""Vectors of items: the run's own, and those of items that come later, made as the stage `embed` made them."""

import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file

from lasar.artifacts import read_json, read_manifest
from lasar.errors import ArtifactError, DataError
from lasar.sid.fusion import concatenate, normalise
from lasar.sid.text_encoder import Encode, load_text_encoder

Float32Array = NDArray[np.float32]

EXPORTED_TEXT_MODEL = "text_model"  # folder of an export
_NEIGHBOURS = 5


def load_vectors(run: Path) -> Float32Array | None:
    """Vectors of the trained items, float32 [I, E]; None where the run folder has no `embed` artifact.

    Raises:
        ArtifactError: the file is damaged.
    """
    path = run / "embed" / "embeddings.safetensors"
    if not path.is_file():
        return None
    try:
        return load_file(path)["item_embeddings"]
    except (OSError, SafetensorError, KeyError) as error:
        raise ArtifactError(f"{path}: not readable ({error}); run the stage 'embed' again") from None


def company_of_neighbours(text_NT: Float32Array, trained_IE: Float32Array) -> Float32Array:
    """Collaborative parts for new items: the mean of those of the trained items with the nearest texts.

    Args:
        text_NT: unit text vectors of the new items.
        trained_IE: fused vectors of the trained items; the first T numbers are of their texts. Items without
            co-occurrence are nobody's neighbours.

    Returns:
        float32 [N, E - T]; 0 where no trained item has any.
    """
    width = text_NT.shape[1]
    known_IE = trained_IE[trained_IE[:, width:].any(axis=1)]
    texts_IT, company_IC = known_IE[:, :width], known_IE[:, width:]
    if not len(known_IE):
        return np.zeros((len(text_NT), trained_IE.shape[1] - width), dtype=np.float32)
    texts_IT = texts_IT / np.maximum(np.linalg.norm(texts_IT, axis=1, keepdims=True), 1e-12)
    near_NK = np.argsort(-(text_NT @ texts_IT.T), axis=1, kind="stable")[:, :_NEIGHBOURS]
    company_NC: Float32Array = company_IC[near_NK].mean(axis=1, dtype=np.float32)
    return company_NC


class TextVectors:
    """Turns item texts into vectors of the run's kind; the text model is loaded when it is first needed."""

    def __init__(self, run: Path, *, text_model: str | None = None) -> None:
        """Remember where to look.

        Args:
            run: run folder or export.
            text_model: overrides the text model that the run was made with.
        """
        self._run = run
        self._text_model = text_model
        self._encode: Encode | None = None
        self._lock = threading.Lock()

    def vectors(self, texts: Sequence[str]) -> Float32Array:
        """Vectors of texts, float32 [len(texts), E].

        In `fused` vectors the collaborative part is the mean of those of the items with the nearest texts. Zero would
        be nearest to the codes of items that nobody buys with others, whatever the text says.

        Raises:
            DataError: vectors of this run cannot be made from text alone, or the text model is missing.
            ArtifactError: the `embed` artifact is missing or damaged.
        """
        manifest = read_manifest(self._run / "embed")
        config, summary = manifest["config"], read_json(self._run / "embed" / "summary.json")
        if config["kind"] in ("collaborative", "given"):
            raise DataError(
                f"embed.kind={config['kind']}: this run's vectors hold no text, so a new item has none; "
                "train with embed.kind=fused or text"
            )
        if config["normalise"] != "l2":
            raise DataError(
                f"embed.normalise={config['normalise']}: needs statistics that the run does not keep; "
                "train with embed.normalise=l2"
            )
        with self._lock:
            if self._encode is None:
                self._encode = load_text_encoder(
                    self._model_name(config["text_model"]),
                    batch_size=config["batch_size"],
                    max_tokens=config["max_tokens"],
                    field="--text-model",
                )
            raw = self._encode(list(texts))
        if raw.shape[1] != summary["text_width"]:
            raise DataError(
                f"--text-model: gives vectors of width {raw.shape[1]}, the run's have {summary['text_width']}; "
                f"give the model the run was made with ({config['text_model']})"
            )
        if not np.isfinite(raw).all():
            raise DataError("--text-model: gives NaN or infinity for one of the texts")
        text = normalise(raw, np.ones(len(raw), dtype=bool), how="l2")
        if config["kind"] == "text":
            return text
        trained_IE = load_vectors(self._run)
        if trained_IE is None:
            raise ArtifactError(f"{self._run / 'embed'}: no vectors; run the stage 'embed' again")
        own = concatenate([(config["text_weight"], text)])
        return np.concatenate([own, company_of_neighbours(text, trained_IE)], axis=1)

    def _model_name(self, trained_with: str) -> str:
        if self._text_model is not None:
            return self._text_model
        exported = self._run / EXPORTED_TEXT_MODEL
        return str(exported) if exported.is_dir() else trained_with
