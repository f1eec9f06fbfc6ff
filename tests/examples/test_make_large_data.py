"""The large made-up shop in small: parts in time order, ids that meet, and two stages that take it."""

import subprocess
import sys
from pathlib import Path

import polars as pl

from lasar.artifacts import run_stage
from lasar.config import load_recipe
from lasar.stages import STAGES

ROOT = Path(__file__).parents[2]


def test_a_folder_of_parts_and_given_vectors_become_semantic_ids(tmp_path):
    script = ROOT / "examples" / "make_large_data.py"
    subprocess.run(
        [sys.executable, str(script), str(tmp_path), "--items", "60", "--users", "80", "--events", "3000"],
        check=True, capture_output=True,
    )  # fmt: skip
    events = pl.read_parquet(tmp_path / "events")
    assert len(events) == 3000
    assert events["timestamp"].is_sorted()
    assert set(events["item_id"]) <= set(pl.read_parquet(tmp_path / "items.parquet")["item_id"])
    (tmp_path / "recipe.yaml").write_text(
        f"""
run_dir: {tmp_path / "run"}
stages: [prepare, embed, quantize]
prepare: {{source: {tmp_path / "events"}, items: {tmp_path / "items.parquet"}}}
embed: {{kind: given, vectors: {tmp_path / "vectors.parquet"}}}
quantize: {{num_levels: 2, codebook_size: 16}}
"""
    )
    recipe = load_recipe(tmp_path / "recipe.yaml", sections={n: m.Config for n, m in STAGES.items()})
    for stage in recipe.stages:
        run_stage(stage, STAGES[stage], recipe)
    assert (tmp_path / "run" / "quantize" / "manifest.json").is_file()
