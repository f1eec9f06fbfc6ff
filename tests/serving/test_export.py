"""The exported folder, alone."""

import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from lasar import ArtifactError, Recommender
from lasar.artifacts import content_hash, read_json
from lasar.model.backbone import trunk
from lasar.serving.catalogue import ItemText
from lasar.serving.export import export_run


@pytest.fixture
def alone(run, tmp_path):
    """An export whose run folder is gone."""
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    export_run(copy, tmp_path / "out")
    shutil.rmtree(copy)
    return tmp_path / "out"


def test_it_recommends_as_the_run_does(alone, recommender):
    exported = Recommender.load(alone)
    for history in ([], ["sku1", ["sku2", "sku3"]]):
        assert exported.recommend(history, 20) == recommender.recommend(history, 20)


def test_transformers_opens_the_backbone(alone, recommender):
    model = AutoModelForCausalLM.from_pretrained(alone / "latent_sft" / "model", local_files_only=True).eval()
    ids = torch.arange(12)[None]
    with torch.no_grad():
        found = model(ids).logits
        ours = recommender.ranker.reasoner.backbone
        wanted = trunk(ours)(ids).last_hidden_state @ ours.get_output_embeddings().weight.T
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_it_is_served_with_live_items_and_explanations(alone, make_service, recommender):
    service = make_service(run=alone)
    assert service.has_rationales
    assert service.users.user_ids == []
    known = service.catalogue.snapshot.finder.best_known(
        range(40), limit=8
    )  # counts came along without the events
    assert set(known) == set(np.flatnonzero(recommender.train_counts))
    assert service.catalogue.change(add=[ItemText("new", "RED MUG", "RED MUG")]).version == 1


def test_users_stay_at_home_unless_asked_for(run, tmp_path):
    export_run(run, tmp_path / "without")
    names = {path.name for path in (tmp_path / "without" / "prepare").iterdir()}
    assert names == {"items.parquet", "summary.json", "item_counts.json", "manifest.json"}
    export_run(run, tmp_path / "with", users=True)
    assert Recommender.load(tmp_path / "with").user_history("bob") == [["sku6"], ["sku/7"]]


def test_it_holds_no_pickle_and_its_manifests_are_whole(alone):
    facts = read_json(alone / "export.json")
    present = {p.relative_to(alone).as_posix() for p in alone.rglob("*") if p.is_file()} - {"export.json"}
    assert set(facts["files"]) == present
    assert {name.rpartition(".")[2] for name in present} <= {"safetensors", "json", "parquet"}
    for stage in ("prepare", "embed", "quantize", "latent_sft", "anchor"):
        if (alone / stage / "manifest.json").is_file():
            assert content_hash(alone / stage)


def test_choices(run, tmp_path):
    facts = export_run(run, tmp_path / "out", anchors=False)
    assert not facts["anchors"]
    assert not (tmp_path / "out" / "anchor").exists()


def test_what_cannot_be_exported(run, tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(ArtifactError, match="exists already"):
        export_run(run, tmp_path / "there")
    with pytest.raises(ArtifactError, match="no such run folder"):
        export_run(tmp_path / "nowhere", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_export_can_be_exported(alone, tmp_path):
    export_run(alone, tmp_path / "again")
    assert Recommender.load(tmp_path / "again").recommend([], 3) == Recommender.load(alone).recommend([], 3)


class Bomb:
    """Touches a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def test_pickles_are_never_opened(alone):
    """What lies in a run folder is data: a pickle in any place is refused or ignored, and never run."""
    marker = alone / "it-ran"
    bomb = pickle.dumps(Bomb(marker))
    weights = alone / "latent_sft" / "model" / "model.safetensors"
    weights.with_name("pytorch_model.bin").write_bytes(bomb)
    Recommender.load(alone)  # safetensors are there: the pickle is not looked at
    weights.unlink()
    with pytest.raises(ArtifactError):
        Recommender.load(alone)
    weights.write_bytes(bomb)
    with pytest.raises(ArtifactError):
        Recommender.load(alone)
    assert not marker.exists()
