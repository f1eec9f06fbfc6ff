"""Prompts that are continued instead of computed: the same states, within the bytes allowed."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lasar.decoding.ranker import Ranker
from lasar.engine.memory import PromptMemory, encode_with_memory
from lasar.engine.prefix import encode
from lasar.engine.weights import FusedWeights
from lasar.prompts.vocabulary import pad_right
from tests.engine.test_prefix import VOCABULARY, random_codes, reasoner

WEIGHTS = {name: FusedWeights(reasoner(name).backbone) for name in ("qwen3", "qwen2", "llama3")}
TOKENS = st.lists(st.integers(0, VOCABULARY.size - 1), min_size=1, max_size=40)


def batch(prompts):
    rows = [np.array(prompt, dtype=np.int32) for prompt in prompts]
    return [torch.from_numpy(array) for array in pad_right(rows, VOCABULARY.pad)]


def assert_same(one, two, lengths_B):
    torch.testing.assert_close(one.hidden_B1D, two.hidden_B1D, rtol=2e-4, atol=2e-5)
    for name in ("tip_B1", "ends_B", "opening_B1"):
        assert torch.equal(getattr(one, name), getattr(two, name))
    for part in ("keys", "values"):
        for first, second in zip(getattr(one.chains, part), getattr(two.chains, part), strict=True):
            assert first.shape == second.shape
            for row, length in enumerate(lengths_B.tolist()):
                torch.testing.assert_close(
                    first[row, :, :length], second[row, :, :length], rtol=2e-4, atol=2e-5
                )


@settings(max_examples=25)
@given(
    name=st.sampled_from(sorted(WEIGHTS)), seen=st.lists(TOKENS, min_size=1, max_size=4),
    asked=st.lists(st.tuples(st.integers(0, 5), st.integers(1, 40), TOKENS), min_size=1, max_size=4),
    opened=st.booleans(),
)  # fmt: skip
def test_a_batch_of_known_and_unknown_prompts_is_what_it_is_without_memory(name, seen, asked, opened):
    weights, memory = WEIGHTS[name], PromptMemory(10_000_000)
    ids_BT, lengths_B = batch([[*prompt, 1] for prompt in seen])
    encode_with_memory(weights, ids_BT, lengths_B, opened=opened, room=3, memory=memory)
    prompts = [[*seen[number % len(seen)][:start], *rest, 1] for number, start, rest in asked]
    ids_BT, lengths_B = batch(prompts)
    for _ in range(2):  # the second time all of it is known
        found = encode_with_memory(weights, ids_BT, lengths_B, opened=opened, room=3, memory=memory)
        assert_same(found, encode(weights, ids_BT, lengths_B, opened=opened, room=3), lengths_B)
    long = [prompt for prompt in prompts if len(prompt) > 8]
    assert memory.last.tokens == sum(map(len, prompts))
    assert memory.last.known == sum(len(prompt) - 1 for prompt in long)


def history(*lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(60, size=length).astype(np.int32) for length in lengths]


@pytest.mark.parametrize("depth", ["auto", 0, 3])
def test_lists_of_users_who_come_back_are_the_lists_of_strangers(depth):
    codes = random_codes(60)
    memory = PromptMemory(10_000_000)
    remembering = Ranker(reasoner(), codes_IL=codes, memory=memory)
    forgetful = Ranker(reasoner(), codes_IL=codes)
    histories = history(3, 9, 14, 0)
    more = [np.append(items, np.int32(7)) for items in histories]
    for asked in (histories, more, histories[::-1], history(5, 8, seed=1)):
        baskets = [np.arange(len(items), dtype=np.int32) for items in asked]
        lists = [
            ranker.rank(asked, baskets, k=10, beam_width=12, depth=depth)
            for ranker in (remembering, forgetful)
        ]
        assert np.array_equal(lists[0].depths_Q, lists[1].depths_Q)
        assert np.array_equal(lists[0].items_QK, lists[1].items_QK)
        np.testing.assert_allclose(lists[0].scores_QK, lists[1].scores_QK, rtol=1e-4, atol=1e-4)
    assert len(memory)
    versions = remembering.with_codes(random_codes(50, seed=2))
    assert versions.memory is memory


def test_other_weights_begin_with_an_empty_memory():
    model = reasoner()
    memory = PromptMemory(10_000_000)
    ranker = Ranker(model, codes_IL=random_codes(60), memory=memory)
    asked, baskets = history(9), [np.arange(9, dtype=np.int32)]
    before = ranker.rank(asked, baskets, k=5, beam_width=12)
    weight = next(parameter for name, parameter in model.backbone.named_parameters() if "mlp" in name)
    kept = weight.clone()
    try:
        weight.mul_(1.7)
        after = ranker.rank(asked, baskets, k=5, beam_width=12)
        fresh = Ranker(model, codes_IL=random_codes(60)).rank(asked, baskets, k=5, beam_width=12)
    finally:
        weight.copy_(kept)
    np.testing.assert_allclose(after.scores_QK, fresh.scores_QK, rtol=1e-5)
    assert not np.allclose(after.scores_QK, before.scores_QK)


def states(tokens):
    return torch.full((2, 1, 1, len(tokens), 1), float(len(tokens)))


def test_what_was_not_used_for_longest_goes_first():
    memory = PromptMemory(3 * 80)
    first, second, third = (tuple(range(start, start + 10)) for start in (0, 100, 200))
    for prompt in (first, second, third):
        memory.keep(prompt, states(prompt))
    assert (len(memory), memory.nbytes) == (3, 240)
    assert memory.find((*first, 5))[1] == 10
    memory.keep((*first, 5, 6), states((*first, 5, 6)))  # 96 bytes: the second has to go, and then the third
    assert memory.nbytes <= 240
    assert memory.find((*second, 5)) == (None, 0)
    assert memory.find((*first, 5, 7))[1] == 11
    assert memory.find(first)[1] == 9  # the last token is always computed
    memory.keep(tuple(range(300, 400)), states(range(100)))  # larger than all that is allowed
    assert memory.find((*range(300, 400), 1)) == (None, 0)
    memory.clear()
    assert (len(memory), memory.nbytes) == (0, 0)
    assert memory.find((*first, 5)) == (None, 0)


def test_a_prompt_that_went_leaves_what_others_begin_with():
    memory = PromptMemory(2 * 96)
    shared = tuple(range(10))
    memory.keep((*shared, 20, 21), states(range(12)))
    memory.keep((*shared, 30, 31), states(range(12)))
    memory.keep(tuple(range(50, 62)), states(range(12)))  # the first goes
    assert memory.find((*shared, 30, 31, 1))[1] == 12
    assert memory.find((*shared, 20, 21, 1))[1] == 10
