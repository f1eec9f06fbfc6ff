import dataclasses
import multiprocessing
import os
import signal

import numpy as np
import pytest
import torch

from lasar.baselines.sequences import pad_histories, target_batches
from lasar.baselines.trained import Trained
from lasar.data.interactions import EvalCases
from lasar.errors import ArtifactError
from tests.baselines.conftest import NUM_ITEMS, make, walks


def first_order(before, last):
    return (3 * last + 1) % NUM_ITEMS


def second_order(before, last):
    return (last + (1 if before % 2 else 3)) % NUM_ITEMS


PAIRS = [(a, b) for a in range(NUM_ITEMS) for b in range(NUM_ITEMS)]


def accuracy(model, rule, histories):
    rows = [np.array(history, np.int32) for history in histories]
    items, _ = model.recommend(rows, rows, 1)
    return np.mean([items[n, 0] == rule(*history[-2:]) for n, history in enumerate(histories)])


def test_learns_what_follows_the_last_item(name):
    values = (
        {"learning_rate": 3e-3, "epochs": 14} if name == "tiger" else {"learning_rate": 2e-2, "epochs": 12}
    )
    model = make(name, batch_tokens=160 if name == "tiger" else 64, **values).fit(
        walks(first_order), NUM_ITEMS
    )
    assert accuracy(model, lambda last: first_order(None, last), [(item,) for item in range(NUM_ITEMS)]) == 1


@pytest.mark.parametrize("name", ["gru4rec", "sasrec"])
def test_learns_what_follows_the_last_two_items(name):
    shop = walks(second_order, num_users=300, length=5, num_random=2)
    rate, epochs = (3e-2, 25) if name == "gru4rec" else (1e-2, 15)
    model = make(name, learning_rate=rate, epochs=epochs, batch_tokens=128).fit(shop, NUM_ITEMS)
    assert accuracy(model, second_order, PAIRS) > 0.95
    assert accuracy(model, lambda before, last: (last + 1) % NUM_ITEMS, PAIRS) < 0.6


def losses(network, items, targets):
    """Loss of each position by itself."""
    (batch,) = target_batches(
        walks(first_order, num_users=1), num_items=NUM_ITEMS, max_history=6, train_targets="all",
        whole_histories=True, batch_tokens=100, seed=0, epoch=0,
    )  # fmt: skip
    rows = pad_histories([np.array(items, np.int32)], num_items=NUM_ITEMS, max_history=6)
    found = []
    for place, target in enumerate(targets):
        targets_BT = torch.full_like(rows.items_BT, -1)
        targets_BT[0, place] = target
        one = dataclasses.replace(batch, histories=rows, targets_BT=targets_BT)
        found.append(network(one).item())
    return found


@pytest.mark.parametrize("name", ["gru4rec", "sasrec", "rearec_erl", "rearec_prl"])
def test_later_items_do_not_change_earlier_predictions(name):
    model = make(name, epochs=1).fit(walks(first_order), NUM_ITEMS)
    network = model.network.eval()
    network.noise = 0.0  # the one random part of the loss
    one, other = losses(network, [1, 2, 3, 4], [5] * 5), losses(network, [1, 2, 6, 7], [5] * 5)
    assert one[:3] == pytest.approx(other[:3], abs=1e-5)
    assert one[3] != pytest.approx(other[3], abs=1e-4)


def test_only_the_newest_items_are_seen(name):
    model = make(name, epochs=1).fit(walks(first_order), NUM_ITEMS)
    newest = np.array([1, 2, 3, 4, 5, 6], np.int32)
    longer = np.concatenate([np.array([7, 0], np.int32), newest])
    items, scores = model.recommend([newest, longer], [newest, longer], NUM_ITEMS)
    assert items[0].tolist() == items[1].tolist()
    np.testing.assert_allclose(scores[0], scores[1], atol=1e-5)


def test_same_seed_same_model_other_seed_other_model(name):
    histories = [np.array([1, 2], np.int32)]

    def scores(seed):
        state = torch.get_rng_state()
        model = make(name, epochs=2, seed=seed).fit(walks(first_order, num_users=20), NUM_ITEMS)
        torch.set_rng_state(state)
        return model.recommend(histories, histories, NUM_ITEMS)[1]

    assert (scores(0) == scores(0)).all()
    assert (scores(0) != scores(1)).any()


