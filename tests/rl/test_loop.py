"""The loop on a tiny model: what is planted is learned, what is stale is refused, what is killed goes on."""

import itertools
import json
import math

import numpy as np
import pytest
import torch

from lasar.cot.rows import TrainingRow
from lasar.decoding.ranker import Ranker
from lasar.errors import TrainingError
from lasar.model.backbone import build_preset
from lasar.model.prompt import encode_prompts
from lasar.model.reasoner import LatentReasoner, ReasoningSettings
from lasar.prompts.vocabulary import Vocabulary
from lasar.rl.depth_cost import DepthCost
from lasar.rl.guards import Bounds
from lasar.rl.loop import RlPlan, reference_of, train
from lasar.rl.objective import Objective, terminal_weight
from lasar.rl.prompts import PromptSource
from lasar.training.checkpoints import Pace

VOCABULARY = Vocabulary(num_levels=2, codebook_size=4, max_history=8)
CODES = np.array(list(itertools.product(range(4), repeat=2)), np.int32)
N_MAX, NUM_ROWS = 5, 24
ANCHORS = torch.randn(3, 32, generator=torch.Generator().manual_seed(2))


def make_ranker():
    backbone = build_preset("tiny", vocabulary=VOCABULARY, seed=0)
    torch.manual_seed(0)
    settings = ReasoningSettings(max_depth=N_MAX, head_width=16)
    return Ranker(LatentReasoner(backbone, vocabulary=VOCABULARY, settings=settings).eval(), codes_IL=CODES)


def make_source(ranker):
    """Half of the users walk among the first items, half among the last; a row's number is its user."""
    rows = [
        TrainingRow(
            user, 2, np.array([n % 2 + 14 * (user % 2) for n in range(2)], np.int32), np.arange(2, dtype=np.int32),
            np.array([3 + 9 * (user % 2)], np.int32),
        )
        for user in range(NUM_ROWS)
    ]  # fmt: skip
    return PromptSource(
        rows, ranker.tokens_IL, vocabulary=VOCABULARY, seed=0,
        steps=lambda user, basket: np.arange(user % 3, dtype=np.int32),
    )  # fmt: skip


def hit_reward(rollouts):
    items = rollouts.items_BG.numpy()
    return np.array([np.isin(r, t) for r, t in zip(items, rollouts.prompts.targets, strict=True)], np.float64)


def run(folder, *, judge=hit_reward, validate=None, ranker=None, cost=None, objective=None, **plan):
    ranker = ranker or make_ranker()
    values = {
        "steps": 6, "learning_rate": 1e-3, "head_learning_rate": 1e-2, "prompts": 8, "group_size": 4,
        "beam_width": 8, "validate_every": 2, "bounds": Bounds(max_kl=1e9, min_entropy=0.0),
    }  # fmt: skip
    parts = Objective(
        reasoner=ranker.reasoner, reference=reference_of(ranker.reasoner), trie=ranker.trie,
        tokens_IL=torch.from_numpy(ranker.tokens_IL).long(), fetch=lambda index: ANCHORS[index],
        **{"terminal_weight": 0.5, **(objective or {})},
    )  # fmt: skip
    result = train(
        ranker, plan=RlPlan(**{**values, **plan}), objective=parts,
        cost=cost or DepthCost(price=0.1, target=None, decay=0.9), source=make_source(ranker), judge=judge,
        validate=validate or (lambda: {"ndcg@10": nll_of_targets(ranker)}), checkpoint_dir=folder / "checkpoint",
    )  # fmt: skip
    return ranker, result


def nll_of_targets(ranker):
    """Higher is better: mean score of the planted items."""
    source = make_source(ranker)
    found = ranker.rank(
        [row.history for row in source.rows[:2]],
        [row.baskets for row in source.rows[:2]],
        k=16,
        beam_width=16,
    )
    return float(
        np.mean(
            [
                scores[items == row.targets[0]][0]
                for items, scores, row in zip(found.items_QK, found.scores_QK, source.rows, strict=False)
            ]
        )
    )


def weights(ranker):
    return {name: p.detach().clone() for name, p in ranker.reasoner.named_parameters()}


def test_it_learns_what_is_rewarded(tmp_path):
    before = nll_of_targets(make_ranker())
    ranker, result = run(
        tmp_path,
        steps=25,
        learning_rate=3e-3,
        group_size=16,
        beam_width=16,
        objective={"terminal_weight": 0.0},
    )
    assert nll_of_targets(ranker) > before + 1
    assert result.best_step > 0
    first, last = result.curve[1], result.curve[-1]
    assert last["kl"] > first["kl"] == 0
    assert [record["step"] for record in result.curve] == list(range(26))
    for record in result.curve[1:]:
        assert sum(record["depths"]) == 8
        assert record["mean_depth"] == pytest.approx(np.average(range(N_MAX + 1), weights=record["depths"]))
        assert record["decoder_gap"] < 1e-4


