import itertools
import json
import multiprocessing
import os
import signal
import time
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from lasar.errors import ConfigError, TrainingError
from lasar.model import precision
from lasar.training import checkpoints
from lasar.training.fit import FitPlan, build_optimizer, fit, scheduled, write_curve

TRUTH = torch.tensor([[2.0, -1.0, 0.5, 3.0]])


@dataclass
class Rows:
    x: torch.Tensor
    y: torch.Tensor

    @property
    def num_targets(self) -> int:
        return len(self.x)


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.2), nn.Linear(16, 1))


def make_batches(epoch: int, size: int = 8) -> list[Rows]:
    rng = np.random.default_rng(epoch)
    x = torch.tensor(rng.normal(size=(64, 4)), dtype=torch.float32)
    return [Rows(x[i : i + size], (x @ TRUTH.T)[i : i + size]) for i in range(0, 64, size)]


def squared_error(model, batch):
    return ((model(batch.x) - batch.y) ** 2).sum()


def validate(model):
    batch = make_batches(10_000)[0]
    return {"ndcg@10": -squared_error(model, batch).item()}


PLAN = FitPlan(epochs=4, learning_rate=0.05, precision="fp32", ema_decay=0.9)


def run(folder, *, model=None, plan=PLAN, loss=squared_error, batches=make_batches):
    model = model or make_model()
    result = fit(
        model, plan=plan, batches=batches, loss=loss, validate=validate, checkpoint_dir=folder / "checkpoint",
        description="test",
    )  # fmt: skip
    return model, result


def test_learns(tmp_path):
    model, result = run(tmp_path, plan=FitPlan(epochs=40, learning_rate=0.05, precision="fp32"))
    assert result.best_metric > -20 > validate(make_model())["ndcg@10"]
    assert validate(model)["ndcg@10"] == pytest.approx(result.best_metric)
    assert not model.training
    assert [record["epoch"] for record in result.curve] == list(range(1, 41))


def uneven_epochs(epoch: int) -> list[Rows]:
    return make_batches(epoch)[: 8 - epoch]


def _killed_run(folder, at_call, batches):
    # Stops like kill -9 in the middle of an epoch; a checkpoint at every step makes the middle matter.
    calls = 0

    def loss(model, batch):
        nonlocal calls
        calls += 1
        if calls == at_call:
            os.kill(os.getpid(), signal.SIGKILL)
        return squared_error(model, batch)

    checkpoints.Pace.due = lambda _: True
    run(folder, loss=loss, batches=batches)


@pytest.mark.parametrize(
    ("batches", "calls_in_all", "at_call"),
    [
        *((make_batches, 32, at_call) for at_call in (1, 3, 8, 9, 22, 31)),
        *((uneven_epochs, 26, at_call) for at_call in (3, 9, 12, 25)),
    ],
)
def test_resumed_run_equals_uninterrupted_run(tmp_path, batches, calls_in_all, at_call):
    whole, expected = run(tmp_path / "whole", batches=batches)
    process = multiprocessing.get_context("fork").Process(
        target=_killed_run, args=(tmp_path / "cut", at_call, batches)
    )
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    calls = []

    def counting(model, batch):
        calls.append(1)
        return squared_error(model, batch)

    resumed, result = run(tmp_path / "cut", loss=counting, batches=batches)
    assert len(calls) == calls_in_all - (at_call - 1)
    assert result == expected
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_run_goes_on_in_the_precision_it_began_in(tmp_path, monkeypatch):
    auto = FitPlan(epochs=2, learning_rate=0.05)
    monkeypatch.setattr(precision, "bf16_speed", lambda width: 2.0)
    _, whole = run(tmp_path, plan=auto)
    monkeypatch.setattr(precision, "bf16_speed", lambda width: 0.5)
    _, resumed = run(tmp_path, plan=auto)
    assert resumed == whole
    assert whole.facts()["precision"] == "bf16"


