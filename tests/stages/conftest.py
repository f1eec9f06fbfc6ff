"""A finished run of a made-up shop, up to training: what evaluate and report read."""

import json
import sys
import types
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from lasar.artifacts import FORMAT_VERSION, file_sha256, write_json
from lasar.decoding.ranked import Ranked

NUM_USERS, NUM_ITEMS = 60, 40


def finish(folder: Path, *, seconds: float = 12.0) -> None:
    """Write the manifest that makes a folder an artifact."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json")
    outputs = {path.relative_to(folder).as_posix(): file_sha256(path) for path in files}
    manifest = {"stage": folder.name, "format_version": FORMAT_VERSION, "fingerprint": "made up", "seed": 0}
    write_json(folder / "manifest.json", {**manifest, "inputs": {}, "outputs": outputs, "seconds": seconds})


@pytest.fixture
def seal():
    """Make a folder an artifact again after a test has changed it."""
    return finish


def write_prepare(folder: Path, *, split_kind: str) -> None:
    """Users walk the items in order from a random start; the last basket is test, the one before it valid."""
    rng = np.random.default_rng(0)
    size = 2 if split_kind == "last_basket" else 1
    rows = []
    for user in range(NUM_USERS):
        num_baskets = int(rng.integers(3, 9))
        start = int(rng.integers(NUM_ITEMS - 5))
        for basket in range(num_baskets):
            split = max(0, basket - num_baskets + 3)
            rows += [(user, (start + basket * size + n) % NUM_ITEMS, basket, split) for n in range(size)]
    folder.mkdir(parents=True)
    columns = {"user_index": pl.Int32, "item_index": pl.Int32, "basket": pl.Int32, "split": pl.Int8}
    events = pl.DataFrame(rows, schema=columns, orient="row")
    events.with_columns(timestamp=pl.int_range(pl.len(), dtype=pl.Int64)).write_parquet(
        folder / "interactions.parquet"
    )
    titles = [f"Tea & <Towel> no. {item}" if item else "" for item in range(NUM_ITEMS)]
    items = {
        "item_index": np.arange(NUM_ITEMS, dtype=np.int32),
        "item_id": [f"SKU{i:03}" for i in range(NUM_ITEMS)],
    }
    pl.DataFrame({**items, "title": titles, "text": titles}).write_parquet(folder / "items.parquet")
    users = {
        "user_index": np.arange(NUM_USERS, dtype=np.int32),
        "user_id": [f"user-{u}" for u in range(NUM_USERS)],
    }
    pl.DataFrame(users).write_parquet(folder / "users.parquet")
    summary = {"dataset": "tea_shop", "split": split_kind, "train_targets": "all", "num_users": NUM_USERS,
               "num_items": NUM_ITEMS, "num_interactions": len(rows)}  # fmt: skip
    write_json(folder / "summary.json", summary)
    finish(folder)


def write_run(run_dir: Path, *, split_kind: str = "leave_one_out") -> Path:
    """Write prepare, quantize and sft artifacts."""
    write_prepare(run_dir / "prepare", split_kind=split_kind)
    codes = {
        "utilisation": [1.0, 0.5],
        "entropy_bits": [3.0, 1.5],
        "conditional_bits": [3.0, 1.2],
        "prefix_sharing": [0.5, 0.1],
        "collision_rate": 0.0,
    }
    (run_dir / "quantize").mkdir()
    quality = {
        "kind": "rq_kmeans",
        "num_items": NUM_ITEMS,
        "num_levels": 2,
        "codebook_size": 8,
        "codes": codes,
        "collision_rate_before": 0.05,
        "relative_error_before": 0.31,
        "relative_error_after": 0.32,
    }
    write_json(run_dir / "quantize" / "quality.json", quality)
    finish(run_dir / "quantize")
    (run_dir / "sft").mkdir()
    records = [{"epoch": e, "step": 10 * e, "loss": 3.0 / e, "valid_ndcg@10": 0.1 * e, "valid_hr@10": 0.2 * e}
               for e in (1, 2, 3)]  # fmt: skip
    (run_dir / "sft" / "curve.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    finish(run_dir / "sft", seconds=34.5)
    return run_dir


class FakeRecommender:
    """Ranks the items that follow the last one, best first; every other user gets nonsense."""

    calls: list[int] = []  # noqa: RUF012 (shared on purpose: the test reads what the stage's instance did)
    fail_after: int | None = None
    ranker = types.SimpleNamespace(engine="fused")

    @classmethod
    def from_artifacts(cls, *, prepare, quantize, model, device, precision):
        """Check what the stage passes."""
        assert (prepare.name, quantize.name, model.name) == ("prepare", "quantize", "sft")
        assert (device, precision) == ("auto", "fp32")
        return cls()

    def rank(self, histories, baskets, *, k, beam_width, exclude_seen=False, depth="auto", seed=0):
        """Follow the planted rule for odd starts only."""
        if self.fail_after is not None and len(self.calls) >= self.fail_after:
            raise KeyboardInterrupt
        self.calls.append(len(histories))
        assert len({len(history) for history in histories}) <= 6
        items = np.full((len(histories), k), -1, dtype=np.int32)
        scores = np.full((len(histories), k), -np.inf, dtype=np.float32)
        for row, history in enumerate(histories):
            step = 1 if history[0] % 2 else 20
            ranked = (history[-1] + step + np.arange(k)) % NUM_ITEMS
            if exclude_seen:
                ranked = ranked[~np.isin(ranked, history)]
            items[row, : len(ranked)] = ranked
            scores[row, : len(ranked)] = -np.arange(len(ranked))
        # By itself it thinks as long as the history; forced, as it is told.
        chosen = [len(history) for history in histories] if depth == "auto" else [depth] * len(histories)
        return Ranked(items, scores, np.array(chosen, np.int32))


@pytest.fixture
def fake_recommender(monkeypatch):
    """Stand in for the trained model."""
    recommender = type("Fresh", (FakeRecommender,), {"calls": [], "fail_after": None})
    module = types.ModuleType("lasar.recommender")
    module.Recommender = recommender
    monkeypatch.setitem(sys.modules, "lasar.recommender", module)
    return recommender


@pytest.fixture
def sequence_run(tmp_path):
    """A run with one true item per user."""
    return write_run(tmp_path / "run")


@pytest.fixture
def order_run(tmp_path):
    """A run with orders, so several true items per user."""
    return write_run(tmp_path / "orders", split_kind="last_basket")