def by_need(needed):
    """Reward of a group: whether its depth is what the user needs; nothing else counts."""

    def judge(rollouts):
        wanted = torch.tensor([needed[number % 2] for number in rollouts.prompts.numbers_B])
        return (rollouts.depths_B == wanted).double()[:, None].expand(rollouts.items_BG.shape).numpy()

    return judge


def depths_of(ranker):
    rows = make_source(ranker).rows
    return ranker.rank([r.history for r in rows], [r.baskets for r in rows], k=1, beam_width=1).depths_Q


def test_reward_alone_gives_every_user_the_depth_it_needs(tmp_path):
    needed = (1, 4)
    values = iter(range(100))
    ranker, _ = run(
        tmp_path, judge=by_need(needed), cost=DepthCost(price=0.0, target=None, decay=0.9), steps=60,
        learning_rate=1e-9, prompts=24, group_size=2, beam_width=2, validate_every=60,
        validate=lambda: {"ndcg@10": float(next(values))},
    )  # fmt: skip
    wanted = [needed[user % 2] for user in range(NUM_ROWS)]
    assert (depths_of(ranker) == wanted).mean() >= 0.9


def test_the_price_alone_leads_everybody_to_one_step(tmp_path):
    values = iter(range(100))
    ranker, result = run(
        tmp_path, judge=lambda r: np.random.default_rng(r.version).random(r.items_BG.shape),
        cost=DepthCost(price=0.5, target=None, decay=0.9), steps=40, learning_rate=1e-9, prompts=24, group_size=2,
        beam_width=2, validate_every=40, validate=lambda: {"ndcg@10": float(next(values))},
    )  # fmt: skip
    assert (depths_of(ranker) == 1).all()
    assert result.curve[-1]["mean_depth"] < result.curve[1]["mean_depth"]


@pytest.mark.parametrize("at_call", [2, 7])
def test_a_killed_run_ends_with_the_same_bytes(tmp_path, monkeypatch, at_call):
    options = {
        "replay": 0.5, "accumulate": 2, "how": "sample", "objective": {"updates": 2}, "steps": 4,
        "precision": "bf16",
    }  # fmt: skip

    def target_cost():
        return DepthCost(price=0.1, target=2.0, decay=0.9)

    whole, expected = run(tmp_path / "whole", cost=target_cost(), **options)
    monkeypatch.setattr(Pace, "due", lambda _: True)
    calls = []

    def dying(rollouts):
        calls.append(1)
        if len(calls) == at_call:
            raise KeyboardInterrupt
        return hit_reward(rollouts)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", judge=dying, cost=target_cost(), **options)
    resumed, result = run(tmp_path / "cut", cost=target_cost(), **options)
    assert result == expected
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(resumed)[name]), name


def test_the_best_weights_are_kept_and_the_start_is_one_of_them(tmp_path):
    ranker = make_ranker()
    before = weights(ranker)
    _, result = run(
        tmp_path / "worse", ranker=ranker, validate=iter([{"ndcg@10": v} for v in (3, 2, 1, 0)]).__next__
    )
    assert result.best_step == 0
    assert all(torch.equal(before[name], value) for name, value in weights(ranker).items())
    values = iter([{"ndcg@10": v} for v in (3, 5, 4, 4)])
    ranker, result = run(tmp_path / "better", validate=lambda: next(values))
    assert result.best_step == 2
    cut, _ = run(tmp_path / "cut", steps=2, validate=iter([{"ndcg@10": v} for v in (3, 5)]).__next__)
    # The same rollouts, but another end of the schedule: near, and not the start.
    assert any(not torch.equal(before[name], value) for name, value in weights(cut).items())


def test_fewer_steps_may_be_worth_a_little(tmp_path):
    def scripted():
        values = iter([(0.100, 4.0), (0.0995, 2.0), (0.1, 3.9), (0.09, 1.0)])
        return lambda: dict(zip(("ndcg@10", "mean_depth"), next(values), strict=True))

    assert run(tmp_path / "a", validate=scripted(), step_worth=0.0)[1].best_step == 0
    assert run(tmp_path / "b", validate=scripted(), step_worth=0.01)[1].best_step == 2


