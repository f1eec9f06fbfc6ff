"""Stage 2 on a hand-made shop whose rationales are as long as a rule about the history says."""

import io
import json
import re
import shutil

import numpy as np
import polars as pl
import pytest
import torch
from rich.console import Console
from safetensors.numpy import load_file, save_file

from lasar.artifacts import StageContext, write_json
from lasar.config import parse_section
from lasar.cot.anchor_sources import Source
from lasar.cot.anchors import write_anchors, write_rows
from lasar.data.interactions import SPLIT_VALID, Interactions
from lasar.decoding.ranker import Ranker
from lasar.decoding.trie import Trie
from lasar.errors import ConfigError
from lasar.model.backbone import Backbone, build_preset, input_table, load_backbone, save_backbone
from lasar.model.reasoner import load_reasoner
from lasar.prompts.batches import epoch_batches
from lasar.prompts.vocabulary import Vocabulary
from lasar.sid.catalog import SidCatalog
from lasar.stages import latent_sft
from lasar.training.checkpoints import Pace
from lasar.training.latent_objective import LatentObjective
from lasar.training.losses import tree_loss
from lasar.training.validation import answer_nll, validation_metrics

NUM_USERS, NUM_ITEMS, N_MAX, WIDTH = 60, 24, 4, 32
CODES = np.stack(np.divmod(np.arange(NUM_ITEMS), 6), axis=1).astype(np.int32)


def depth_of(num_baskets):
    """The planted rule: rationales grow with the history."""
    return 1 if num_baskets < 2 else 2 if num_baskets < 4 else 3


def write_shop(run, *, order_size):
    """Users walk the items in order from a random start; the last basket is test, the one before it valid."""
    rng = np.random.default_rng(0)
    events = []
    for user in range(NUM_USERS):
        count, start = int(rng.integers(3, 9)), int(rng.integers(NUM_ITEMS))
        for basket in range(count):
            items = [(start + basket * order_size + n) % NUM_ITEMS for n in range(order_size)]
            events += [(user, item, basket, max(0, basket - count + 3)) for item in items]
    schema = {"user_index": pl.Int32, "item_index": pl.Int32, "basket": pl.Int32, "split": pl.Int8}
    for stage in ("prepare", "quantize", "sft", "anchor"):
        (run / stage).mkdir(parents=True)
    pl.DataFrame(events, schema=schema, orient="row").write_parquet(run / "prepare" / "interactions.parquet")
    split = "last_basket" if order_size > 1 else "leave_one_out"
    facts = {"num_users": NUM_USERS, "num_items": NUM_ITEMS, "split": split, "train_targets": "all"}
    write_json(run / "prepare" / "summary.json", facts)
    SidCatalog(CODES, 6).save(run / "quantize")
    return Interactions.load(run / "prepare")


def write_stage_1(run, interactions, *, steps):
    """A tiny model that has learned the walk a little."""
    vocabulary = Vocabulary(num_levels=2, codebook_size=6, orders=interactions.has_orders)
    model = build_preset("tiny", vocabulary=vocabulary, seed=0)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    trie, sequences = Trie(CODES, device="cpu"), interactions.train_sequences()
    for step in range(steps):
        (batch,) = epoch_batches(
            sequences, vocabulary.item_tokens(CODES), vocabulary=vocabulary, batch_tokens=100_000,
            train_targets="all", seed=0, epoch=step, split_orders=0.5,
        )  # fmt: skip
        optimizer.zero_grad()
        (tree_loss(model, batch, vocabulary=vocabulary, trie=trie).total / batch.num_targets).backward()
        optimizer.step()
    save_backbone(Backbone(model=model.eval(), vocabulary=vocabulary), run / "sft")


def write_rationales(run, interactions):
    """Anchors of every training row of the first two thirds of users; step t of all rows has a common direction."""
    rows = {
        (s.user_index, int(basket)): depth_of(int(basket)) if s.user_index < 40 else 0
        for s in interactions.train_sequences()
        for basket in np.unique(s.baskets)
    }
    vectors = 2 * np.random.default_rng(1).normal(size=(N_MAX, WIDTH)).astype(np.float32)
    folder, scratch = run / "anchor", run / "scratch"
    scratch.mkdir()
    write_anchors(
        folder / "anchors.safetensors", Source([np.arange(N_MAX)], lambda _: vectors), hidden_size=WIDTH,
        scratch=scratch,
    )  # fmt: skip
    write_rows(
        folder,
        user_index_R=np.array([user for user, _ in rows], np.int32),
        basket_R=np.array([basket for _, basket in rows], np.int32),
        counts_R=np.array(list(rows.values()), np.int64),
        anchors_S=np.array([t for count in rows.values() for t in range(count)], np.int32),
        texts=[f"thought {t}" for t in range(N_MAX)],
    )
    write_json(folder / "summary.json", {"max_depth": N_MAX, "teacher": "planted"})


