"""The catalogue: which codes stand for which item, unique in both directions.

I items, L levels, C codebook size.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from lasar.artifacts import read_json, write_json
from lasar.errors import ArtifactError, DataError, UnknownItemError

CODES_FILE = "catalog.safetensors"
FACTS_FILE = "catalog.json"


class SidCatalog:
    """Item index <-> semantic ID. Two items never share one ID.

    Attributes:
        codes_IL: int32 [num_items, num_levels], read-only; row i is the ID of item i.
        codebook_size: codes per level; every code is in 0..codebook_size-1.
    """

    codes_IL: NDArray[np.int32]
    codebook_size: int

    def __init__(self, codes_IL: ArrayLike, codebook_size: int) -> None:
        """Check and keep the codes (a copy).

        Raises:
            DataError: not a table of integers, a code out of range, or two items with one ID.
        """
        codes = np.asarray(codes_IL)
        if codes.ndim != 2 or codes.shape[1] < 1 or not np.issubdtype(codes.dtype, np.integer):
            raise DataError(f"codes must be integers [items, levels], got {codes.dtype} {list(codes.shape)}")
        _check_range(codes, codebook_size)
        self.codes_IL = codes.astype(np.int32, order="C", copy=True)
        self.codes_IL.flags.writeable = False
        self.codebook_size = int(codebook_size)
        self._item_of = {row.tobytes(): item for item, row in enumerate(self.codes_IL)}
        if len(self._item_of) < len(codes):
            raise DataError(_first_duplicate(self.codes_IL))

    @property
    def num_items(self) -> int:
        """Number of items."""
        return int(self.codes_IL.shape[0])

    @property
    def num_levels(self) -> int:
        """Codes per item."""
        return int(self.codes_IL.shape[1])

    def item_of(self, codes: Sequence[int] | NDArray[np.integer]) -> int:
        """Index of the item with this ID.

        Raises:
            UnknownItemError: no item has it.
        """
        item = self._item_of.get(np.asarray(codes, dtype=np.int32).tobytes())
        if item is None:
            raise UnknownItemError(f"no item has the semantic ID {[int(code) for code in codes]}")
        return item

    def with_items(self, codes: ArrayLike) -> "SidCatalog":
        """A new catalogue with these items appended; existing items keep index and ID.

        Args:
            codes: integers [new items, num_levels].

        Raises:
            DataError: wrong number of levels, out of range, or an ID that is taken.
        """
        new = np.asarray(codes)
        if new.ndim != 2 or new.shape[1] != self.num_levels:
            raise DataError(f"new codes must be [items, {self.num_levels}], got {list(new.shape)}")
        return SidCatalog(np.concatenate([self.codes_IL, new]), self.codebook_size)

    def save(self, folder: Path) -> None:
        """Write `catalog.safetensors` and `catalog.json` into an existing folder."""
        save_file({"codes": self.codes_IL}, folder / CODES_FILE)
        facts = {
            "num_levels": self.num_levels,
            "codebook_size": self.codebook_size,
            "num_items": self.num_items,
        }
        write_json(folder / FACTS_FILE, facts)

    @classmethod
    def load(cls, folder: Path) -> "SidCatalog":
        """Read what `save` wrote.

        Raises:
            ArtifactError: a file is missing, damaged, or disagrees with the other.
        """
        facts = read_json(folder / FACTS_FILE)
        path = folder / CODES_FILE
        try:
            codes = load_file(path)["codes"]
            expected = [facts["num_items"], facts["num_levels"]]
            if list(codes.shape) != expected:
                raise ArtifactError(f"{path}: codes are {list(codes.shape)}, {FACTS_FILE} says {expected}")
            return cls(codes, facts["codebook_size"])
        except (OSError, SafetensorError, KeyError, TypeError, DataError) as error:
            raise ArtifactError(f"{path}: not a usable catalogue ({error}); run quantize again") from None


def _check_range(codes_IL: NDArray[np.integer], codebook_size: int) -> None:
    bad = (codes_IL < 0) | (codes_IL >= codebook_size)
    if bad.any():
        item, level = (int(n) for n in np.argwhere(bad)[0])
        raise DataError(
            f"item {item}, level {level}: code {codes_IL[item, level]} is not in 0..{codebook_size - 1}"
        )


def _first_duplicate(codes_IL: NDArray[np.int32]) -> str:
    seen: dict[bytes, int] = {}
    for item, row in enumerate(codes_IL):
        other = seen.setdefault(row.tobytes(), item)
        if other != item:
            return f"items {other} and {item} share the semantic ID {row.tolist()}"
    raise AssertionError("called without a duplicate")