def test_a_broken_bound_stops_the_run(tmp_path):
    _, result = run(
        tmp_path, steps=50, learning_rate=0.05, bounds=Bounds(max_kl=0.01, min_entropy=0.0, window=2),
        validate_every=100,
    )  # fmt: skip
    assert result.steps < 50
    assert "max_kl=0.01" in result.stopped
    assert "valid_ndcg@10" in result.curve[-1]
    again = run(
        tmp_path, steps=50, learning_rate=0.05, bounds=Bounds(max_kl=0.01, min_entropy=0.0, window=2)
    )[1]
    assert again == result  # nothing left to do


def test_prompts_without_a_hit_come_back(tmp_path):
    asked = []

    def judge(rollouts):
        asked.append(rollouts.prompts.numbers_B.tolist())
        return hit_reward(rollouts)

    run(tmp_path, judge=judge, replay=0.5, steps=4, learning_rate=1e-9)
    assert asked[0] == asked[1] == asked[2]  # twice to tell how long it will take, once in earnest
    asked = asked[2:]
    fresh = [make_source(make_ranker()).draw(step, 8).tolist() for step in range(4)]
    for step in range(1, 4):
        again = set(asked[step]) - set(fresh[step])
        assert len(set(fresh[step]) & set(asked[step])) >= 4
        assert again <= set(itertools.chain(*asked[:step]))


def test_what_it_will_cost_is_said_first_and_moves_nothing(tmp_path, capsys):
    _, result = run(tmp_path, steps=3)
    lines = [
        line for line in capsys.readouterr().err.splitlines() if line.startswith(("rl: trains", "rl: took"))
    ]
    first, last = lines
    assert first.startswith("rl: trains")
    assert "in 3 steps" in first
    assert last.startswith("rl: took")
    assert result.curve[1]["kl"] == 0  # the first step asks the model that Stage 2 left
    run(tmp_path, steps=3)
    assert "rl: t" not in capsys.readouterr().err  # nothing is left to do, nothing is expected


def test_not_a_number_stops_at_once(tmp_path):
    with pytest.raises(TrainingError, match=r"step 0.* lower "):
        run(tmp_path, judge=lambda rollouts: np.full(rollouts.items_BG.shape, math.inf))


def test_the_curve_is_json(tmp_path):
    _, result = run(tmp_path, steps=2)
    assert json.loads(json.dumps(result.curve)) == result.curve


def test_the_terminal_weight_makes_the_term_as_large_as_asked():
    ranker = make_ranker()
    source = make_source(ranker)
    parts = Objective(
        reasoner=ranker.reasoner, reference=ranker.reasoner, trie=ranker.trie,
        tokens_IL=torch.from_numpy(ranker.tokens_IL).long(), fetch=lambda index: ANCHORS[index],
    )  # fmt: skip
    batches = source.render(np.arange(NUM_ROWS), batch_size=7)
    gamma = terminal_weight(parts, batches, loss=2.5)
    distances = []
    for row in source.rows:
        if row.user_index % 3 == 0:
            continue  # no rationale
        ids = torch.from_numpy(
            VOCABULARY.render_history(ranker.tokens_IL, row.history, row.baskets, open_order=True)
        ).long()
        with torch.no_grad():
            thought = ranker.reasoner.think(
                encode_prompts(ranker.reasoner.backbone, ids[None], torch.tensor([len(ids)]))
            )
        p = thought.latents.hidden_BPND[0, 0, int(thought.depths_B)].softmax(-1)
        q = ANCHORS[row.user_index % 3 - 1].softmax(-1)
        distances.append(float((p * (p / q).log()).sum() + (q * (q / p).log()).sum()) / 2)
    assert gamma == pytest.approx(2.5 / np.mean(distances), rel=1e-4)
    nobody = [type(b)(**{**vars(b), "anchors_B": np.full(len(b), -1)}) for b in batches]
    assert terminal_weight(parts, nobody, loss=2.5) == 0


def test_a_source_goes_through_all_rows_before_it_repeats_one():
    source = make_source(make_ranker())
    first = np.concatenate([source.draw(step, 5) for step in range(10)])
    assert sorted(first[:NUM_ROWS].tolist()) == list(range(NUM_ROWS))
    assert sorted(first[NUM_ROWS : 2 * NUM_ROWS].tolist()) == list(range(NUM_ROWS))
    assert first[:NUM_ROWS].tolist() != first[NUM_ROWS : 2 * NUM_ROWS].tolist()
    assert make_source(make_ranker()).draw(7, 5).tolist() == first[35:40].tolist()
