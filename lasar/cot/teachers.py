"""The teacher seam: training rows to rationales, one protocol, one literal dict of kinds.

A teacher may look at a row's targets: it writes for training rows only, and nothing it writes is read at inference
(METHOD: the paper's teacher knows the answer and reasons as if it did not). It never names them.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from lasar.cot.catalogue_teacher import CatalogueTeacher
from lasar.cot.endpoint_teacher import EndpointTeacher
from lasar.cot.rationale import Rationale
from lasar.cot.rows import TrainingRow


class Teacher(Protocol):
    """What a teacher kind provides. Its constructor takes keyword arguments only."""

    @property
    def name(self) -> str:
        """How artifacts and results name it: `catalogue`, or `endpoint:` and the model."""

    def write(self, rows: Sequence[TrainingRow]) -> list[Rationale]:
        """One rationale per row, in the order of `rows`; a row's text depends on no other row."""


TEACHERS: dict[str, Callable[..., Teacher]] = {"catalogue": CatalogueTeacher, "endpoint": EndpointTeacher}


def write_some(teacher: Teacher, rows: Sequence[TrainingRow], *, max_rows: int, seed: int) -> list[Rationale]:
    """One rationale per row, of which at most `max_rows` (0: all), drawn by the seed, are asked for.

    The others are `over_budget`. Which rows are drawn depends on their number alone, so teachers can be compared on the
    same rows.
    """
    if not 0 < max_rows < len(rows):
        return teacher.write(rows)
    drawn = np.sort(np.random.default_rng(seed).choice(len(rows), size=max_rows, replace=False)).tolist()
    rationales = [Rationale("", "over_budget")] * len(rows)
    for number, rationale in zip(drawn, teacher.write([rows[number] for number in drawn]), strict=True):
        rationales[number] = rationale
    return rationales
