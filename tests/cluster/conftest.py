"""A small trained run, and Ray where it is installed."""

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lasar.cli import app

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    pytest.importorskip("ray", reason="needs Ray: make cluster")
    folder = tmp_path_factory.mktemp("clustered")
    script = ROOT / "examples" / "make_mini_data.py"
    subprocess.run([sys.executable, str(script), str(folder / "mini")], check=True, capture_output=True)
    (folder / "recipe.yaml").write_text(
        f"""
run_dir: {folder / "run"}
stages: [prepare, embed, quantize, sft]
prepare:
  dataset: mini
  split: last_basket
  source: {folder / "mini" / "events.csv"}
  items: {folder / "mini" / "items.csv"}
embed: {{kind: collaborative, collaborative_width: 8}}
quantize: {{num_levels: 2, codebook_size: 16}}
sft: {{backbone: tiny, epochs: 1, batch_tokens: 1024, max_history: 20, precision: fp32}}
"""
    )
    done = CliRunner().invoke(app, ["run", str(folder / "recipe.yaml")])
    assert done.exit_code == 0, done.output
    return folder / "run"
