"""The quantizer seam: vectors to codes and back, one protocol, one literal dict of kinds.

I items, E embedding width, L levels, C codebook size, P levels already fixed.

A quantizer assigns codes level by level. `level_costs` is the one definition of how well a code fits:
`encode` takes its minimum at every level, and collision resolution takes the next-best from the same numbers.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from lasar.artifacts import read_json, write_json
from lasar.errors import ArtifactError, nearest
from lasar.sid.kmeans import ResidualKMeans
from lasar.sid.rqvae import ResidualVae

STATE_FILE = "quantizer.safetensors"
FACTS_FILE = "quantizer.json"


class Quantizer(Protocol):
    """What a quantizer kind provides. Its constructor takes keyword arguments only."""

    num_levels: int
    codebook_size: int

    def fit(self, item_embeddings_IE: NDArray[np.float32]) -> None:
        """Learn the codebooks; deterministic for one seed."""

    def encode(self, item_embeddings_IE: NDArray[np.float32]) -> NDArray[np.int32]:
        """Codes [I, L]; for every level the code of least `level_costs`. Items may share codes."""

    def decode(self, codes_IL: NDArray[np.integer]) -> NDArray[np.float32]:
        """Reconstructed vectors [I, E]."""

    def level_costs(
        self, item_embeddings_IE: NDArray[np.float32], codes_IP: NDArray[np.integer]
    ) -> NDArray[np.float32]:
        """Cost [I, C] of every code of level P, given each item's first P codes; smaller fits better."""

    def state(self) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        """Constructor arguments and fitted arrays: all that `restore` needs."""

    def restore(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Take the arrays of `state` instead of fitting."""


QUANTIZERS: dict[str, Callable[..., Quantizer]] = {"rq_kmeans": ResidualKMeans, "rq_vae": ResidualVae}


def save_quantizer(quantizer: Quantizer, folder: Path) -> None:
    """Write a fitted quantizer of any kind as `quantizer.json` and `quantizer.safetensors`."""
    kind = next(name for name, known in QUANTIZERS.items() if type(quantizer) is known)
    arguments, arrays = quantizer.state()
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, folder / STATE_FILE)
    write_json(folder / FACTS_FILE, {"kind": kind, "arguments": arguments})


def load_quantizer(folder: Path) -> Quantizer:
    """Read what `save_quantizer` wrote.

    Raises:
        ArtifactError: a file is missing or damaged, or the kind is unknown.
    """
    facts = read_json(folder / FACTS_FILE)
    path = folder / STATE_FILE
    kind = facts.get("kind")
    if kind not in QUANTIZERS:
        raise ArtifactError(f"{folder / FACTS_FILE}: unknown kind {kind!r}{nearest(str(kind), QUANTIZERS)}")
    try:
        quantizer = QUANTIZERS[kind](**facts["arguments"])
        quantizer.restore(load_file(path))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ArtifactError(f"{path}: not a usable quantizer ({error}); run quantize again") from None
    return quantizer
