"""The fused path against the generic tree: same lists, same scores, same states."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from lasar.decoding.ranker import Ranker
from lasar.engine.prefix import encode
from lasar.engine.weights import FusedWeights
from lasar.model.backbone import build_preset
from lasar.model.prompt import encode_prompts
from lasar.model.reasoner import LatentReasoner, ReasoningSettings
from lasar.prompts.vocabulary import Vocabulary, pad_right

VOCABULARY = Vocabulary(num_levels=3, codebook_size=5, orders=True)
TINY = {
    "vocab_size": VOCABULARY.size, "hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
BACKBONES = {
    "qwen3": lambda: build_preset("tiny", vocabulary=VOCABULARY, seed=1),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(num_hidden_layers=3, **TINY)),
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(num_hidden_layers=2, tie_word_embeddings=True, attention_bias=False, **TINY)
    ),
    "llama3": lambda: LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, rope_parameters=LLAMA3, **TINY)),
}


def backbone(name: str) -> PreTrainedModel:
    """Small, with weights that make a wrong mask, position, norm or bias visible."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BACKBONES[name]().eval()
        with torch.no_grad():
            for path, parameter in model.named_parameters():
                if parameter.ndim == 2:
                    parameter.mul_(4.0)
                else:
                    parameter.add_(0.3 * torch.randn_like(parameter))
                assert "norm" in path or "bias" in path or parameter.ndim == 2
    return model.requires_grad_(False)


MODELS = {name: backbone(name) for name in BACKBONES}


def reasoner(name: str = "qwen3", vocabulary: Vocabulary = VOCABULARY, **loop) -> LatentReasoner:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        settings = ReasoningSettings(max_depth=4, head_width=8, **loop)
        model = LatentReasoner(MODELS[name], vocabulary=vocabulary, settings=settings).eval()
        with torch.no_grad():
            model.policy_head.outer.weight.mul_(8.0)  # requests of one batch choose different depths
            if model.step_table_ND is not None:
                model.step_table_ND.normal_()
    return model


