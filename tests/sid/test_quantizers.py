"""The contract every quantizer kind passes."""

import json

import numpy as np
import pytest

from lasar.errors import ArtifactError
from lasar.sid.quantizers import QUANTIZERS, load_quantizer, save_quantizer

ARGUMENTS = {
    "rq_kmeans": {"num_iterations": 5},
    "rq_vae": {"num_epochs": 3, "latent_width": 4, "hidden_widths": (8,)},
}


@pytest.fixture(scope="module")
def x():
    return np.random.default_rng(0).normal(size=(90, 6)).astype(np.float32)


@pytest.fixture(params=[(kind, balanced) for kind in QUANTIZERS for balanced in (False, True)], ids=str)
def quantizer(request, x):
    kind, balanced = request.param
    made = QUANTIZERS[kind](num_levels=3, codebook_size=5, seed=1, balanced=balanced, **ARGUMENTS[kind])
    made.fit(x)
    return made


def test_contract(quantizer, x, tmp_path):
    codes = quantizer.encode(x)
    assert codes.shape == (90, 3)
    assert codes.dtype == np.int32
    assert codes.min() >= 0
    assert codes.max() < 5
    assert quantizer.decode(codes).shape == x.shape
    assert quantizer.decode(codes).dtype == np.float32
    assert np.array_equal(quantizer.encode(x[10:13]), codes[10:13])
    for level in range(3):
        costs = quantizer.level_costs(x, codes[:, :level])
        assert costs.shape == (90, 5)
        assert np.array_equal(costs.argmin(axis=1), codes[:, level])
    assert quantizer.encode(x[:0]).shape == (0, 3)

    save_quantizer(quantizer, tmp_path)
    loaded = load_quantizer(tmp_path)
    assert type(loaded) is type(quantizer)
    assert np.array_equal(loaded.encode(x), codes)
    assert np.array_equal(loaded.decode(codes), quantizer.decode(codes))
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["quantizer.json", "quantizer.safetensors"]


@pytest.mark.parametrize("damage", ["kind", "argument", "size", "state"])
def test_damage_is_named(x, tmp_path, damage):
    quantizer = QUANTIZERS["rq_kmeans"](num_levels=2, codebook_size=4)
    quantizer.fit(x)
    save_quantizer(quantizer, tmp_path)
    path = tmp_path / "quantizer.json"
    facts = json.loads(path.read_text())
    if damage == "kind":
        facts["kind"] = "rq_kmean"
    elif damage == "argument":
        facts["arguments"]["colour"] = 1
    elif damage == "size":
        facts["arguments"]["codebook_size"] = 5
    else:
        (tmp_path / "quantizer.safetensors").write_bytes(b"nonsense")
    path.write_text(json.dumps(facts))
    with pytest.raises(
        ArtifactError, match="did you mean 'rq_kmeans'" if damage == "kind" else "not a usable"
    ):
        load_quantizer(tmp_path)
