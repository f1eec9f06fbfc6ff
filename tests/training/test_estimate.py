import re
import shutil
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import nn

from lasar.data.interactions import EvalCases
from lasar.training import estimate as module
from lasar.training.estimate import Estimate, Phase, estimate, rehearse_and_fit
from lasar.training.fit import FitPlan

PLAN = FitPlan(epochs=3, learning_rate=1.0, precision="fp32", accumulate=2, ema_decay=0.9)


class Batch:
    def __init__(self, num_targets):
        self.num_targets = num_targets


class Clock:
    """Time that passes only in losses (a millisecond a target) and in validations."""

    def __init__(self):
        self.now = 0.0

    def loss(self, model, batch):
        self.now += batch.num_targets / 1000
        return model(torch.ones(1, 4)).sum()

    def pass_by(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(module.time, "perf_counter", lambda: clock.now)
    return clock


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))


def test_seconds_are_those_of_all_epochs_and_nothing_moves(model, clock):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    sizes = [1, 9, 3, 7, 5, 5, 2, 8, 4, 6]  # 50 milliseconds an epoch
    found = estimate(
        model, plan=PLAN, batches=[Batch(size) for size in sizes], loss=clock.loss,
        validate=[lambda: clock.pass_by(0.02), lambda: clock.pass_by(0.05)], users=[8, 64, 232],
        always=lambda: clock.pass_by(0.01),
    )  # fmt: skip
    assert found.training_s == pytest.approx(0.15, rel=0.1)
    # 0.03 seconds for 56 users more; 168 are missing.
    assert found.validation_s == pytest.approx(3 * (0.01 + 0.05 + 3 * 0.03))
    assert (found.steps, found.parameters) == (15, 20)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_one_batch_is_enough(model, clock):
    found = estimate(
        model, plan=FitPlan(epochs=1, learning_rate=1.0, precision="fp32"), batches=[Batch(1)], loss=clock.loss,
        validate=[lambda: None] * 2, users=[1, 1, 1],
    )  # fmt: skip
    assert found.steps == 1


def test_memory_counts_what_a_step_holds_and_the_copies_of_the_weights(model):
    wide = nn.Linear(4, 4_000_000)  # 80 MB

    def hungry(model, batch):
        return (model(torch.ones(5, 4)) ** 2).sum()

    plan = FitPlan(epochs=1, learning_rate=1.0, precision="fp32")
    kwargs = {"plan": plan, "loss": hungry, "validate": [lambda: None] * 2, "users": [1, 1, 1]}
    wide_bytes = estimate(wide, batches=[Batch(1)], **kwargs).memory
    narrow_bytes = estimate(model, batches=[Batch(1)], **kwargs).memory
    # Gradient, two moments, two copies of the weights; outputs and their gradients.
    assert 5 * 80e6 < wide_bytes - narrow_bytes < 12 * 80e6


def test_said_once_before_training_and_not_again_when_it_goes_on(model, clock, tmp_path, capsys):
    seen = []

    def validate(cases):
        seen.append(len(cases))
        return {"ndcg@10": 1.0}

    one = np.zeros(1, dtype=np.int32)
    cases = EvalCases(
        user_index=np.arange(100, dtype=np.int32),
        histories=[one] * 100,
        baskets=[one] * 100,
        targets=[one] * 100,
    )
    for _ in range(2):
        (result,) = rehearse_and_fit(
            model, phases=[Phase(name="sft", plan=PLAN, batches=lambda _: [Batch(1), Batch(2)])], loss=clock.loss,
            validate=validate, cases=cases, scratch=tmp_path,
        )  # fmt: skip
    assert result.best_epoch == 1
    assert seen == [8, 8, 64, 100, 100, 100]
    said = [line for line in capsys.readouterr().err.splitlines() if "expected" in line or "weights" in line]
    assert len(said) == 2
    assert re.match(r"sft: trains 20 weights in 3 steps; about ", said[0])
    assert re.match(r"sft: took 0 s \(expected 0 s\), \d+\.\d GB \(expected \d+\.\d\)", said[1])


def test_phases_are_rehearsed_before_the_first_begins_and_added_up(model, clock, tmp_path, capsys):
    inside, order = [], []

    @contextmanager
    def scope():
        inside.append(True)
        yield
        inside.pop()

    def loss(model, batch):
        order.append(("new" if inside else "all", batch.num_targets))
        return clock.loss(model, batch)

    one = np.zeros(1, dtype=np.int32)
    cases = EvalCases(user_index=np.arange(1, dtype=np.int32), histories=[one], baskets=[one], targets=[one])
    plan = FitPlan(epochs=2, learning_rate=0.1, precision="fp32")
    phases = [
        Phase(name="first", plan=plan, batches=lambda _: [Batch(10_000)], scope=scope, moving=3_000_000),
        Phase(name="second", plan=plan, batches=lambda _: [Batch(20_000)]),
    ]
    kwargs = {"loss": loss, "validate": lambda _: {"ndcg@10": 1.0}, "cases": cases, "scratch": tmp_path}
    results = rehearse_and_fit(model, phases=phases, **kwargs)
    assert [len(result.curve) for result in results] == [2, 2]
    assert (
        order == [("new", 10_000)] * 5 + [("all", 20_000)] * 5 + [("new", 10_000)] * 2 + [("all", 20_000)] * 2
    )
    said = capsys.readouterr().err
    assert re.search(r"^first: trains 3\.0 M weights in 2 steps; about 20 s here", said, re.MULTILINE)
    assert re.search(r"^first, second: about 60 s in all, \d+\.\d GB$", said, re.MULTILINE)

    shutil.rmtree(tmp_path / "second")  # the first is finished, the second has not begun
    rehearse_and_fit(model, phases=phases, **kwargs)
    said = capsys.readouterr().err
    assert "second: trains" in said
    assert "first: trains" not in said
    assert "in all" not in said


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(3, "about 4 s here (1 s of it validation)"), (600, "about 10 min here"), (7200, "about 2.0 h here")],
)
def test_spoken(seconds, said):
    found = Estimate(parameters=1, steps=1, training_s=seconds, validation_s=1.0, memory=0)
    assert said in found.line("sft")


def test_without_proc_the_peak_so_far_stands_in(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "_PROC", tmp_path / "nowhere")
    module.forget_peak(torch.device("cpu"))
    assert module.peak(torch.device("cpu")) > 1e6
