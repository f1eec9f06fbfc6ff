"""Beam search against plain arithmetic: every item scored alone, one sequence at a time, without cache or mask."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from lasar.decoding import beam
from lasar.decoding.beam import beam_search
from lasar.decoding.ranker import Ranker
from lasar.decoding.trie import ItemFilter, Trie
from lasar.engine.prefix import FusedPrefix, encode
from lasar.engine.weights import FusedWeights
from lasar.errors import ConfigError
from lasar.model.backbone import build_preset
from lasar.model.prompt import encode_prompts
from lasar.model.reasoner import without_reasoning
from lasar.prompts.vocabulary import Vocabulary, pad_right

VOCABULARY = Vocabulary(num_levels=3, codebook_size=5, normalise="trie")
NORMALISERS = ("trie", "level", "sid", "full")


def random_codes(num_items: int, seed: int, vocabulary: Vocabulary = VOCABULARY) -> np.ndarray:
    size, levels = vocabulary.codebook_size, vocabulary.num_levels
    chosen = np.random.default_rng(seed).choice(size**levels, size=num_items, replace=False)
    return np.stack([chosen // size**level % size for level in range(levels)], axis=1).astype(np.int32)


def sharpened(model: PreTrainedModel) -> PreTrainedModel:
    # Fresh weights give nearly uniform codes; larger ones make a wrong mask or position visible in the ranking.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(4.0)
    return model.eval()


def architectures() -> dict[str, PreTrainedModel]:
    torch.manual_seed(0)
    small = {
        "vocab_size": VOCABULARY.size,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    return {
        "preset": build_preset("tiny", vocabulary=VOCABULARY, seed=1),
        "qwen2": Qwen2ForCausalLM(Qwen2Config(**small)),
        "llama": LlamaForCausalLM(LlamaConfig(**small)),
        "gpt2": GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY.size, n_embd=32, n_layer=2, n_head=4)),
    }


MODELS = {name: sharpened(model) for name, model in architectures().items()}


def competitors(vocabulary: Vocabulary, codes_IL: np.ndarray, prefix: tuple[int, ...]) -> list[int]:
    """Tokens that a code after `prefix` (codes) competes with, by the definition and not by the trie's arrays."""
    level = len(prefix)
    everything = {
        "full": range(vocabulary.size),
        "sid": range(vocabulary.first_code, vocabulary.size),
        "level": range(vocabulary.level_start(level), vocabulary.level_start(level + 1)),
    }
    if vocabulary.normalise != "trie":
        return list(everything[vocabulary.normalise])
    return sorted(
        {
            vocabulary.level_start(level) + row[level]
            for row in codes_IL.tolist()
            if tuple(row[:level]) == prefix
        }
    )


def code_logprob(
    logits: torch.Tensor, vocabulary: Vocabulary, codes_IL: np.ndarray, path: tuple[int, ...]
) -> float:
    tokens = competitors(vocabulary, codes_IL, path[:-1])
    chosen = vocabulary.level_start(len(path) - 1) + path[-1]
    return logits.double()[tokens].log_softmax(-1)[tokens.index(chosen)].item()


def brute_force(
    model: PreTrainedModel, prompt: np.ndarray, codes_IL: np.ndarray, vocabulary: Vocabulary = VOCABULARY
) -> np.ndarray:
    """Log-probability of every item, each as a sequence of its own through the whole model."""
    scores = []
    for codes, tokens in zip(codes_IL.tolist(), vocabulary.item_tokens(codes_IL), strict=True):
        ids = torch.tensor(np.concatenate([prompt, tokens])[None].astype(np.int64))
        logits = model(input_ids=ids).logits[0]
        levels = range(vocabulary.num_levels)
        scores.append(
            sum(
                code_logprob(logits[len(prompt) - 1 + level], vocabulary, codes_IL, tuple(codes[: level + 1]))
                for level in levels
            )
        )
    return np.array(scores)


def search(model, prompts, codes_IL, beam_width, vocabulary=VOCABULARY, **filters):
    ids, lengths = pad_right(prompts, vocabulary.pad)
    trie = Trie(codes_IL)
    item_filter = ItemFilter(trie, **filters) if filters else None
    return beam_search(
        encode_prompts(model, torch.tensor(ids), torch.tensor(lengths)),
        vocabulary=vocabulary,
        trie=trie,
        beam_width=beam_width,
        item_filter=item_filter,
    )


