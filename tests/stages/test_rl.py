"""The RL stage on the hand-made shop of Stage 2's tests."""

import io
import json
import re
import shutil

import numpy as np
import pytest
import torch
from rich.console import Console

from lasar.artifacts import StageContext, write_json
from lasar.config import parse_section
from lasar.data.interactions import SPLIT_VALID, Interactions
from lasar.decoding.ranker import Ranker
from lasar.errors import ConfigError
from lasar.model.reasoner import load_reasoner
from lasar.recommender import POLICY_STAGES
from lasar.rl.rewards import Mixture
from lasar.rl.users import chosen_depths, depths_by_user
from lasar.stages import STAGES, latent_sft, rl
from lasar.training.checkpoints import Pace
from lasar.training.validation import answer_nll
from tests.stages.test_latent_sft import CODES, N_MAX, NUM_ITEMS, shop
from tests.stages.test_latent_sft import config as stage_2_config

WEIGHTS = ("model/model.safetensors", "policy_head.safetensors", "reasoning.json", "vocabulary.json")


def stage(module, settings, run, name, seed=0):
    output, scratch = run / name, run / f".{name}"
    output.mkdir()
    scratch.mkdir(exist_ok=True)
    inputs = {upstream: run / upstream for upstream in module.inputs(settings)}
    module.run(settings, StageContext(stage=name, seed=seed, inputs=inputs, output=output, scratch=scratch))
    return json.loads((output / "metrics.json").read_text())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A shop with a Stage-2 policy; its users have not converged, so there is something to reward."""
    run = shop(tmp_path_factory.mktemp("rl") / "run", order_size=2, steps=30)
    stage(latent_sft, stage_2_config(epochs=3, batch_tokens=800, depth_weight=1.0), run, "latent_sft")
    return run


def config(**values):
    small = {
        "steps": 4, "learning_rate": 1e-3, "rollouts": {"prompts": 16, "group_size": 4, "beam_width": 6},
        "guards": {"users": 20, "validate_every": 2},
    }  # fmt: skip
    return parse_section(rl.Config, {**small, **values}, where="recipe: rl")


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def done(trained):
    return stage(rl, config(steps=6), trained, "done")


def curve_of(folder):
    return [json.loads(line) for line in (folder / "curve.jsonl").read_text().splitlines()]


def test_what_the_metrics_say_is_what_the_saved_model_does(trained, done):
    ranker = Ranker(load_reasoner(trained / "done"), codes_IL=CODES)
    interactions = Interactions.load(trained / "prepare")
    valid = interactions.cases(SPLIT_VALID).subset(20, 0)
    depths = ranker.rank(valid.histories, valid.baskets, k=1, beam_width=1).depths_Q
    assert done["depths"] == np.bincount(depths, minlength=N_MAX + 1).tolist()
    assert done["end"]["mean_depth"] == pytest.approx(depths.mean())
    assert done["end"]["nll"] == pytest.approx(answer_nll(ranker, valid), rel=1e-5)
    curve = curve_of(trained / "done")
    assert [record["step"] for record in curve] == list(range(7))
    assert [record["step"] for record in curve if "valid_ndcg@10" in record] == [0, 2, 4, 6]
    assert curve[done["best_step"]]["valid_ndcg@10"] == done["end"]["ndcg@10"]
    assert curve[0]["valid_ndcg@10"] == done["start"]["ndcg@10"]
    assert done["terminal_weight"] > 0
    for rows in done["users"].values():
        assert sum(row["num_users"] for row in rows) == 20
        assert np.sum([row["depths"] for row in rows], axis=0).tolist() == done["depths"]
        for row in rows:
            assert row["mean_depth"] == pytest.approx(np.average(range(N_MAX + 1), weights=row["depths"]))


def test_a_policy_that_nothing_improves_is_stage_2s_byte_for_byte(trained):
    metrics = stage(
        rl,
        config(learning_rate=0.3, depth={"learning_rate": 0.3, "cost": 0.0}, guards={"users": 60}),
        trained,
        "worse",
    )
    assert metrics["kept"] == "latent_sft"
    assert metrics["verdict"] == "RL did not improve validation: keeping the Stage-2 policy"
    assert metrics["end"] == metrics["start"]
    for name in WEIGHTS:
        assert (trained / "worse" / name).read_bytes() == (trained / "latent_sft" / name).read_bytes()
    assert len(curve_of(trained / "worse")) == 4
    assert metrics["stopped"].startswith("stopped at step 3: ")


def test_a_killed_stage_ends_with_the_same_bytes(trained, monkeypatch):
    options = {"rollouts": {"prompts": 8, "accumulate": 2, "group_size": 4, "replay": 0.3, "how": "sample"}}
    stage(rl, config(**options), trained, "undisturbed")
    monkeypatch.setattr(Pace, "due", lambda _: True)
    call, calls, rehearsed = Mixture.__call__, [], 4  # two steps of two batches tell how long it will take

    def killed(self, items, targets):
        calls.append(1)
        if len(calls) == rehearsed + 6:
            raise KeyboardInterrupt
        return call(self, items, targets)

    monkeypatch.setattr(Mixture, "__call__", killed)
    with pytest.raises(KeyboardInterrupt):
        stage(rl, config(**options), trained, "killed")
    shutil.rmtree(trained / "killed")
    stage(rl, config(**options), trained, "killed")
    assert len(calls) < rehearsed + 6 + 8  # it went on, and did not start again
    assert files(trained / "killed") == files(trained / "undisturbed")


def test_a_model_without_reasoning_is_trained_too(trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(
        trained, run, ignore=shutil.ignore_patterns("latent_sft", "done", "worse", "*killed", "und*")
    )
    stage(latent_sft, stage_2_config(loop={"depth": 0}, alignment="none"), run, "latent_sft")
    metrics = stage(rl, config(steps=2), run, "rl")
    assert metrics["depths"][0] == 20
    assert metrics["terminal_weight"] == 0
    assert "mean_depth" not in metrics["start"]
    with pytest.raises(ConfigError, match=r"rl\.depth\.target=2: .* reason for 0 steps always"):
        stage(rl, config(depth={"target": 2.0}), run, "refused")


def test_a_target_beyond_what_it_can_is_refused(trained):
    with pytest.raises(ConfigError, match=r"rl\.depth\.target=9: this model reasons for at most 4 steps"):
        stage(rl, config(depth={"target": 9.0}), trained, "refused")


def test_it_is_a_stage_and_what_it_trains_is_recommended_from():
    names = list(STAGES)
    assert names.index("latent_sft") < names.index("rl") < names.index("evaluate")
    assert POLICY_STAGES[-2:] == ("rl", "blend")


def test_ones_own_rewards_are_among_the_sources(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text("def f(items, targets, codes):\n    return items * 0.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    settings = config(grpo={"rewards": {"exact": 1.0, "my_rewards:f": 0.5}})
    assert rl.sources(settings) == (tmp_path / "my_rewards.py",)
    assert rl.sources(config()) == ()


@pytest.mark.parametrize("kept", ["rl", "latent_sft"])
def test_what_is_shown(tmp_path, kept):
    start = {"ndcg@10": 0.1, "hr@10": 0.2, "nll": 6.5, "mean_depth": 4.25}
    end = {"ndcg@10": 0.125, "hr@10": 0.25, "nll": 6.25, "mean_depth": 2.0}
    metrics = {
        "kept": kept, "verdict": "the verdict", "stopped": "stopped at step 3: why", "steps": 3, "best_step": 2,
        "validation_users": 1234, "start": start, "end": end,
    }  # fmt: skip
    write_json(tmp_path / "metrics.json", metrics)
    stream = io.StringIO()
    rl.show(tmp_path, Console(file=stream, width=200))
    text = stream.getvalue()
    for fact in (
        "0.1000",
        "0.1250",
        "4.25",
        "2.00",
        "6.500",
        "1,234",
        "the verdict",
        "stopped at step 3: why",
    ):
        assert fact in text


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rollouts": {"group_size": 1}}, "rl.rollouts.group_size"),
        ({"rollouts": {"how": "beams"}}, "did you mean 'beam'"),
        ({"grpo": {"ratio": "token"}}, "rl.grpo.ratio"),
        ({"depth": {"costs": 1}}, "did you mean 'cost'"),
        ({"guards": {"min_entropy": 2.0}}, "rl.guards.min_entropy"),
    ],
)
def test_mistakes_are_named(values, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        config(**values)


@torch.no_grad()
def test_who_gets_which_depth_does_not_depend_on_batching(trained):
    ranker = Ranker(load_reasoner(trained / "latent_sft"), codes_IL=CODES)
    interactions = Interactions.load(trained / "prepare")
    valid = interactions.cases(SPLIT_VALID).subset(15, 0)
    depths, entropy = chosen_depths(ranker, valid, batch_size=4)
    again, once_more = chosen_depths(ranker, valid, batch_size=15)
    np.testing.assert_array_equal(depths, again)
    np.testing.assert_allclose(entropy, once_more, atol=1e-5)
    assert (entropy > 0).all()
    assert (entropy < np.log(4) + 1e-6).all()  # there are four first codes
    counts = np.arange(NUM_ITEMS)
    users = depths_by_user(depths, entropy, valid, train_counts=counts, max_depth=N_MAX)
    buckets = {row["bucket"]: row for row in users["history_length"]}
    lengths = np.array([len(history) for history in valid.histories])
    chosen = (lengths >= 6) & (lengths <= 10)
    assert buckets["6-10"]["num_users"] == chosen.sum()
    assert buckets["6-10"]["mean_depth"] == pytest.approx(depths[chosen].mean())
    quarters = [row["num_users"] for row in users["first_code_entropy"]]
    assert sum(quarters) == 15
    assert max(quarters) - min(quarters) <= 1