def test_accumulation_does_not_change_the_gradient(tmp_path):
    plan = FitPlan(epochs=2, learning_rate=0.05, precision="fp32")
    net = partial(nn.Linear, 4, 1)
    torch.manual_seed(1)
    one = net()
    eight = net()
    eight.load_state_dict(one.state_dict())
    run(tmp_path / "one", model=one, plan=plan, batches=partial(make_batches, size=64))
    accumulated = FitPlan(epochs=2, learning_rate=0.05, precision="fp32", accumulate=8)
    run(tmp_path / "eight", model=eight, plan=accumulated, batches=make_batches)
    for a, b in zip(one.parameters(), eight.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_uneven_batches_weigh_targets_equally(tmp_path):
    def uneven(epoch):
        whole = make_batches(epoch, size=64)[0]
        return [Rows(whole.x[:5], whole.y[:5]), Rows(whole.x[5:], whole.y[5:])]

    torch.manual_seed(1)
    a = nn.Linear(4, 1)
    b = nn.Linear(4, 1)
    b.load_state_dict(a.state_dict())
    run(
        tmp_path / "a",
        model=a,
        plan=FitPlan(epochs=2, learning_rate=0.05, precision="fp32"),
        batches=partial(make_batches, size=64),
    )
    run(
        tmp_path / "b",
        model=b,
        plan=FitPlan(epochs=2, learning_rate=0.05, precision="fp32", accumulate=2),
        batches=uneven,
    )
    torch.testing.assert_close(a.weight, b.weight, atol=1e-6, rtol=1e-5)


def test_early_stopping_keeps_the_best(tmp_path):
    values = iter([0.1, 0.5, 0.4, 0.3, 0.2, 0.9])
    snapshots = []

    def scripted(model):
        snapshots.append([p.clone() for p in model.parameters()])
        return {"ndcg@10": next(values)}

    model = make_model()
    result = fit(
        model, plan=FitPlan(epochs=6, learning_rate=0.05, precision="fp32", patience=3), batches=make_batches,
        loss=squared_error, validate=scripted, checkpoint_dir=tmp_path / "c", description="test",
    )  # fmt: skip
    assert (result.best_epoch, result.best_metric, len(snapshots)) == (2, 0.5, 5)
    for parameter, best in zip(model.parameters(), snapshots[1], strict=True):
        assert torch.equal(parameter, best)


def test_running_average_is_what_is_kept(tmp_path):
    plan = FitPlan(epochs=1, learning_rate=0.05, precision="fp32", ema_decay=0.5)
    seen = []

    def recording(model, batch):
        seen.append(model.weight.detach().clone())
        return squared_error(model, batch)

    torch.manual_seed(1)
    model = nn.Linear(4, 1)
    start = model.weight.detach().clone()
    after: list[torch.Tensor] = []
    fit(
        model, plan=plan, batches=lambda epoch: make_batches(0)[:3], loss=recording,
        validate=lambda m: {"ndcg@10": 0.0}, checkpoint_dir=tmp_path / "c", description="t",
    )  # fmt: skip
    after = seen[1:]
    average = start
    for weights in after:
        average = average + 0.5 * (weights - average)
    # The loss never saw the third update's weights: recover them from the average, check the direction.
    third = 2 * model.weight.detach() - average
    assert (third - TRUTH).norm() < (after[-1] - TRUTH).norm()


def test_not_a_number_stops_at_once(tmp_path):
    with pytest.raises(TrainingError, match=r"step 0.* lower "):
        run(tmp_path, loss=lambda model, batch: model(batch.x).sum() * float("nan"))


def test_schedule_warms_up_then_falls_to_a_tenth():
    plan = FitPlan(epochs=1, learning_rate=1.0, warmup_fraction=0.1)
    rates = [scheduled(step, 100, plan) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(1.0)
    assert rates.index(max(rates)) in (9, 10)
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))
    assert rates[-1] == pytest.approx(0.1, abs=0.01)