def encoded_prompts(model, prompts, vocabulary):
    ids, lengths = pad_right(prompts, vocabulary.pad)
    return encode_prompts(model, torch.tensor(ids), torch.tensor(lengths))


def fused_prompts(model, prompts):
    ids, lengths = pad_right(prompts, 0)
    weights = FusedWeights(model.requires_grad_(False))
    return encode(weights, torch.tensor(ids), torch.tensor(lengths), opened=False, room=0)


def make_prompt(codes_IL: np.ndarray, items: list[int]) -> np.ndarray:
    tokens = VOCABULARY.item_tokens(codes_IL)
    return VOCABULARY.render_history(
        tokens, np.array(items, np.int32), np.arange(len(items), dtype=np.int32), open_order=True
    )


@pytest.mark.parametrize(
    ("name", "normalise"), [*((name, "trie") for name in MODELS), *(("llama", n) for n in NORMALISERS[1:])]
)
@torch.no_grad()
def test_beam_that_covers_the_catalogue_is_brute_force(name, normalise):
    vocabulary = dataclasses.replace(VOCABULARY, normalise=normalise)
    codes = random_codes(40, seed=3)
    prompts = [make_prompt(codes, history) for history in ([], [7], [3, 1, 4, 1, 5], [2, 30])]
    beams = search(MODELS[name], prompts, codes, 60, vocabulary)
    for row, prompt in enumerate(prompts):
        expected = brute_force(MODELS[name], prompt, codes, vocabulary)
        items, scores = beams.items_BW[row].numpy(), beams.scores_BW[row].numpy()
        assert sorted(items[items >= 0]) == list(range(40))
        assert np.isneginf(scores[items < 0]).all()
        np.testing.assert_allclose(scores[items >= 0], expected[items[items >= 0]], atol=2e-5)
        assert (np.diff(scores[items >= 0]) <= 0).all()


@pytest.mark.parametrize("known", [0, 25, 40])  # items with tokens of their own; the others were added later
@torch.no_grad()
def test_the_logit_of_an_items_token_counts_in_answers(known):
    vocabulary = dataclasses.replace(VOCABULARY, num_items=known, item_answers=True)
    model, codes = sharpened(build_preset("tiny", vocabulary=vocabulary, seed=1)), random_codes(40, seed=3)
    tokens = vocabulary.item_tokens(codes)
    baskets = np.zeros(2, np.int32)
    prompt = vocabulary.render_history(tokens, np.array([7, 30], np.int32), baskets, open_order=True)
    found = search(model, [prompt], codes, 60, vocabulary)
    scores = found.scores_BW[0][found.items_BW[0] >= 0].numpy()
    items = found.items_BW[0][found.items_BW[0] >= 0].tolist()
    assert sorted(items) == list(range(40))
    for item, score in zip(items, scores, strict=True):
        total, path = 0.0, codes[item].tolist()
        for level in range(vocabulary.num_levels):
            written = [vocabulary.level_start(i) + code for i, code in enumerate(path[:level])]
            logits = model(torch.tensor([[*prompt.tolist(), *written]])).logits[0, -1].double()
            rivals = {
                row[level]: logits[vocabulary.level_start(level) + row[level]]
                for row in codes.tolist() if row[:level] == path[:level]
            }  # fmt: skip
            if level == vocabulary.num_levels - 1:
                for other, row in enumerate(codes[:known].tolist()):
                    if row[:-1] == path[:-1]:
                        rivals[row[-1]] = rivals[row[-1]] + logits[vocabulary.first_item + other]
            total += float(torch.stack(list(rivals.values())).log_softmax(0)[list(rivals).index(path[level])])
        assert score == pytest.approx(total, abs=2e-5)


