"""A small shop, written by hand in a second: forty items with texts, three users, an untrained model that reasons."""

import hashlib
import importlib.util
import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.numpy import save_file

if importlib.util.find_spec("fastapi") is None:  # the extra: pip install 'lasar[serve]'
    collect_ignore_glob = ["test_*.py"]

TOKEN = "a-token-that-is-long-enough"
COLOURS = ("red", "blue", "green", "white", "black")
THINGS = ("teapot", "lantern", "lunch bag", "cake stand", "clock", "mug", "candle", "garland")
TITLES = [f"{colour.upper()} {thing.upper()}" for thing in THINGS for colour in COLOURS]
ITEMS = [f"sku/{number}" if number == 7 else f"sku{number}" for number in range(len(TITLES))]
HISTORIES = {"ann": [[3, 4], [5]], "bob": [[6], [7]], "cid": [[8, 9, 10]]}
WIDTH = 8  # of the collaborative part


def manifest(folder, config):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    outputs = {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
    }
    facts = {"stage": folder.name, "format_version": 1, "fingerprint": "f", "config": config, "inputs": {}}
    (folder / "manifest.json").write_text(json.dumps(facts | {"outputs": outputs}))


def write_prepare(folder):
    folder.mkdir()
    columns = {"item_id": ITEMS, "title": TITLES, "text": TITLES}
    index = pl.Series(range(len(ITEMS)), dtype=pl.Int32)
    pl.DataFrame({"item_index": index, **columns}).write_parquet(folder / "items.parquet")
    users = pl.Series(range(len(HISTORIES)), dtype=pl.Int32)
    pl.DataFrame({"user_index": users, "user_id": list(HISTORIES)}).write_parquet(folder / "users.parquet")
    rows = [
        (user, item, basket)
        for user, orders in enumerate(HISTORIES.values())
        for basket, order in enumerate(orders)
        for item in order
    ]
    pl.DataFrame(
        {
            "user_index": pl.Series([row[0] for row in rows], dtype=pl.Int32),
            "item_index": pl.Series([row[1] for row in rows], dtype=pl.Int32),
            "basket": pl.Series([row[2] for row in rows], dtype=pl.Int32),
            "split": pl.Series([0] * len(rows), dtype=pl.Int8),
        }
    ).write_parquet(folder / "interactions.parquet")
    facts = {"num_users": 3, "num_items": len(ITEMS), "split": "last_basket", "train_targets": "all"}
    (folder / "summary.json").write_text(json.dumps(facts))
    manifest(folder, {})


def write_embed(folder):
    from lasar.sid.fusion import concatenate
    from lasar.sid.ngram_encoder import encode_ngrams

    folder.mkdir()
    text = encode_ngrams(TITLES)
    company = np.random.default_rng(0).normal(size=(len(ITEMS), WIDTH)).astype(np.float32)
    company /= np.linalg.norm(company, axis=1, keepdims=True)
    vectors = concatenate([(2.0, text), (0.5, company)])
    save_file({"item_embeddings": vectors}, folder / "embeddings.safetensors")
    facts = {
        "kind": "fused",
        "text_width": text.shape[1],
        "collaborative_width": WIDTH,
        "num_items": len(ITEMS),
    }
    (folder / "summary.json").write_text(json.dumps(facts))
    config = {"kind": "fused", "text_model": "ngrams", "max_tokens": 128, "batch_size": 8, "normalise": "l2"}
    manifest(folder, config | {"text_weight": 2.0, "collaborative_weight": 0.5})
    return vectors


def write_quantize(folder, vectors):
    from lasar.sid.assignment import assign_items
    from lasar.sid.catalog import SidCatalog
    from lasar.sid.quantizers import QUANTIZERS, save_quantizer

    folder.mkdir()
    quantizer = QUANTIZERS["rq_kmeans"](
        num_levels=3, codebook_size=6, seed=0, balanced=True, num_iterations=5
    )
    quantizer.fit(vectors)
    SidCatalog(assign_items(quantizer, vectors).codes_IL, 6).save(folder)
    save_quantizer(quantizer, folder)
    manifest(folder, {})


def make_reasoner():
    from lasar.model.backbone import build_preset
    from lasar.model.reasoner import LatentReasoner, ReasoningSettings
    from lasar.prompts.vocabulary import Vocabulary

    vocabulary = Vocabulary(num_levels=3, codebook_size=6, orders=True, max_history=12)
    torch.manual_seed(0)
    backbone = build_preset("tiny", vocabulary=vocabulary, seed=1)
    with torch.no_grad():
        for matrix in backbone.model.layers.parameters():
            matrix.mul_(8 if matrix.ndim == 2 else 1)  # else histories and steps hardly change anything
    settings = ReasoningSettings(max_depth=3, head_width=8)
    return LatentReasoner(backbone, vocabulary=vocabulary, settings=settings).eval()


def write_anchor(folder, hidden_size):
    from lasar.cot.anchors import write_rows

    folder.mkdir()
    vectors = np.random.default_rng(0).normal(size=(6, hidden_size)).astype(np.float32)
    save_file({"anchors": vectors}, folder / "anchors.safetensors")
    write_rows(
        folder, user_index_R=np.zeros(1, np.int32), basket_R=np.zeros(1, np.int32),
        counts_R=np.array([1]), anchors_S=np.zeros(1, np.int32), texts=[f"Thought {n}." for n in range(6)],
    )  # fmt: skip
    (folder / "summary.json").write_text(json.dumps({"max_depth": 3}))
    manifest(folder, {})


def write_run(run: Path) -> Path:
    from lasar.model.reasoner import save_reasoner

    run.mkdir(exist_ok=True)
    write_prepare(run / "prepare")
    write_quantize(run / "quantize", write_embed(run / "embed"))
    (run / "latent_sft").mkdir()
    reasoner = make_reasoner()
    save_reasoner(reasoner, run / "latent_sft")
    write_anchor(run / "anchor", reasoner.backbone.config.hidden_size)
    return run


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("shop") / "run")


@pytest.fixture(scope="session")
def recommender(run):
    from lasar import Recommender

    return Recommender.load(run)


@pytest.fixture
def database(tmp_path):
    return f"sqlite:///{tmp_path / 'state.sqlite'}"


@pytest.fixture
def make_service(run, database):
    """Services on one fresh database; more than one of them are like workers of a server."""
    from lasar.serving.service import Service
    from lasar.serving.settings import Settings

    made = []

    def make(**settings):
        defaults = {
            "run": run,
            "database": database,
            "admin_token": TOKEN,
            "timeout_ms": 60_000,
            "threads": 1,
        }
        made.append(Service(Settings(**(defaults | settings))))
        return made[-1]

    yield make
    for service in made:
        service.close()


@pytest.fixture
def make_client(make_service):
    """HTTP clients of started apps."""
    import contextlib

    from starlette.testclient import TestClient

    from lasar.serving.app import create_app

    with contextlib.ExitStack() as stack:

        def make(**settings):
            app = create_app(make_service(**settings))
            return stack.enter_context(TestClient(app, raise_server_exceptions=False))

        yield make


@pytest.fixture
def client(make_client):
    return make_client(show_users=True)


@pytest.fixture
def admin(client):
    """The same client with the token."""
    client.headers["authorization"] = f"Bearer {TOKEN}"
    return client


@pytest.fixture(scope="session")
def shop():
    """Names of the planted things."""
    from types import SimpleNamespace

    return SimpleNamespace(items=ITEMS, titles=TITLES, histories=HISTORIES, token=TOKEN, write_run=write_run)
