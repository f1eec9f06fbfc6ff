"""Explanations of an untrained model with planted anchors, against the same quantities recomputed."""

import numpy as np
import polars as pl
import pytest
import torch
from typer.testing import CliRunner

from lasar import cli
from lasar.artifacts import write_json
from lasar.cot.anchor_sources import Source
from lasar.cot.anchors import AnchorStore, write_anchors, write_rows
from lasar.cot.explain import explain
from lasar.errors import ConfigError, UnknownItemError
from lasar.model.backbone import Backbone, build_preset, input_table, output_table, save_backbone, trunk
from lasar.model.reasoner import LatentReasoner, ReasoningSettings, save_reasoner
from lasar.prompts.vocabulary import Vocabulary
from lasar.recommender import Recommender
from lasar.sid.catalog import SidCatalog

NUM_ITEMS, N_MAX, CHOSEN = 20, 3, 2
# Code 1 of the first level is never used, and the others are not in the order of the items.
CODES = np.stack([np.array([4, 0, 2, 3])[np.arange(NUM_ITEMS) // 5], np.arange(NUM_ITEMS) % 5], axis=1)
VOCABULARY = Vocabulary(num_levels=2, codebook_size=5)
HISTORY = ["sku3", "sku12"]
COUNTS = [(item * 7) % 5 + 1 for item in range(NUM_ITEMS)]  # training events of each item


def reasoner(**settings):
    torch.manual_seed(0)
    model = build_preset("tiny", vocabulary=VOCABULARY, seed=1)
    with torch.no_grad():
        for matrix in model.model.layers.parameters():
            matrix.mul_(8 if matrix.ndim == 2 else 1)  # else a step hardly changes anything
    made = LatentReasoner(
        model, vocabulary=VOCABULARY, settings=ReasoningSettings(max_depth=N_MAX, head_width=8, **settings)
    )
    with torch.no_grad():
        made.policy_head.outer.weight.zero_()
        made.policy_head.outer.bias.copy_(torch.tensor([0.2, 0.5, 0.3]).log())
    return made.eval()


def states(model):
    """Hidden states at `<s>` and every slot, and behind an `<e>` that follows each, by full recomputation."""
    table = input_table(model.backbone)
    tokens = VOCABULARY.render_history(
        VOCABULARY.item_tokens(CODES), np.array([3, 12]), np.array([0, 1]), open_order=True
    )
    sequence = [table[token] for token in [*tokens.tolist(), VOCABULARY.latent_start]]
    found, ends = [], []
    for _ in range(CHOSEN + 1):
        found.append(last_state(model, sequence))
        ends.append(last_state(model, [*sequence, table[VOCABULARY.latent_end]]))
        sequence.append(found[-1])
    return torch.stack(found), torch.stack(ends)


def last_state(model, sequence):
    with torch.no_grad():
        return trunk(model.backbone)(inputs_embeds=torch.stack(sequence)[None]).last_hidden_state[0, -1]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    for stage in ("prepare", "quantize", "sft", "latent_sft", "anchor", "scratch"):
        (run / stage).mkdir()
    item = pl.Series(range(NUM_ITEMS), dtype=pl.Int32)
    titles = ["" if i == 7 else f"Tea [no. {i}]" for i in range(NUM_ITEMS)]
    pl.DataFrame(
        {
            "item_index": item,
            "item_id": [f"sku{i}" for i in range(NUM_ITEMS)],
            "title": titles,
            "text": titles,
        }
    ).write_parquet(run / "prepare" / "items.parquet")
    pl.DataFrame({"user_index": pl.Series([0], dtype=pl.Int32), "user_id": ["ann"]}).write_parquet(
        run / "prepare" / "users.parquet"
    )
    taken = np.repeat(np.arange(NUM_ITEMS), COUNTS)
    pl.DataFrame(
        {
            "user_index": pl.Series([0] * len(taken), dtype=pl.Int32),
            "item_index": pl.Series(taken, dtype=pl.Int32),
            "basket": pl.Series(range(len(taken)), dtype=pl.Int32),
            "split": pl.Series([0] * len(taken), dtype=pl.Int8),
        }
    ).write_parquet(run / "prepare" / "interactions.parquet")
    facts = {"num_users": 1, "num_items": NUM_ITEMS, "split": "leave_one_out", "train_targets": "all"}
    write_json(run / "prepare" / "summary.json", facts)
    SidCatalog(CODES.astype(np.int32), 5).save(run / "quantize")
    save_backbone(Backbone(model=reasoner().backbone, vocabulary=VOCABULARY), run / "sft")
    save_reasoner(reasoner(), run / "latent_sft")
    # Two anchors near each state of the history's loop, in random directions from each other, and noise.
    latents, _ = states(reasoner())
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(40, 32)).astype(np.float32)
    near = [state * scale for state in latents.numpy() for scale in (1.0, 1.01)]
    vectors = np.concatenate([np.array(near, np.float32), noise])
    write_anchors(
        run / "anchor" / "anchors.safetensors", Source([np.arange(len(vectors))], lambda _: vectors),
        hidden_size=32, scratch=run / "scratch",
    )  # fmt: skip
    write_rows(
        run / "anchor", user_index_R=np.array([0], np.int32), basket_R=np.array([0], np.int32),
        counts_R=np.array([1]), anchors_S=np.array([0], np.int32),
        texts=[f"[words] {n}" for n in range(len(vectors))],
    )  # fmt: skip
    write_json(run / "anchor" / "summary.json", {"max_depth": N_MAX})
    return run


@pytest.fixture(scope="module")
def recommender(run):
    return Recommender.load(run)


@pytest.fixture(scope="module")
def found(run, recommender):
    return explain(recommender, AnchorStore.load(run / "anchor"), HISTORY, k=4, segments=2, directions=3)


def test_depth_and_its_distribution(found):
    assert found.depth == CHOSEN
    assert found.distribution == pytest.approx([0.2, 0.5, 0.3], abs=1e-5)
    assert [step.number for step in found.steps] == [0, 1, 2]


def test_every_step_finds_the_anchor_that_lies_where_it_is(found):
    for step in found.steps:
        (text, cosine), (_, second) = step.segments
        assert text == f"[words] {2 * step.number}"
        assert cosine == pytest.approx(1, abs=1e-4)
        assert 1 >= cosine >= second >= -1


def test_directions_are_first_codes_behind_an_end_at_that_step(found):
    _, ends = states(reasoner())
    start, used = VOCABULARY.level_start(0), [0, 2, 3, 4]
    probabilities = (ends @ output_table(reasoner().backbone)[[start + code for code in used]].T).softmax(-1)
    for step, expected in zip(found.steps, probabilities, strict=True):
        best = expected.argsort(descending=True)[:3].tolist()
        assert [way.code for way in step.directions] == [used[n] for n in best]
        assert [way.probability for way in step.directions] == pytest.approx(
            expected[best].tolist(), abs=1e-4
        )


def test_titles_are_of_the_best_known_items_under_the_code(found):
    ways = [way for step in found.steps for way in step.directions]
    for way in ways:
        under = [item for item in range(NUM_ITEMS) if CODES[item, 0] == way.code]
        popular = sorted(under, key=lambda item: -COUNTS[item])[:3]
        assert {COUNTS[item] for item in popular} == {
            COUNTS[int(title.removeprefix("sku").removeprefix("Tea [no. ").removesuffix("]"))]
            for title in way.titles
        }
    assert len({way.code for way in ways}) > 1


def test_lists_are_those_of_the_recommender(found, recommender):
    assert list(found.lists) == [1, 2, 3]
    for depth, listed in found.lists.items():
        assert listed == recommender.recommend(HISTORY, 4, depth=depth)


def test_there_is_no_list_beyond_the_deepest(run):
    deepest = Recommender.load(run)
    deepest.ranker.reasoner.settings = ReasoningSettings(max_depth=N_MAX, head_width=8, fixed_depth=N_MAX)
    assert list(explain(deepest, AnchorStore.load(run / "anchor"), HISTORY, k=2).lists) == [2, 3]


def test_seen_items_and_small_catalogues(run, recommender):
    store = AnchorStore.load(run / "anchor")
    unseen = explain(recommender, store, HISTORY, k=18, exclude_seen=True, directions=9, segments=99)
    assert all(len(listed) == 18 for listed in unseen.lists.values())
    assert not {"sku3", "sku12"} & {item.item_id for item in unseen.lists[CHOSEN]}
    assert [len(step.directions) for step in unseen.steps] == [4, 4, 4]  # as many as there are codes in use
    assert [len(step.segments) for step in unseen.steps] == [46, 46, 46]


def test_what_cannot_be_explained(run, recommender):
    store = AnchorStore.load(run / "anchor")
    with pytest.raises(ConfigError, match="answers without latent steps"):
        explain(Recommender.load(run, model="sft"), store, HISTORY)
    with pytest.raises(UnknownItemError, match="sku99"):
        explain(recommender, store, ["sku99"])


def lasar(*arguments):
    return CliRunner().invoke(cli.app, list(arguments), env={"COLUMNS": "200"})


def test_the_command_explains_a_history_and_a_user(run, found):
    done = lasar("explain", str(run), "--history", "sku3", "--history", "sku12", "--k", "4")
    assert done.exit_code == 0, done.output
    for fact in ("latent steps: 2", "2: 50%", "[words] 2", "2 (chosen)", "Tea [no. 3]"):
        assert fact in done.output
    assert lasar("explain", str(run), "--user", "ann", "--k", "3").exit_code == 0
    assert isinstance(lasar("explain", str(run), "--history", "sku99").exception, UnknownItemError)


def test_the_command_recommends_at_a_depth(run, recommender):
    outputs = [
        lasar("recommend", str(run), "--history", "sku3", "--k", "4", "--json", "--depth", depth).output
        for depth in ("auto", "2", "0", "3")
    ]
    assert outputs[0] == outputs[1]
    assert len(set(outputs)) == 3
    assert '"item_id"' in outputs[0]


def test_a_sampled_depth_follows_its_seed(run):
    def sampled(seed):
        return lasar(
            "recommend", str(run), "--history", "sku3", "--json", "--depth", "sampled", "--seed", str(seed)
        ).output

    outputs = [sampled(seed) for seed in range(8)]
    assert outputs == [sampled(seed) for seed in range(8)]
    assert len(set(outputs)) > 1


@pytest.mark.parametrize("depth", ["deep", "-1", "1.5"])
def test_a_depth_that_is_no_depth_is_refused(run, depth):
    done = lasar("recommend", str(run), "--history", "sku3", f"--depth={depth}")
    assert done.exit_code == 2
    assert "give auto, sampled, or a number of latent steps" in done.output


def test_one_of_history_and_user(run):
    for arguments in ([], ["--history", "sku3", "--user", "ann"]):
        done = lasar("explain", str(run), *arguments)
        assert done.exit_code == 2
        assert "either --history" in done.output
