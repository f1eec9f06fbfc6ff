import io
import json

import numpy as np
import polars as pl
import pytest
from rich.console import Console
from safetensors.numpy import save_file

from lasar.artifacts import StageContext
from lasar.config import parse_section
from lasar.errors import ArtifactError, ConfigError, DataError
from lasar.sid.assignment import assign_new_items
from lasar.sid.catalog import SidCatalog
from lasar.sid.quantizers import load_quantizer
from lasar.stages import quantize

NUM_ITEMS = 60
KINDS = {
    "rq_kmeans": {"kind": "rq_kmeans"},
    "rq_vae": {"kind": "rq_vae", "num_epochs": 4, "latent_width": 4, "hidden_widths": [16]},
}


@pytest.fixture
def upstream(tmp_path):
    """An `embed` artifact with 60 items, ten of them equal, and their `prepare` artifact."""
    for name in ("embed", "prepare"):
        (tmp_path / name).mkdir()
    vectors = np.random.default_rng(0).normal(size=(NUM_ITEMS, 6)).astype(np.float32)
    vectors[50:] = vectors[50]
    save_file({"item_embeddings": vectors}, tmp_path / "embed" / "embeddings.safetensors")
    items = {"item_id": [f"i{n}" for n in range(NUM_ITEMS)], "index": [str(n + 1) for n in range(NUM_ITEMS)]}
    pl.DataFrame(items).write_parquet(tmp_path / "prepare" / "items.parquet")
    return tmp_path, vectors


def run(folder, name="out", **values):
    config = parse_section(quantize.Config, {"num_levels": 3, "codebook_size": 8, **values}, where="quantize")
    output = folder / name
    output.mkdir()
    inputs = {upstream: folder / upstream for upstream in quantize.inputs(config)}
    context = StageContext(stage="quantize", seed=3, inputs=inputs, output=output, scratch=folder)
    quantize.run(config, context)
    return output, json.loads((output / "quality.json").read_text())


def shown(folder):
    console = Console(width=140, file=io.StringIO())
    quantize.show(folder, console)
    return console.file.getvalue()


@pytest.mark.parametrize("dedup", ["last_level", "extra_level"])
@pytest.mark.parametrize("kind", KINDS)
def test_unique_ids_and_a_quantizer_that_gives_more(upstream, kind, dedup):
    folder, vectors = upstream
    output, quality = run(folder, dedup=dedup, **KINDS[kind])
    catalog = SidCatalog.load(output)
    assert (catalog.num_items, catalog.num_levels, catalog.codebook_size) == (NUM_ITEMS, 3, 8)
    assert quality["codes"]["collision_rate"] == 0
    assert quality["collision_rate_before"] >= 10 / NUM_ITEMS
    assert sum(quality["moved_items"]) >= 9  # of ten equal items nine must move
    assert quality["relative_error_before"] > 0
    if kind == "rq_kmeans":  # whose costs are distances between the vectors themselves
        assert quality["relative_error_after"] >= quality["relative_error_before"]
    assert (output / "quality.png").read_bytes().startswith(b"\x89PNG")

    quantizer = load_quantizer(output)
    kept = quantizer.num_levels
    assert kept == 3 - (dedup == "extra_level")
    first = quantizer.encode(vectors)
    agree = (catalog.codes_IL[:, :kept] == first).all(axis=1)
    assert agree.sum() >= NUM_ITEMS - sum(quality["moved_items"])
    larger = catalog.with_items(assign_new_items(quantizer, catalog, vectors[45:55]))
    assert larger.num_items == NUM_ITEMS + 10
    assert "items sharing an ID" in shown(output)


