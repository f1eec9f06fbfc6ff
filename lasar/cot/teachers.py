"""The teacher seam: training rows to rationales, one protocol, one literal dict of kinds.

A teacher may look at a row's targets: it writes for training rows only, and nothing it writes is read at inference
(METHOD: the paper's teacher knows the answer and reasons as if it did not). It never names them.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

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
