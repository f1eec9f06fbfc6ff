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

        In `fused` vectors the collaborative part is zero, as it is for trained items without co-occurrence.

        Raises:
            DataError: vectors of this run cannot be made from text alone, or the text model is missing.
            ArtifactError: the `embed` artifact is missing or damaged.
        """
        manifest = read_manifest(self._run / "embed")
        config, summary = manifest["config"], read_json(self._run / "embed" / "summary.json")
        if config["kind"] == "collaborative":
            raise DataError(
                "embed.kind=collaborative: this run's vectors hold no text, so a new item has none; "
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
        company = np.zeros((len(raw), summary["collaborative_width"]), dtype=np.float32)
        return concatenate([(config["text_weight"], text), (config["collaborative_weight"], company)])

    def _model_name(self, trained_with: str) -> str:
        if self._text_model is not None:
            return self._text_model
        exported = self._run / EXPORTED_TEXT_MODEL
        return str(exported) if exported.is_dir() else trained_with