def test_curve_is_json_lines(tmp_path):
    write_curve(tmp_path / "curve.jsonl", [{"epoch": 1, "loss": 0.5}, {"epoch": 2, "loss": 0.25}])
    lines = (tmp_path / "curve.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in lines] == [0.5, 0.25]


def test_progress_reports_a_rate_and_an_eta(tmp_path, capsys, monkeypatch):
    import lasar.progress

    monkeypatch.setattr(lasar.progress, "_LINE_EVERY_SECONDS", 0.0)
    started = time.perf_counter()
    run(tmp_path)
    assert time.perf_counter() - started < 60
    assert "step/s, ETA" in capsys.readouterr().err


def test_layers_below_learn_more_slowly():
    model = nn.ModuleDict(
        {"embed": nn.Embedding(3, 2), "layers": nn.ModuleList(nn.Linear(2, 2) for _ in range(3))}
    )
    model = nn.ModuleDict({"model": model, "head": nn.Linear(2, 3)})
    rates = {}
    optimizer = build_optimizer(model, FitPlan(epochs=1, learning_rate=1.0, layer_decay=0.5))
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            rates[parameter] = (group["share"], group["weight_decay"])
    named = {name: rates[parameter] for name, parameter in model.named_parameters()}
    assert named == {
        "model.embed.weight": (1.0, 0.1), "head.weight": (1.0, 0.1), "head.bias": (1.0, 0.0),
        "model.layers.0.weight": (0.25, 0.1), "model.layers.0.bias": (0.25, 0.0),
        "model.layers.1.weight": (0.5, 0.1), "model.layers.1.bias": (0.5, 0.0),
        "model.layers.2.weight": (1.0, 0.1), "model.layers.2.bias": (1.0, 0.0),
    }  # fmt: skip
    assert len(build_optimizer(model, FitPlan(epochs=1, learning_rate=1.0)).param_groups) == 2


@pytest.mark.parametrize("name", ["h", "blocks"])
def test_layers_by_other_names_learn_more_slowly_too(name):
    model = nn.ModuleDict({"model": nn.ModuleDict({name: nn.ModuleList(nn.Linear(2, 2) for _ in range(2))})})
    optimizer = build_optimizer(model, FitPlan(epochs=1, learning_rate=1.0, layer_decay=0.5))
    assert {group["share"] for group in optimizer.param_groups} == {0.5, 1.0}


def test_layers_that_cannot_be_told_are_refused():
    with pytest.raises(ConfigError, match=r"layer_decay=0\.5: this model's layers"):
        build_optimizer(nn.Linear(2, 2), FitPlan(epochs=1, learning_rate=1.0, layer_decay=0.5))


def test_the_schedule_keeps_the_share_of_every_layer(tmp_path):
    # A layer that learns at almost nothing of the rate stays where it was; the one above it moves.
    torch.manual_seed(0)
    layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 1)])
    model = nn.ModuleDict({"model": nn.ModuleDict({"layers": layers})})
    before = [layer.weight.detach().clone() for layer in layers]

    def loss(model, batch):
        return ((layers[1](layers[0](batch.x)) - batch.y) ** 2).sum()

    plan = FitPlan(epochs=1, learning_rate=0.05, precision="fp32", weight_decay=0.0, layer_decay=1e-9)
    fit(
        model, plan=plan, batches=make_batches, loss=loss, validate=lambda _: {"ndcg@10": 1.0},
        checkpoint_dir=tmp_path / "checkpoint", description="test",
    )  # fmt: skip
    torch.testing.assert_close(layers[0].weight.detach(), before[0], atol=1e-6, rtol=0)
    assert (layers[1].weight.detach() - before[1]).abs().max() > 0.01


def test_checkpoints_take_a_twentieth_of_the_time_at_most(monkeypatch):
    now = 0.0
    monkeypatch.setattr(checkpoints.time, "monotonic", lambda: now)
    pace = checkpoints.Pace()
    now = 29.0
    assert not pace.due()
    now = 30.0
    assert pace.due()
    now = 33.0  # took three seconds
    pace.saved(30.0)
    now = 92.0
    assert not pace.due()
    now = 93.0
    assert pace.due()
    now = 93.1
    pace.saved(93.0)
    now = 123.5
    assert pace.due()