def shop(folder, *, order_size=1, steps=0):
    interactions = write_shop(folder, order_size=order_size)
    write_stage_1(folder, interactions, steps=steps)
    write_rationales(folder, interactions)
    return folder


def config(**values):
    small = {
        "epochs": 1, "learning_rate": 1e-2, "dropout": 0.0, "precision": "fp32", "batch_tokens": 1500,
        "probe_users": 20, "validation": {"users": 10},
    }  # fmt: skip
    return parse_section(latent_sft.Config, {**small, **values}, where="recipe: latent_sft")


def train(run, name, *, seed=0, **values):
    settings = config(**values)
    output, scratch = run / name, run / f".{name}"
    output.mkdir()
    scratch.mkdir(exist_ok=True)
    inputs = {stage: run / stage for stage in latent_sft.inputs(settings)}
    context = StageContext(stage="latent_sft", seed=seed, inputs=inputs, output=output, scratch=scratch)
    latent_sft.run(settings, context)
    return json.loads((output / "metrics.json").read_text())


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A shop whose Stage 1 has learned nothing yet."""
    return shop(tmp_path_factory.mktemp("plain") / "run")


@pytest.fixture(scope="module")
def trained(plain):
    """Stage 2 on it, depths from the rationales; the last epoch is kept, however soon the answers are perfect."""
    measured = []

    def later_is_better(*arguments, **options):
        measured.append(validation_metrics(*arguments, **options))
        return measured[-1] | {"ndcg@10": float(len(measured))}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lasar.training.validation.validation_metrics", later_is_better)
        return train(plain, "trained", epochs=24, depth_weight=1.0, batch_tokens=600)


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_policy_head_learns_the_planted_rule(plain, trained):
    ranker = Ranker(load_reasoner(plain / "trained"), codes_IL=CODES)
    valid = Interactions.load(plain / "prepare").cases(SPLIT_VALID)
    depths = ranker.rank(valid.histories, valid.baskets, k=1, beam_width=1).depths_Q
    expected = [depth_of(len(history)) for history in valid.histories]
    assert len(set(expected)) == 3
    assert np.mean(depths == expected) >= 0.9
    assert trained["end"]["probe_depth_accuracy"] > 0.9 > trained["start"]["probe_depth_accuracy"]


def test_what_the_metrics_say_is_what_the_saved_model_does(plain, trained):
    ranker = Ranker(load_reasoner(plain / "trained"), codes_IL=CODES)
    valid = Interactions.load(plain / "prepare").cases(SPLIT_VALID).subset(10, 0)
    depths = ranker.rank(valid.histories, valid.baskets, k=1, beam_width=1).depths_Q
    assert trained["valid_depths"] == np.bincount(depths, minlength=N_MAX + 1).tolist()
    assert trained["end"]["nll"] == pytest.approx(answer_nll(ranker, valid), rel=1e-5)
    plain_lm = Ranker(load_reasoner(plain / "sft"), codes_IL=CODES)
    assert trained["start"]["stage1_nll"] == pytest.approx(answer_nll(plain_lm, valid), rel=1e-5)
    assert trained["teacher"] == "planted"
    share = trained["alpha"] * trained["start"]["probe_alignment"] / trained["start"]["probe_ce"]
    assert share == pytest.approx(0.2)
    curve = [json.loads(line) for line in (plain / "trained" / "curve.jsonl").read_text().splitlines()]
    assert len(curve) == 24
    assert curve[-1]["loss"] < curve[0]["loss"]
    best = curve[trained["best_epoch"] - 1]
    assert best["valid_ndcg@10"] == trained["valid_ndcg@10"] == max(r["valid_ndcg@10"] for r in curve)
    assert best["valid_nll"] == pytest.approx(trained["end"]["nll"], rel=1e-5)


def test_alignment_brings_the_steps_to_their_anchors(plain):
    options = {"epochs": 3, "batch_tokens": 600, "depth_weight": 0.0}
    aligned, free = train(plain, "kl", **options), train(plain, "none", alignment="none", **options)
    assert free["alpha"] == 0
    assert free["start"]["probe_alignment"] == aligned["start"]["probe_alignment"]
    assert aligned["end"]["probe_alignment"] < 0.8 * free["end"]["probe_alignment"]


def test_a_killed_run_ends_with_the_same_bytes(plain, monkeypatch):
    options = {
        "epochs": 2, "batch_tokens": 600, "dropout": 0.2, "ema_decay": 0.5, "accumulate": 2, "precision": "bf16",
    }  # fmt: skip
    train(plain, "undisturbed", **options)
    monkeypatch.setattr(Pace, "due", lambda _: True)
    call, calls = LatentObjective.__call__, []

    def killed(self, model, batch):
        calls.append(batch)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return call(self, model, batch)

    monkeypatch.setattr(LatentObjective, "__call__", killed)
    with pytest.raises(KeyboardInterrupt):
        train(plain, "hit", **options)
    done = len(calls)
    (plain / "hit").rmdir()
    train(plain, "hit", **options)
    assert files(plain / "hit") == files(plain / "undisturbed")
    again, batches = len(calls) - done, len(calls) - 2  # two batches were begun and lost
    assert again < batches, "it began from the start"


def test_the_depth_0_control_never_uses_the_markers(plain):
    metrics = train(plain, "control", loop={"depth": 0}, weight_decay=0.0, epochs=2)
    markers = slice(3, 6)
    before, after = (
        input_table(load_backbone(plain / name / "model")).detach() for name in ("sft", "control")
    )
    start = before[-6:].mean(0).expand(3, -1)  # of the last level's codes, which precede an answer here
    assert torch.equal(after[markers], start)
    assert not torch.equal(after[1], before[1])
    assert metrics["valid_depths"] == [10, 0, 0, 0, 0]
    assert metrics["start"]["nll"] == metrics["start"]["stage1_nll"]
    assert metrics["alpha"] == 0
    assert not [name for name in metrics["end"] if "alignment" in name or "step" in name]
    assert metrics["end"]["nll"] < metrics["start"]["nll"]


def test_a_fixed_depth_is_taken_and_the_policy_head_is_left_alone(plain):
    metrics = train(plain, "fixed", loop={"depth": 2}, weight_decay=0.0)
    assert metrics["valid_depths"] == [0, 0, 10, 0, 0]
    assert metrics["alpha"] > 0
    assert "probe_depth_accuracy" not in metrics["end"]
    assert load_reasoner(plain / "fixed").settings.fixed_depth == 2


def test_more_steps_than_anchors_are_refused(plain):
    message = r"latent_sft\.loop\.depth=5: the anchors are for at most 4 steps \(anchor\.max_depth\)"
    with pytest.raises(ConfigError, match=message):
        train(plain, "refused", loop={"depth": 5})


def test_rows_without_any_rationale_train_all_the_same(plain, tmp_path):
    run = tmp_path / "run"
    for stage in ("prepare", "quantize", "sft", "anchor"):
        shutil.copytree(plain / stage, run / stage)
    rows = load_file(plain / "anchor" / "rows.safetensors")
    rows = {**rows, "first": np.zeros_like(rows["first"]), "anchor": rows["anchor"][:0]}
    save_file(rows, run / "anchor" / "rows.safetensors")
    metrics = train(run, "latent_sft")
    assert metrics["alpha"] == 0
    assert sum(metrics["valid_depths"][1:]) == 10


def test_stage_2_starts_where_stage_1_ended(tmp_path):
    """Behind `<order>`, markers that look like one leave the answer nearly as it was; mean embeddings do not."""
    run = shop(tmp_path / "run", order_size=2, steps=60)
    excess = {}
    for how in ("opening", "mean"):
        start = train(run, how, loop={"depth": 1, "markers": how}, validation={"users": 60})["start"]
        excess[how] = start["nll"] - start["stage1_nll"]
    assert start["stage1_nll"] < 2.0  # of log(24) = 3.2: it did learn
    assert excess["opening"] < 0.1
    assert excess["opening"] < excess["mean"]


def test_what_is_shown(plain, trained):
    stream = io.StringIO()
    latent_sft.show(plain / "trained", Console(file=stream, width=200))
    text = stream.getvalue()
    assert "rationales by planted" in text
    for value in (
        f"{trained['start']['stage1_nll']:.3f}", f"{trained['end']['nll']:.3f}",
        f"{trained['start']['probe_alignment']:.3f}", f"{trained['valid_ndcg@10']:.4f}",
    ):  # fmt: skip
        assert value in text
    shares = {n: count for n, count in enumerate(trained["valid_depths"]) if count}
    assert all(f"{n}: {count * 10}%" in text for n, count in shares.items())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"loop": {"depth": -1}}, "latent_sft.loop.depth"),
        ({"loop": {"depth": "rational"}}, "latent_sft.loop.depth"),
        ({"loop": {"dept": 1}}, "did you mean 'depth'"),
        ({"alignment": "l2"}, "latent_sft.alignment"),
        ({"alignment_share": -0.1}, "greater than or equal to 0"),
    ],
)
def test_mistakes_are_named(values, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        config(**values)