@settings(max_examples=25, deadline=None)
@given(
    num_items=st.integers(1, 60),
    beam_width=st.integers(1, 20),
    seed=st.integers(0, 50),
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=4),
)
@torch.no_grad()
def test_narrow_beam_equals_expanded_beam_search(num_items, beam_width, seed, lengths):
    """The same search with the prompt repeated for every beam and recomputed at every step."""
    model, codes = MODELS["qwen2"], random_codes(num_items, seed)
    rng = np.random.default_rng(seed)
    prompts = [make_prompt(codes, rng.integers(0, num_items, length).tolist()) for length in lengths]
    beams = search(model, prompts, codes, beam_width)
    tokens = VOCABULARY.item_tokens(codes)
    for row, prompt in enumerate(prompts):
        kept: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
        for level in range(VOCABULARY.num_levels):
            grown = []
            for score, path in kept:
                ids = torch.tensor(np.concatenate([prompt, path])[None].astype(np.int64))
                logits = model(input_ids=ids).logits[0, -1]
                taken = tuple(t - VOCABULARY.level_start(i) for i, t in enumerate(path))
                for t in {int(t[level]) for t in tokens if tuple(t[:level].tolist()) == path}:
                    logprob = code_logprob(
                        logits, VOCABULARY, codes, (*taken, t - VOCABULARY.level_start(level))
                    )
                    grown.append((score + logprob, (*path, t)))
            kept = sorted(grown, reverse=True)[:beam_width]
        found = beams.items_BW[row][beams.items_BW[row] >= 0]
        assert len(found) == len(kept)
        np.testing.assert_allclose(beams.scores_BW[row][: len(kept)], [score for score, _ in kept], atol=2e-5)
        assert {tuple(tokens[i].tolist()) for i in found} == {path for _, path in kept}


@settings(max_examples=30, deadline=None)
@given(
    num_items=st.integers(1, 60),
    seed=st.integers(0, 50),
    listed=st.integers(0, 60),
    allow=st.booleans(),
)
@torch.no_grad()
def test_filters_never_leak_and_never_starve(num_items, seed, listed, allow):
    model, codes = MODELS["preset"], random_codes(num_items, seed)
    rng = np.random.default_rng(seed)
    lists = [rng.choice(num_items, size=min(listed, num_items), replace=False) for _ in range(2)]
    lists[1] = lists[1][: len(lists[1]) // 2]
    prompts = [make_prompt(codes, []), make_prompt(codes, [0])]
    beams = search(model, prompts, codes, beam_width=64, items=lists, allow=allow)
    for row, prompt in enumerate(prompts):
        allowed = set(lists[row].tolist()) if allow else set(range(num_items)) - set(lists[row].tolist())
        items = beams.items_BW[row].tolist()
        found = [item for item in items if item >= 0]
        assert sorted(found) == sorted(allowed)
        expected = brute_force(model, prompt, codes)
        np.testing.assert_allclose(beams.scores_BW[row][: len(found)], expected[found], atol=2e-5)


@pytest.mark.parametrize("normalise", ["trie", "full"])
@pytest.mark.parametrize("levels", [1, 2, 3])
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    num_items=st.integers(1, 60),
    beam_width=st.integers(1, 30),
    wanted=st.integers(1, 30),
    seed=st.integers(0, 50),
    forbidden=st.integers(0, 60),
)
@torch.no_grad()
def test_the_best_few_are_the_first_of_all_beams(
    monkeypatch, levels, normalise, num_items, beam_width, wanted, seed, forbidden
):
    vocabulary = Vocabulary(
        num_levels=levels, codebook_size={1: 64, 2: 16, 3: 5}[levels], normalise=normalise,
        num_items=num_items // 2, item_answers=normalise == "trie",
    )  # fmt: skip
    model = sharpened(build_preset("tiny", vocabulary=vocabulary, seed=seed))
    codes, rng = random_codes(num_items, seed, vocabulary), np.random.default_rng(seed)
    tokens = vocabulary.item_tokens(codes)
    prompts = [
        vocabulary.render_history(
            tokens, rng.integers(0, num_items, length).astype(np.int32), np.arange(length, dtype=np.int32),
            open_order=True,
        )
        for length in (0, 1, 5)
    ]  # fmt: skip
    lists = [rng.choice(num_items, size=min(forbidden, num_items), replace=False) for _ in prompts]
    monkeypatch.setattr(beam, "_WORTH", 0)
    monkeypatch.setattr(beam, "_FIRST", 1)
    for fused in (False, True):
        encoded = fused_prompts(model, prompts) if fused else encoded_prompts(model, prompts, vocabulary)
        again = fused_prompts(model, prompts) if fused else encoded_prompts(model, prompts, vocabulary)
        trie = Trie(codes)
        options = {
            "vocabulary": vocabulary, "trie": trie, "beam_width": beam_width,
            "item_filter": ItemFilter(trie, items=lists, allow=False),
        }  # fmt: skip
        every = beam_search(encoded, **options)
        few = beam_search(again, **options, wanted=wanted)
        width = min(wanted, every.items_BW.shape[1])
        assert few.items_BW.shape[1] == width
        torch.testing.assert_close(few.scores_BW, every.scores_BW[:, :width], atol=1e-5, rtol=1e-5)
        apart = (every.scores_BW.diff(dim=1).abs() < 1e-4).any(1)  # near ties may change places
        assert torch.equal(few.items_BW[~apart], every.items_BW[~apart][:, :width])