@pytest.mark.parametrize("kind", KINDS)
def test_two_runs_give_the_same_bytes(upstream, kind):
    folder, _ = upstream
    first, _ = run(folder, "first", **KINDS[kind])
    second, _ = run(folder, "second", **KINDS[kind])
    names = sorted(path.name for path in first.iterdir())
    assert names == [
        "catalog.json", "catalog.safetensors", "quality.json", "quality.png",
        "quantizer.json", "quantizer.safetensors",
    ]  # fmt: skip
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_codebooks_can_be_learned_from_a_sample(upstream):
    folder, _ = upstream
    output, quality = run(folder, fit_items=30)
    assert quality["fitted_items"] == 30
    assert "learned from" in shown(output)
    codes = SidCatalog.load(output).codes_IL
    assert len(codes) == len(np.unique(codes, axis=0)) == NUM_ITEMS
    again, _ = run(folder, "again", fit_items=30)
    assert (again / "catalog.safetensors").read_bytes() == (output / "catalog.safetensors").read_bytes()
    everything, quality = run(folder, "all", fit_items=NUM_ITEMS)
    assert quality["fitted_items"] == NUM_ITEMS
    assert "learned from" not in shown(everything)


def test_published_ids_stand_beside_ours(upstream):
    folder, _ = upstream
    path = folder / "sid_theirs.jsonl"
    rows = [{"id": n + 1, "sid": [f"<a_{n // 8}>", f"<b_{n % 8}>"]} for n in range(40)]
    rows[1]["sid"] = rows[0]["sid"]  # a collision of their own
    path.write_text("\n".join(map(json.dumps, rows)))
    output, quality = run(folder, compare_with=str(path))
    compared = quality["compared"]
    assert (compared["name"], compared["num_items"], compared["num_levels"]) == ("sid_theirs", 40, 2)
    assert compared["codes"]["collision_rate"] == pytest.approx(2 / 40)
    assert compared["codebook_size"] == 8
    text = shown(output)
    assert "sid_theirs" in text
    assert "5.00%" in text
    assert quantize.sources(quantize.Config(compare_with=str(path))) == (path,)


def test_what_is_read(tmp_path):
    assert quantize.inputs(quantize.Config()) == ("embed",)
    assert quantize.inputs(quantize.Config(compare_with="x")) == ("prepare", "embed")
    assert quantize.sources(quantize.Config()) == ()
    with pytest.raises(DataError, match=r"quantize.compare_with: .*nowhere"):
        quantize.sources(quantize.Config(compare_with=str(tmp_path / "nowhere")))


def test_too_many_items_is_known_before_the_fit(upstream):
    with pytest.raises(DataError, match=r"60 items do not fit into quantize.codebook_size 3 .* = 27"):
        run(upstream[0], codebook_size=3)


def test_a_catalogue_that_is_exactly_full(upstream):
    output, quality = run(upstream[0], num_levels=2, codebook_size=8)
    assert SidCatalog.load(output).num_items == 60
    assert quality["moved_items"][1] > 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_levels": 0}, "quantize.num_levels: at least 1"),
        ({"num_levels": 1, "dedup": "extra_level"}, "quantize.num_levels: at least 2 with dedup=extra_level"),
        ({"codebook_size": 1}, "quantize.codebook_size: must be at least 2, got 1"),
        ({"num_epochs": 0}, "quantize.num_epochs"),
        ({"learning_rate": 0.0}, "quantize.learning_rate"),
        ({"hidden_widths": [0]}, "quantize.hidden_widths"),
        ({"kind": "rq_means"}, "quantize.kind"),
        ({"fit_items": 7}, "quantize.fit_items: 0 for all, or at least codebook_size=8, got 7"),
        ({"fit_items": -1}, "quantize.fit_items"),
    ],
)
def test_values_out_of_range_are_named(upstream, values, message):
    with pytest.raises(ConfigError, match=message):
        run(upstream[0], **values)


def test_damaged_embeddings_are_named(upstream):
    (upstream[0] / "embed" / "embeddings.safetensors").write_bytes(b"x")
    with pytest.raises(ArtifactError, match=r"embed/embeddings.safetensors: .*run the stage 'embed' again"):
        run(upstream[0])
