"""What every test gets: one thread, no network, no model hub, no display."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

# Before anything imports torch or transformers. Two OpenMP threads collapse when another process is busy.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"

# Wall-clock deadlines fail on a busy machine; what a test finds on CI must be found again at home.
hypothesis.settings.register_profile(
    "lasar", deadline=None, derandomize="CI" in os.environ, print_blob=True, max_examples=50
)
hypothesis.settings.load_profile("lasar")


@pytest.fixture(autouse=True, scope="session")
def _no_network() -> Iterator[None]:
    """Refuse every connection that leaves the machine: a test that needs one is a broken test."""
    connect = socket.socket.connect

    def connect_locally(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6):
            host = str(address[0])
            if host not in ("localhost", "::1") and not host.startswith("127."):
                raise ConnectionRefusedError(f"tests have no network, but one connects to {address}")
        connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", connect_locally)
        yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of the real data sets, from the environment variable LASAR_DATA; the test skips without it."""
    folder = os.environ.get("LASAR_DATA")
    if not folder:
        pytest.skip("needs real data: set LASAR_DATA to the folder that holds it")
    if not Path(folder).is_dir():
        pytest.skip(f"needs real data: LASAR_DATA={folder} is not a folder")
    return Path(folder)


@pytest.fixture(scope="session")
def mini_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder of the made-up shop with a tiny model of one epoch, for whoever needs users to score."""
    from typer.testing import CliRunner

    from lasar.cli import app

    folder = tmp_path_factory.mktemp("mini")
    script = Path(__file__).parents[1] / "examples" / "make_mini_data.py"
    subprocess.run([sys.executable, str(script), str(folder)], check=True, capture_output=True)
    (folder / "recipe.yaml").write_text(
        f"""
run_dir: {folder / "run"}
stages: [prepare, embed, quantize, sft]
prepare: {{dataset: mini, split: last_basket, source: {folder / "events.csv"}, items: {folder / "items.csv"}}}
embed: {{kind: collaborative, collaborative_width: 8}}
quantize: {{num_levels: 2, codebook_size: 16}}
sft: {{backbone: tiny, epochs: 1, batch_tokens: 1024, max_history: 20, precision: fp32}}
"""
    )
    done = CliRunner().invoke(app, ["run", str(folder / "recipe.yaml")])
    assert done.exit_code == 0, done.output
    return folder / "run"
