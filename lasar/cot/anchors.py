"""Anchors on disk: a vector for each segment of each training row's rationale (paper section 3).

The vectors lie in one safetensors file that is written piece by piece and read memory-mapped, so neither side ever
holds them all. A file that is still being written lives in the stage's scratch folder and survives a kill.

Legend: A distinct anchors, D hidden, R training rows, S segments of all rows, Q queries, K neighbours.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from lasar.artifacts import read_json, write_json
from lasar.cot.anchor_sources import Source
from lasar.cot.rows import TrainingRow
from lasar.cot.segmentation import unit
from lasar.errors import ArtifactError, ConfigError, DataError
from lasar.progress import progress
from lasar.ranks import meet, ranks, tell

ANCHORS_FILE, ROWS_FILE, TEXTS_FILE = "anchors.safetensors", "rows.safetensors", "texts.parquet"

Int32Array = NDArray[np.int32]
Int64Array = NDArray[np.int64]
Float32Array = NDArray[np.float32]

_COMMIT_EVERY = 32  # batches between two points that a killed run continues from
_FREE_MARGIN = 1.1  # share of the computed size that has to be free
_CHUNK = 16384  # anchors compared with the queries at a time


def anchor_bytes(num_anchors: int, hidden_size: int) -> int:
    """Bytes of the file of anchors, but for its short header."""
    return num_anchors * hidden_size * np.dtype(np.float32).itemsize


def readable_size(count: float) -> str:
    """`1.25 GiB` or `31.0 MiB`."""
    return f"{count / 2**30:,.2f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"


def check_disk(folder: Path, needed: int) -> None:
    """Refuse to begin what the disk cannot hold.

    Args:
        folder: an existing folder on the disk in question; what it holds already counts as ours.
        needed: bytes to be written.

    Raises:
        DataError: too little is free; the message says how much is needed.
    """
    held = sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())
    free = shutil.disk_usage(folder).free + held
    if needed * _FREE_MARGIN > free:
        raise DataError(
            f"{folder}: {readable_size(needed * _FREE_MARGIN)} are needed for anchors, {readable_size(free)} are free; "
            "set run_dir=PATH on a larger disk, or lower anchor.max_depth or anchor.segments_mean"
        )


def write_anchors(target: Path, source: Source, *, hidden_size: int, scratch: Path) -> None:
    """Compute batch after batch straight into the file, and continue where a killed run left off.

    Several processes take turns; they share the folder `scratch`.

    Args:
        target: the safetensors file to make.
        source: computes them; its batches together are anchors 0 to A - 1, each once.
        hidden_size: D.
        scratch: folder of the unfinished file, on the same disk as `target`.

    Raises:
        DataError: a vector is not finite.
    """
    batches = source.batches
    shape = (sum(len(batch) for batch in batches), hidden_size)
    path, state = scratch / ANCHORS_FILE, scratch / "anchors-done.json"
    first = ranks().rank == 0
    done = read_json(state)["batches"] if first and state.is_file() and path.is_file() else 0
    if first and done == 0:
        _reserve(path, shape)
    done = tell(done)
    vectors_AD = _map(path, writable=True)
    finished = sum(len(batch) for batch in batches[:done])
    with progress("computing anchors", total=shape[0], start=finished, unit="anchors") as advance:
        for number in range(done, len(batches)):
            if number % ranks().size == ranks().rank:
                vectors = source.compute(number)
                if not np.isfinite(vectors).all():
                    raise DataError(
                        f"{target.parent}: an anchor is NaN or infinite; the model of sft is broken"
                    )
                vectors_AD[batches[number]] = vectors
            advance(len(batches[number]))
            if (number + 1) % _COMMIT_EVERY == 0:
                vectors_AD.flush()
                meet()
                if first:
                    write_json(state, {"batches": number + 1})
    vectors_AD.flush()
    meet()
    if first:
        path.replace(target)


def _reserve(path: Path, shape: tuple[int, int]) -> None:
    facts = {"anchors": {"dtype": "F32", "shape": shape, "data_offsets": [0, anchor_bytes(*shape)]}}
    header = json.dumps(facts, separators=(",", ":")).encode()
    header += b" " * (-(len(header) + 8) % 64)  # so that the data begins on a cache line
    with path.open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        stream.truncate(8 + len(header) + anchor_bytes(*shape))


def _map(path: Path, *, writable: bool = False) -> "np.memmap[tuple[int, ...], np.dtype[np.float32]]":
    try:
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            facts = json.loads(stream.read(min(length, 4096)))["anchors"]
        shape, start = (int(facts["shape"][0]), int(facts["shape"][1])), 8 + length
        if facts["dtype"] != "F32" or path.stat().st_size != start + anchor_bytes(*shape) or shape[0] < 1:
            raise ValueError("its size is not what its header says")
        return np.memmap(path, dtype="<f4", mode="r+" if writable else "r", offset=start, shape=shape)
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise ArtifactError(f"{path}: not readable ({error}); run the stage 'anchor' again") from None


def number_anchors(texts_S: Sequence[str], *, shared: bool) -> tuple[list[str], Int32Array]:
    """Number the anchors.

    Args:
        texts_S: the words of every segment.
        shared: equal words share an anchor; else every segment has its own, because what stands before it counts.

    Returns:
        Words of each anchor, and the anchor of each segment.
    """
    if not shared:
        return [text.strip() for text in texts_S], np.arange(len(texts_S), dtype=np.int32)
    number_of: dict[str, int] = {}
    anchors_S = [number_of.setdefault(text.strip(), len(number_of)) for text in texts_S]
    return list(number_of), np.array(anchors_S, dtype=np.int32)


def write_rows(
    folder: Path,
    *,
    user_index_R: Int32Array,
    basket_R: Int32Array,
    counts_R: Int64Array,
    anchors_S: Int32Array,
    texts: Sequence[str],
) -> None:
    """Write which anchors each row has, in order, and what each anchor says.

    Args:
        folder: the artifact.
        user_index_R: user of each row.
        basket_R: basket of each row; rows are sorted by user, then basket.
        counts_R: steps of each row.
        anchors_S: anchors of all steps, row after row.
        texts: the words of each anchor.
    """
    first_R1 = np.concatenate([[0], np.cumsum(counts_R)]).astype(np.int64)
    rows: dict[str, NDArray[Any]] = {
        "user_index": user_index_R,
        "basket": basket_R,
        "first": first_R1,
        "anchor": anchors_S,
    }
    save_file(rows, folder / ROWS_FILE)
    numbers = np.arange(len(texts), dtype=np.int32)
    pl.DataFrame({"anchor": numbers, "text": pl.Series(list(texts), dtype=pl.String)}).write_parquet(
        folder / TEXTS_FILE
    )


def write_none(folder: Path, rows: Sequence[TrainingRow], *, hidden_size: int) -> None:
    """Write the artifact of training rows without any anchor.

    Args:
        folder: the artifact.
        rows: training rows, sorted by user, then basket.
        hidden_size: of the backbone.
    """
    _reserve(folder / ANCHORS_FILE, (1, hidden_size))  # zeros, which no row names: the file has at least one
    write_rows(
        folder,
        user_index_R=np.array([row.user_index for row in rows], dtype=np.int32),
        basket_R=np.array([row.basket for row in rows], dtype=np.int32),
        counts_R=np.zeros(len(rows), dtype=np.int64), anchors_S=np.zeros(0, dtype=np.int32), texts=(),
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True, eq=False)
class AnchorStore:
    """The anchors of every training row.

    Attributes:
        vectors_AD: float32, memory-mapped, read-only.
        user_index_R: user of each row.
        basket_R: basket of each row.
        first_R1: steps of row r are `anchors_S[first_R1[r] : first_R1[r + 1]]`.
        anchors_S: anchors of all steps.
        max_depth: steps of a row at most, as the stage was told.
        folder: the artifact.
    """

    vectors_AD: Float32Array
    user_index_R: Int32Array
    basket_R: Int32Array
    first_R1: Int64Array
    anchors_S: Int32Array
    max_depth: int
    folder: Path

    @classmethod
    def load(cls, folder: Path) -> "AnchorStore":
        """Open the `anchor` artifact.

        Raises:
            ArtifactError: a file is missing or damaged.
        """
        vectors_AD = _map(folder / ANCHORS_FILE)
        path = folder / ROWS_FILE
        try:
            rows = load_file(path)
            store = cls(
                vectors_AD=vectors_AD,
                user_index_R=rows["user_index"],
                basket_R=rows["basket"],
                first_R1=rows["first"],
                anchors_S=rows["anchor"],
                max_depth=int(read_json(folder / "summary.json")["max_depth"]),
                folder=folder,
            )
        except (OSError, SafetensorError, KeyError) as error:
            raise ArtifactError(f"{path}: not readable ({error}); run the stage 'anchor' again") from None
        if len(store.anchors_S) and int(store.anchors_S.max()) >= len(vectors_AD):
            raise ArtifactError(f"{path}: names anchors that do not exist; run the stage 'anchor' again")
        return store

    def require(self, wanted: str) -> None:
        """Refuse what needs anchors where there are none.

        Raises:
            ConfigError: the stage `anchor` made none.
        """
        if read_json(self.folder / "summary.json").get("source") == "none":
            raise ConfigError(
                f"{wanted} needs anchors, and {self.folder} has none; set latent_sft.loop.depth to a number, "
                "latent_sft.alignment=none and rl.terminal_share=0, or give the items text and anchor.source"
            )

    def steps(self, user_index: int, basket: int) -> Int32Array:
        """Anchors of a row, first step first; empty for a row without a rationale, and for no row at all."""
        row = int(self._row_of(np.array([user_index]), np.array([basket]))[0])
        if row < 0:
            return self.anchors_S[:0]
        return self.anchors_S[self.first_R1[row] : self.first_R1[row + 1]]

    def num_steps(self, user_index_Q: NDArray[np.integer], basket_Q: NDArray[np.integer]) -> Int64Array:
        """Steps of many rows at once, int64 [Q]; 0 where there is no rationale or no such row."""
        row_Q = self._row_of(user_index_Q, basket_Q)
        counts_Q = self.first_R1[row_Q + 1] - self.first_R1[row_Q]
        return np.asarray(np.where(row_Q < 0, 0, counts_Q), dtype=np.int64)

    @property
    def typical_depth(self) -> int:
        """Mean number of steps of the rows that have any, rounded; 1 where none has."""
        counts_R = np.diff(self.first_R1)
        return max(1, round(float(counts_R[counts_R > 0].mean()))) if counts_R.any() else 1

    def text_of(self, anchor: int) -> str:
        """The words that an anchor stands for."""
        text: str = self._texts[anchor]
        return text

    def nearest(self, vectors_QD: Float32Array, k: int) -> tuple[Int64Array, Float32Array]:
        """Anchors nearest to hidden states.

        By cosine distance after the mean anchor is subtracted from both sides: hidden states share a large common part,
        next to which everything would look alike. (The loss compares by divergence of softmaxes, which is too slow for
        a search over all anchors.)

        Args:
            vectors_QD: hidden states of the backbone.
            k: neighbours wanted; fewer are given where there are fewer anchors.

        Returns:
            Anchors int64 [Q, K], nearest first, and their distances float32 [Q, K]: 0 same direction, 1 unrelated.
        """
        queries_QD = unit(np.asarray(vectors_QD, dtype=np.float32) - self._mean_D)
        best = np.zeros((len(queries_QD), 0), dtype=np.int64)
        distances = np.zeros((len(queries_QD), 0), dtype=np.float32)
        for start in range(0, len(self.vectors_AD) if len(self.anchors_S) else 0, _CHUNK):
            chunk_AD = unit(self.vectors_AD[start : start + _CHUNK] - self._mean_D)
            found_QA = 1.0 - queries_QD @ chunk_AD.T
            numbers = np.broadcast_to(np.arange(start, start + len(chunk_AD)), found_QA.shape)
            best, distances = np.hstack([best, numbers]), np.hstack([distances, found_QA])
            if distances.shape[1] > k:
                kept = np.argpartition(distances, k - 1, axis=1)[:, :k]
                best = np.take_along_axis(best, kept, axis=1)
                distances = np.take_along_axis(distances, kept, axis=1)
        order = np.lexsort((best, distances), axis=1)
        # Rounding must not make a cosine larger than 1.
        return np.take_along_axis(best, order, axis=1), np.take_along_axis(distances, order, axis=1).clip(
            min=0
        )

    def _row_of(self, users: NDArray[np.integer], baskets: NDArray[np.integer]) -> Int64Array:
        wanted = users.astype(np.int64) << 32 | baskets.astype(np.int64)
        if len(self._keys) == 0:
            return np.full(len(wanted), -1, dtype=np.int64)
        row = np.minimum(np.searchsorted(self._keys, wanted), len(self._keys) - 1)
        return np.where(self._keys[row] == wanted, row, -1)

    @cached_property
    def _keys(self) -> Int64Array:
        return self.user_index_R.astype(np.int64) << 32 | self.basket_R.astype(np.int64)

    @cached_property
    def _mean_D(self) -> Float32Array:
        return np.asarray(self.vectors_AD.mean(axis=0, dtype=np.float64), dtype=np.float32)

    @cached_property
    def _texts(self) -> pl.Series:
        path = self.folder / TEXTS_FILE
        try:
            return pl.read_parquet(path)["text"]
        except (OSError, pl.exceptions.PolarsError) as error:
            raise ArtifactError(f"{path}: not readable ({error}); run the stage 'anchor' again") from None