def random_codes(num_items: int, seed: int = 0) -> np.ndarray:
    chosen = np.random.default_rng(seed).choice(125, size=num_items, replace=False)
    return np.stack([chosen // 25, chosen // 5 % 5, chosen % 5], axis=1).astype(np.int32)


def both(model: LatentReasoner, codes: np.ndarray, lengths, *, seed: int = 0, **options):
    """Lists of the two paths for random histories of given lengths."""
    rng = np.random.default_rng(seed)
    histories = [rng.integers(len(codes), size=n).astype(np.int32) for n in lengths]
    baskets = [np.sort(rng.integers(3, size=n)).astype(np.int32) for n in lengths]
    rankers = [Ranker(model, codes_IL=codes, fused=fused) for fused in (True, False)]
    assert rankers[0].engine == "fused"
    assert rankers[1].engine.startswith("generic: ")
    return [ranker.rank(histories, baskets, **options) for ranker in rankers]


def assert_same(fused, generic, *, tolerance: float = 1e-5) -> None:
    np.testing.assert_array_equal(fused.depths_Q, generic.depths_Q)
    found = generic.items_QK >= 0
    np.testing.assert_array_equal(fused.items_QK >= 0, found)
    np.testing.assert_allclose(fused.scores_QK[found], generic.scores_QK[found], atol=tolerance)
    # Where items differ their scores are equal to rounding: the order of a tie is nobody's promise.
    for row, column in zip(*np.nonzero(fused.items_QK != generic.items_QK), strict=True):
        others = np.abs(generic.scores_QK[row] - generic.scores_QK[row, column]) < tolerance
        assert others.sum() > 1 or column == generic.items_QK.shape[1] - 1


@settings(max_examples=40)
@given(
    name=st.sampled_from(list(MODELS)),
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=6),
    depth=st.sampled_from(["auto", "sampled", 0, 1, 4]),
    feedback=st.sampled_from(["raw", "norm_matched", "soft_token"]),
    step_embeddings=st.booleans(),
    closing=st.sampled_from(["marker", "opening"]),
    normalise=st.sampled_from(["trie", "level", "full"]),
    beam_width=st.integers(1, 60),
    num_items=st.integers(1, 100),
    seed=st.integers(0, 99),
)
def test_ranked_lists_are_the_generic_ones(
    name, lengths, depth, feedback, step_embeddings, closing, normalise, beam_width, num_items, seed
):
    model = reasoner(
        name, dataclasses.replace(VOCABULARY, normalise=normalise), feedback=feedback,
        step_embeddings=step_embeddings, closing=closing,
    )  # fmt: skip
    assert_same(
        *both(
            model, random_codes(num_items, seed), lengths, seed=seed, k=beam_width, beam_width=beam_width,
            depth=depth, batch_size=4,
        )
    )  # fmt: skip


@pytest.mark.parametrize("num_items", [1, 2, 49, 50, 51])
@pytest.mark.parametrize("left", [0, 1, 2, 3, None])
def test_small_catalogues_and_starved_filters(num_items, left):
    codes, lengths = random_codes(num_items), (0, 3, 7)
    allow = None if left is None else [np.arange(min(left, num_items), dtype=np.int32)] * len(lengths)
    fused, generic = both(reasoner(), codes, lengths, k=50, beam_width=50, allow=allow)
    assert_same(fused, generic)
    expected = set(range(num_items if left is None else min(left, num_items)))
    for row in fused.items_QK[:, :50]:
        found = row[row >= 0]
        assert len(found) == min(50, len(expected))
        assert set(found) <= expected
        assert len(set(found)) == len(found)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("depth", [0, 2])
def test_bf16_rounds_scores_and_nothing_else(name, depth):
    # Weights as a trained model has them: those of MODELS are four times as large, and so are their roundings.
    model = copy.deepcopy(reasoner(name))
    with torch.no_grad():
        for parameter in model.backbone.parameters():
            if parameter.ndim == 2:
                parameter.div_(4.0)
    codes, rng = random_codes(100), np.random.default_rng(0)
    histories = [rng.integers(100, size=n).astype(np.int32) for n in (0, 3, 7, 12)]
    lists = []
    for precision in ("fp32", "bf16"):
        ranker = Ranker(model, codes_IL=codes, precision=precision)
        ranked = ranker.rank(histories, histories, k=100, beam_width=125, depth=depth)
        lists.append({
            (row, item): score
            for row, (items, scores) in enumerate(zip(ranked.items_QK.tolist(), ranked.scores_QK, strict=True))
            for item, score in zip(items, scores, strict=True)
        })  # fmt: skip
    exact, rounded = lists
    assert exact.keys() == rounded.keys()  # every item, for every request
    errors = np.array([rounded[key] - exact[key] for key in exact])
    assert 1e-5 < np.abs(errors).max() < 0.05
    for row in range(len(histories)):
        # Probabilities still sum to 1 over the catalogue.
        assert sum(np.exp(s) for (r, _), s in rounded.items() if r == row) == pytest.approx(1, abs=1e-4)


def test_another_catalogue_shares_what_was_arranged():
    ranker = Ranker(reasoner(), codes_IL=random_codes(60))
    history = [np.array([3, 1, 4], np.int32)]
    larger = ranker.with_codes(random_codes(100))  # of a ranker that has never ranked itself
    assert larger._fused is ranker._fused is not None
    assert ranker.with_codes(random_codes(80))._fused is ranker._fused
    expected = Ranker(reasoner(), codes_IL=random_codes(100), fused=False)
    assert_same(*(r.rank(history, history, k=5, beam_width=10) for r in (larger, expected)))
    half = Ranker(reasoner(), codes_IL=random_codes(60), precision="bf16").with_codes(random_codes(100))
    assert half.engine == "fused, bf16"


def test_the_batches_above_mix_depths():
    fused, _ = both(reasoner(), random_codes(100), range(12), k=5, beam_width=10, batch_size=12)
    assert len(set(fused.depths_Q)) > 1


def test_long_prompts_outgrow_the_table_of_positions():
    fused, generic = both(reasoner(), random_codes(100), [90, 3], k=5, beam_width=10)
    assert_same(fused, generic)


def prompts(lengths, *, opened: bool):
    rng = np.random.default_rng(5)
    rows = [rng.integers(VOCABULARY.first_code, VOCABULARY.size, n).astype(np.int32) for n in lengths]
    if opened:
        rows = [np.append(row, np.int32(VOCABULARY.latent_start)) for row in rows]
    return tuple(torch.from_numpy(array) for array in pad_right(rows, VOCABULARY.pad))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("opened", [False, True])
@torch.no_grad()
def test_states_of_prompt_loop_and_beams_are_the_generic_ones(name, opened):
    model, lengths = reasoner(name), (4, 1, 9)
    ids, lengths_B = prompts(lengths, opened=opened)
    fused = encode(FusedWeights(MODELS[name]), ids, lengths_B, opened=opened, room=6)
    plain = encode_prompts(MODELS[name], *prompts(lengths, opened=False))
    if not opened:
        torch.testing.assert_close(fused.hidden_B1D, plain.hidden_B1D, atol=1e-5, rtol=1e-4)
    thoughts = [model.think(prefix) for prefix in (fused, plain)]
    torch.testing.assert_close(thoughts[0].distribution_BN, thoughts[1].distribution_BN, atol=1e-5, rtol=1e-4)
    for row, depth in enumerate(thoughts[1].depths_B):  # beyond its depth a state means nothing
        ours, theirs = (thought.latents.hidden_BPND[row, 0, : depth + 1] for thought in thoughts)
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    prefixes = [thought.prefix for thought in thoughts]
    torch.testing.assert_close(prefixes[0].hidden_B1D, prefixes[1].hidden_B1D, atol=1e-5, rtol=1e-4)
    parents = [prefix.tip_B1.expand(-1, 6) for prefix in prefixes]
    for level in range(3):
        tokens = torch.randint(VOCABULARY.first_code, VOCABULARY.size, (3, 6))
        (ours, own), (theirs, nodes) = (
            prefix.grow(parent, input_ids=tokens) for prefix, parent in zip(prefixes, parents, strict=True)
        )
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
        assert own.position_BQ.tolist() == nodes.position_BQ.tolist()
        chosen = torch.randint(0, 6, (3, 6), generator=torch.Generator().manual_seed(level))
        parents = [grown.index_BQ.gather(1, chosen) for grown in (own, nodes)]


@torch.no_grad()
def test_beams_that_are_not_needed_change_nothing():
    weights = FusedWeights(MODELS["qwen3"])
    ids, lengths_B = prompts((4, 1, 9), opened=False)
    tokens = torch.randint(VOCABULARY.first_code, VOCABULARY.size, (2, 3, 6))
    needed = torch.tensor([[1, 0, 1, 1, 0, 0], [0] * 6, [1] * 6]).bool()
    # Children of needed beams only; the second request's are not needed either.
    chosen = torch.tensor([[0, 2, 3, 3, 2, 0], [0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0]])
    results = []
    for wanted in (None, needed):
        prefix = encode(weights, ids, lengths_B, opened=False, room=0)
        first, nodes = prefix.grow(prefix.tip_B1.expand(-1, 6), input_ids=tokens[0], needed_BQ=wanted)
        second, _ = prefix.grow(
            nodes.index_BQ.gather(1, chosen), input_ids=tokens[1],
            needed_BQ=None if wanted is None else torch.tensor([[1, 1, 0, 1, 0, 1], [0] * 6, [1] * 6]).bool(),
        )  # fmt: skip
        nothing, _ = prefix.grow(
            torch.zeros(3, 2).long(), input_ids=tokens[0, :, :2], needed_BQ=first[:, :2, 0] > 1e9
        )
        results.append((first, second))
        assert not nothing.any()
    (all_first, all_second), (first, second) = results
    torch.testing.assert_close(first[needed], all_first[needed], atol=1e-5, rtol=1e-4)
    assert not first[~needed].any()
    computed = second.abs().sum(-1) > 0
    assert computed.tolist() == [[True, True, False, True, False, True], [False] * 6, [True] * 6]
    torch.testing.assert_close(second[computed], all_second[computed], atol=1e-5, rtol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("depth", ["auto", 0, 4])
def test_cuda_gives_the_lists_of_the_generic_path_on_the_cpu(name, depth):
    model, codes, rng = reasoner(name), random_codes(80), np.random.default_rng(0)
    histories = [rng.integers(80, size=n).astype(np.int32) for n in (0, 1, 3, 12, 7, 40)]
    baskets = [np.arange(len(history), dtype=np.int32) for history in histories]
    options = {"k": 10, "beam_width": 20, "depth": depth, "exclude_seen": True}
    expected = Ranker(model, codes_IL=codes, fused=False).rank(histories, baskets, **options)
    for fused in (True, False):
        ranker = Ranker(copy.deepcopy(model).to("cuda").requires_grad_(False), codes_IL=codes, fused=fused)
        assert ranker.engine.startswith("fused" if fused else "generic")
        assert_same(ranker.rank(histories, baskets, **options), expected, tolerance=1e-3)
