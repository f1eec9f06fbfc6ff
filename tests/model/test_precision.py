"""What `auto` means: the precision that is faster here, and fp32 where it hardly matters."""

import pytest
import torch
from torch import nn

from lasar.model import precision
from lasar.model.precision import bf16_speed, choose_precision


def model(width):
    return nn.Sequential(nn.Embedding(3 * width, width), nn.Linear(width, 4 * width), nn.LayerNorm(width))


@pytest.mark.parametrize(
    ("speed", "narrowest", "expected"),
    [(0.5, 0, "fp32"), (1.1, 0, "fp32"), (1.5, 0, "bf16"), (1.5, 65, "fp32")],
)
def test_auto_is_bf16_where_that_is_clearly_faster(monkeypatch, speed, narrowest, expected):
    widths = []
    monkeypatch.setattr(precision, "bf16_speed", lambda width: widths.append(width) or speed)
    assert choose_precision("auto", model(64), narrowest=narrowest) == expected
    assert widths == ([] if narrowest > 64 else [64])


def test_fp32_is_not_measured(monkeypatch):
    monkeypatch.setattr(precision, "bf16_speed", lambda width: pytest.fail("measured"))
    assert choose_precision("fp32", model(64)) == "fp32"


@pytest.mark.parametrize(("speed", "warned"), [(0.1, True), (0.9, False), (2.0, False)])
def test_bf16_that_is_asked_for_is_taken_and_warned_of_where_it_is_slow(monkeypatch, caplog, speed, warned):
    monkeypatch.setattr(precision, "bf16_speed", lambda width: speed)
    precision._warn_if_slow.cache_clear()
    for _ in range(2):
        assert choose_precision("bf16", model(64)) == "bf16"
    precision._warn_if_slow.cache_clear()
    said = [record.getMessage() for record in caplog.records]
    assert said == (
        ["precision=bf16: this processor is 10.0 times slower in it than in fp32; set auto"] if warned else []
    )


def test_a_model_without_matrices_has_nothing_to_gain():
    assert choose_precision("auto", nn.LayerNorm(8)) == "fp32"


def test_the_measurement_is_a_ratio_and_made_once():
    bf16_speed.cache_clear()
    first = bf16_speed(32)
    assert 0.0 < first < 100.0
    assert bf16_speed(32) == first


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_that_has_bf16_uses_it():
    assert choose_precision("auto", model(64).cuda()) == "bf16"
