"""A small trained run, where Ray is installed."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def run(mini_run: Path) -> Path:
    pytest.importorskip("ray", reason="needs Ray: make cluster")
    return mini_run