@torch.no_grad()
def test_beams_that_cannot_matter_are_not_computed(monkeypatch):
    vocabulary = Vocabulary(num_levels=2, codebook_size=32)
    model = sharpened(sharpened(build_preset("tiny", vocabulary=vocabulary, seed=1))).requires_grad_(False)
    codes = np.stack(np.divmod(np.arange(1024), 32), axis=1).astype(np.int32)
    computed = []
    monkeypatch.setattr(beam, "_WORTH", 0)
    whole = FusedPrefix._beams
    monkeypatch.setattr(
        FusedPrefix,
        "_beams",
        lambda self, ids_n, *rest: computed.append(len(ids_n)) or whole(self, ids_n, *rest),
    )
    ranker = Ranker(without_reasoning(model, vocabulary=vocabulary), codes_IL=codes)
    histories = [np.array([1, 2, 3], np.int32)]
    lists = {}
    for k in (1, 32):
        lists[k] = ranker.rank(histories, [np.arange(3, dtype=np.int32)], k=k, beam_width=32).items_QK[0]
        computed.append("")
    assert lists[1][0] == lists[32][0]
    assert computed[0] == 12
    assert sum(computed[: computed.index("")]) < 32
    assert computed[computed.index("") :] == ["", 32, ""]


def test_ranker_does_not_depend_on_batching():
    codes = random_codes(50, seed=9)
    ranker = Ranker(without_reasoning(MODELS["llama"], vocabulary=VOCABULARY), codes_IL=codes)
    rng = np.random.default_rng(0)
    histories = [rng.integers(0, 50, n).astype(np.int32) for n in (0, 9, 3, 3, 1, 6, 2)]
    baskets = [np.arange(len(h), dtype=np.int32) for h in histories]
    together = ranker.rank(histories, baskets, k=10, beam_width=20, exclude_seen=True, batch_size=4)
    for row, (history, basket) in enumerate(zip(histories, baskets, strict=True)):
        items, scores, _ = ranker.rank([history], [basket], k=10, beam_width=20, exclude_seen=True)
        assert items[0].tolist() == together[0][row].tolist()
        np.testing.assert_allclose(scores[0], together[1][row], atol=1e-5)
        assert not set(items[0].tolist()) & set(history.tolist())


def test_ranker_combines_allow_and_exclude():
    codes = random_codes(50, seed=9)
    ranker = Ranker(without_reasoning(MODELS["preset"], vocabulary=VOCABULARY), codes_IL=codes)
    empty = np.zeros(0, np.int32)
    items, *_ = ranker.rank(
        [empty], [empty], k=5, beam_width=10,
        allow=[np.array([1, 2, 3], np.int32)], exclude=[np.array([2], np.int32)],
    )  # fmt: skip
    assert sorted(items[0].tolist()) == [-1, -1, -1, 1, 3]


def test_k_above_beam_width_is_refused():
    ranker = Ranker(
        without_reasoning(MODELS["preset"], vocabulary=VOCABULARY), codes_IL=random_codes(5, seed=0)
    )
    with pytest.raises(ConfigError, match=r"k=20 exceeds beam_width=10"):
        ranker.rank([], [], k=20, beam_width=10)


@torch.no_grad()
def test_probabilities_over_the_catalogue_sum_to_one():
    codes = random_codes(30, seed=4)
    beams = search(MODELS["preset"], [make_prompt(codes, [1, 2])], codes, beam_width=60)
    assert beams.scores_BW.exp().sum().item() == pytest.approx(1.0, abs=1e-5)
