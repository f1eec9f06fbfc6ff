"""Peers of `engine.py`: how generative recommenders decode elsewhere, and what a careful engineer writes instead."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig

from lasar.decoding.trie import Trie
from lasar.model.backbone import trunk
from lasar.model.head import part_logits

if TYPE_CHECKING:
    from engine import Bench

Lists = list[list[int]]
Way = Callable[[], Lists]


def generate_peer(bench: "Bench", histories: list[np.ndarray]) -> Way:
    """`generate()` with a function that names the allowed tokens."""
    ids_BT, mask_BT = bench.left_padded(histories)
    levels, width = bench.codes_IL.shape[1], ids_BT.shape[1]
    # Answers are codes, whatever names an item in a history.
    starts_L = np.array([bench.vocabulary.level_start(level) for level in range(levels)])
    item_of = {tuple(row): item for item, row in enumerate((bench.codes_IL + starts_L).tolist())}
    allowed: dict[tuple[int, ...], list[int]] = {}
    for path in sorted({row[:length] for row in item_of for length in range(1, levels + 1)}):
        allowed.setdefault(path[:-1], []).append(path[-1])
    config = GenerationConfig(
        num_beams=bench.beam, num_return_sequences=bench.beam, max_new_tokens=levels, min_new_tokens=levels,
        do_sample=False, length_penalty=0.0, use_cache=True, pad_token_id=bench.vocabulary.pad,
        eos_token_id=None, renormalize_logits=bench.vocabulary.normalise == "trie",
    )  # fmt: skip

    def rank() -> Lists:
        found = bench.reasoner.backbone.generate(
            ids_BT, attention_mask=mask_BT, generation_config=config,
            prefix_allowed_tokens_fn=lambda _, sentence: allowed[tuple(sentence[width:].tolist())],
        )  # fmt: skip
        items = [item_of[tuple(row)] for row in found[:, width:].tolist()]
        return np.reshape(items, (len(histories), bench.beam)).tolist()

    return rank


def careful_peer(bench: "Bench", histories: list[np.ndarray]) -> Way:
    """Prefill once, repeat the cache, one vectorised trie step and one cached forward pass per level, reorder."""
    ids_BT, mask_BT = bench.left_padded(histories)
    positions_BT = (mask_BT.cumsum(1) - 1).clamp(min=0)
    model, vocabulary, beam = bench.reasoner.backbone, bench.vocabulary, bench.beam
    trie, batch = Trie(bench.codes_IL), len(histories)
    padded = bool((mask_BT == 0).any())  # without padding attention needs no mask and is faster
    assert vocabulary.normalise == "trie", "written for models that normalise over the trie"

    def best(hidden_BWD: Tensor, nodes_BW: Tensor, scores_BW: Tensor, level: int) -> tuple[Tensor, ...]:
        start = vocabulary.level_start(level)
        logits_BWC = part_logits(model, hidden_BWD, start, start + vocabulary.codebook_size)
        child_BWM, real_BWM = trie.children(level, nodes_BW)
        chosen_BWM = logits_BWC.gather(2, trie.levels[level + 1].code[child_BWM])
        logprobs_BWM = chosen_BWM.masked_fill(~real_BWM, -torch.inf).log_softmax(-1)
        flat = (scores_BW[..., None] + logprobs_BWM).flatten(1)
        scores, places = flat.topk(min(beam, flat.shape[1]), dim=1)
        return child_BWM.flatten(1).gather(1, places), scores, places // child_BWM.shape[2]

    @torch.no_grad()
    def rank() -> Lists:
        cache = DynamicCache()
        hidden_BTD = trunk(model)(
            input_ids=ids_BT,
            attention_mask=mask_BT if padded else None,
            position_ids=positions_BT,
            past_key_values=cache,
        ).last_hidden_state
        nodes, scores = torch.zeros(batch, 1, dtype=torch.int64), torch.zeros(batch, 1)
        nodes, scores, _ = best(hidden_BTD[:, -1:], nodes, scores, 0)
        count = nodes.shape[1]
        cache.batch_repeat_interleave(count)
        mask, position = mask_BT.repeat_interleave(count, 0), mask_BT.sum(1).repeat_interleave(count)
        for level in range(1, trie.num_levels):
            tokens = trie.levels[level].code[nodes] + vocabulary.level_start(level - 1)
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            hidden = trunk(model)(
                input_ids=tokens.view(-1, 1), attention_mask=mask if padded else None, position_ids=position[:, None],
                past_key_values=cache,
            ).last_hidden_state  # fmt: skip
            nodes, scores, parents = best(hidden.view(batch, count, -1), nodes, scores, level)
            position = position + 1
            if level < trie.num_levels - 1:
                cache.reorder_cache((parents + count * torch.arange(batch)[:, None]).flatten())
        return trie.item_of_leaf[nodes].tolist()

    return rank
