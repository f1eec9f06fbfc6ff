"""Rollouts: G distinct items for every prompt, from the decoder that evaluates and serves.

One depth is drawn for a prompt and shared by its group. What made a group is written on it: rollouts carry the version
of the policy, and nobody trains on those of another one.

Legend: B batch, G rollouts of a prompt, N depths 1 ... N_max.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lasar.decoding.beam import beam_search
from lasar.decoding.ranker import Ranker
from lasar.decoding.sampling import sample_items
from lasar.decoding.trie import ItemFilter
from lasar.model.prompt import encode_prompts
from lasar.rl.prompts import Prompts

How = Literal["beam", "sample"]


@dataclass(frozen=True, kw_only=True)
class Rollouts:
    """Groups of one batch of prompts.

    Attributes:
        prompts: what was asked.
        version: optimizer steps that the policy had behind it.
        depths_B: latent steps of each group.
        distribution_BN: the Policy Head's probabilities; None where the depth is fixed.
        items_BG: distinct items, the most probable first, -1 where fewer than G are allowed.
        scores_BG: their log-probabilities as the decoder saw them, -inf at -1.
    """

    prompts: Prompts
    version: int
    depths_B: Tensor
    distribution_BN: Tensor | None
    items_BG: Tensor
    scores_BG: Tensor

    @property
    def real_BG(self) -> Tensor:
        """Where there is an item."""
        return self.items_BG >= 0


@torch.no_grad()
def roll_out(
    ranker: Ranker,
    prompts: Prompts,
    *,
    version: int,
    group_size: int,
    beam_width: int,
    how: How,
    exclude_seen: bool,
    seed: tuple[int, ...],
) -> Rollouts:
    """Ask the current policy.

    Args:
        ranker: holds it, in evaluation mode.
        prompts: of training rows.
        version: of the policy.
        group_size: G.
        beam_width: beams of the search; the best G are the group.
        how: the most probable items (`beam`), or items drawn without replacement (`sample`).
        exclude_seen: leave items of the history out, as validation does where nobody takes an item twice.
        seed: of depths and draws.
    """
    reasoner = ranker.reasoner
    device = ranker.trie.item_of_leaf.device
    rng = np.random.default_rng(seed)
    uniform_B = torch.from_numpy(rng.random(len(prompts))).to(device)
    free = reasoner.settings.fixed_depth is None
    thought = reasoner.think(
        encode_prompts(reasoner.backbone, prompts.ids_BT, prompts.lengths_B),
        depth="sampled" if free else "auto",
        uniform_B=uniform_B,
    )
    item_filter = None
    if exclude_seen:
        seen = [np.unique(history).astype(np.int64) for history in prompts.histories]
        item_filter = ItemFilter(ranker.trie, items=seen, allow=False)
    if how == "beam":
        found = beam_search(
            thought.prefix, vocabulary=ranker.vocabulary, trie=ranker.trie,
            beam_width=max(beam_width, group_size), item_filter=item_filter,
        )  # fmt: skip
    else:
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        found = sample_items(
            thought.prefix, vocabulary=ranker.vocabulary, trie=ranker.trie, num_samples=group_size,
            generator=generator, item_filter=item_filter,
        )  # fmt: skip
    items_BG, scores_BG = found.items_BW[:, :group_size], found.scores_BW[:, :group_size]
    missing = group_size - items_BG.shape[1]
    return Rollouts(
        prompts=prompts,
        version=version,
        depths_B=thought.depths_B,
        distribution_BN=thought.distribution_BN if free else None,
        items_BG=torch.nn.functional.pad(items_BG, (0, missing), value=-1),
        scores_BG=torch.nn.functional.pad(scores_BG, (0, missing), value=-torch.inf),
    )


def assert_fresh(rollouts: Rollouts, version: int, *, updates: int) -> None:
    """Refuse rollouts of a policy that is no more.

    Args:
        rollouts: about to be trained on.
        version: optimizer steps that the policy has behind it now.
        updates: optimizer steps that one set of rollouts may be used for.

    Raises:
        AssertionError: they are older than that, or of a later policy (a defect of ours).
    """
    age = version - rollouts.version
    assert 0 <= age < updates, f"rollouts of policy {rollouts.version} cannot train policy {version}"
