"""Some rows of many: which, and what is written for them."""

from types import SimpleNamespace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lasar.cot.rationale import Rationale
from lasar.cot.rows import TrainingRow
from lasar.cot.teachers import write_some


@given(count=st.integers(0, 30), max_rows=st.integers(0, 40), seed=st.integers(0, 5))
def test_some_rows_are_written_as_they_would_be_among_all(count, max_rows, seed):
    nothing = np.zeros(0, dtype=np.int32)
    asked = [TrainingRow(0, number, nothing, nothing, nothing) for number in range(count)]
    echo = SimpleNamespace(write=lambda some: [Rationale(f"Basket {row.basket}.", "ok") for row in some])
    written = write_some(echo, asked, max_rows=max_rows, seed=seed)
    chosen = [number for number, rationale in enumerate(written) if rationale.outcome == "ok"]
    assert len(chosen) == (min(count, max_rows) if max_rows else count)
    assert [written[number].text for number in chosen] == [f"Basket {number}." for number in chosen]
    assert {rationale for number, rationale in enumerate(written) if number not in chosen} <= {
        Rationale("", "over_budget")
    }
    assert written == write_some(echo, asked, max_rows=max_rows, seed=seed)