def cases():
    rows = walks(first_order, num_users=10, seed=5)
    histories = [row.items[:-1] for row in rows]
    return EvalCases(
        user_index=np.arange(10, dtype=np.int32), histories=histories, baskets=histories,
        targets=[row.items[-1:] for row in rows],
    )  # fmt: skip


def _killed(folder, name, at_epoch):
    # Stops like kill -9 while it validates.
    model, seen = make(name, epochs=4, validation=cases(), checkpoint_dir=folder), []
    validate = model._validate

    def counting():
        seen.append(1)
        if len(seen) == at_epoch:
            os.kill(os.getpid(), signal.SIGKILL)
        return validate()

    model._validate = counting
    model.fit(walks(first_order, num_users=30), NUM_ITEMS)


@pytest.mark.parametrize("name", ["gru4rec", "sasrec", "rearec_prl", "tiger"])
def test_a_killed_fit_ends_with_the_same_weights(tmp_path, name):
    whole = make(name, epochs=4, validation=cases(), checkpoint_dir=tmp_path / "whole")
    whole.fit(walks(first_order, num_users=30), NUM_ITEMS)
    arguments = (tmp_path / "cut", name, 3)
    process = multiprocessing.get_context("fork").Process(target=_killed, args=arguments)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    resumed = make(name, epochs=4, validation=cases(), checkpoint_dir=tmp_path / "cut")
    resumed.fit(walks(first_order, num_users=30), NUM_ITEMS)
    assert resumed.result == whole.result
    for a, b in zip(whole.network.parameters(), resumed.network.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_best_epoch_is_kept(tmp_path):
    values = iter([0.2, 0.9, 0.1])
    model = make("sasrec", epochs=3, validation=cases())
    kept = []

    def scripted():
        kept.append(model.network.items.weight.detach().clone())
        return {"ndcg@10": next(values)}

    model._validate = scripted
    model.fit(walks(first_order, num_users=20), NUM_ITEMS)
    assert (model.result.best_epoch, model.result.best_metric) == (2, 0.9)
    assert torch.equal(model.network.items.weight, kept[1])


def test_saved_and_opened_it_ranks_the_same(tmp_path, name):
    model = make(name, epochs=2).fit(walks(first_order, num_users=20), NUM_ITEMS)
    model.save(tmp_path)
    opened = Trained.load(tmp_path)
    histories = [np.array(pair, np.int32) for pair in PAIRS[::7]]
    expected, found = (m.recommend(histories, histories, 5) for m in (model, opened))
    assert (found[0] == expected[0]).all()
    assert (found[1] == expected[1]).all()


def test_a_setting_may_be_changed_when_opened(tmp_path):
    model = make("sasrec", epochs=1).fit(walks(first_order, num_users=5), NUM_ITEMS)
    model.settings["temperature"] = 1.0
    model.save(tmp_path)
    warm = Trained.load(tmp_path, temperature=2.0, beam_width=7)  # a network without beams takes no notice
    history = [np.array([1], np.int32)]
    np.testing.assert_allclose(
        2 * warm.recommend(history, history, 8)[1], model.recommend(history, history, 8)[1], rtol=1e-5
    )


@pytest.mark.parametrize("damage", ["weights", "facts", "setting", "shape"])
def test_a_damaged_artifact_says_which_stage_to_run(tmp_path, damage):
    folder = tmp_path / "sasrec"
    folder.mkdir()
    model = make("sasrec", epochs=1).fit(walks(first_order, num_users=5), NUM_ITEMS)
    if damage == "setting":
        model.settings = dict(model.settings) | {"unheard_of": 1}
    if damage == "shape":
        model.settings = dict(model.settings) | {"hidden_size": 16}
    model.save(folder)
    if damage == "weights":
        (folder / "baseline.safetensors").write_bytes(b"x")
    if damage == "facts":
        (folder / "baseline.json").write_text("{}")
    with pytest.raises(ArtifactError, match="run the stage 'sasrec' again"):
        Trained.load(folder)
