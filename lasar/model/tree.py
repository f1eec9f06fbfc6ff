"""A tree of branches on trunks: one description from which attention masks and positions follow.

Every row of a batch is a tree of tokens. Its trunk is a chain (a user's history); everything else hangs off it:
latent steps, answers, beams, rollouts. One rule makes the mask: a token sees what its parent sees, and itself. One
rule makes the position: one more than the parent's. So every token computes exactly what it would compute at the end
of its own root-to-token sequence, and no prefix is ever computed twice.

Legend: B batch, T trunk tokens, Q new tokens, M tokens hung off the trunk so far, K = T + M keys in the cache.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Nodes:
    """New tokens of every tree, ready for one forward call on the shared key-value cache.

    Attributes:
        index_BQ: where each token's keys lie in the cache; the name by which later tokens call it their parent.
        position_BQ: position id, the length of the path from the root.
        mask_BQK: which cached tokens (the new ones included, last) each may attend to.
    """

    index_BQ: Tensor
    position_BQ: Tensor
    mask_BQK: Tensor


class Tree:
    """Trees that grow by whole generations, in step with a key-value cache.

    The trunk's part of a mask is a comparison, so memory is B * M * K bits-as-bytes, never T * T.
    """

    def __init__(self, lengths_B: Tensor, width: int) -> None:
        """Start from trunks.

        Args:
            lengths_B: tokens of each trunk.
            width: padded trunk length T; padding lies on the right and is never seen.
        """
        self.trunk_width = width
        self._lengths_B = lengths_B
        batch = len(lengths_B)
        self._seen_BMK = torch.zeros((batch, 0, width), dtype=torch.bool, device=lengths_B.device)
        self._position_BM = torch.zeros((batch, 0), dtype=torch.int64, device=lengths_B.device)

    @property
    def trunk_ends_B1(self) -> Tensor:
        """Index of each trunk's last token, [B, 1]: the parent of what continues the whole trunk."""
        return (self._lengths_B - 1)[:, None]

    @property
    def num_keys(self) -> int:
        """Keys in the cache, K."""
        return self._seen_BMK.shape[2]

    def grow(self, parents_BQ: Tensor) -> Nodes:
        """Hang Q tokens off the tree, one call per cache update.

        Args:
            parents_BQ: index of each token's parent: a trunk position, an `index_BQ` of an earlier generation, or a
                token of this same call (its index is `num_keys + q`), listed before its children.
        """
        batch, count = parents_BQ.shape
        first = self.num_keys
        device = parents_BQ.device
        seen_BQK = torch.zeros((batch, count, first + count), dtype=torch.bool, device=device)
        position_BQ = torch.zeros((batch, count), dtype=torch.int64, device=device)
        # Parents inside this call must be complete before their children: take the call generation by generation.
        generation_BQ = _generations(parents_BQ, first)
        for generation in range(int(generation_BQ.max()) + 1 if count else 0):
            fresh_BQ = generation_BQ == generation
            parent_seen, parent_position = self._look_up(parents_BQ, seen_BQK, position_BQ)
            seen_BQK = torch.where(fresh_BQ[..., None], parent_seen, seen_BQK)
            position_BQ = torch.where(fresh_BQ, parent_position + 1, position_BQ)
            own = torch.arange(count, device=device)
            seen_BQK[:, own, first + own] |= fresh_BQ
        grown_BMK = torch.cat([_widen(self._seen_BMK, count), seen_BQK], dim=1)
        self._seen_BMK = grown_BMK
        self._position_BM = torch.cat([self._position_BM, position_BQ], dim=1)
        index_BQ = (first + torch.arange(count, device=device)).expand(batch, -1)
        return Nodes(index_BQ=index_BQ, position_BQ=position_BQ, mask_BQK=seen_BQK)

    def _look_up(self, parents_BQ: Tensor, seen_BQK: Tensor, position_BQ: Tensor) -> tuple[Tensor, Tensor]:
        """What each parent sees [B, Q, K + Q] and its position [B, Q]; rows of unfinished parents are not used."""
        count, width = seen_BQK.shape[1], self.trunk_width
        keys_K = torch.arange(seen_BQK.shape[2], device=parents_BQ.device)
        hung_BMK = torch.cat([_widen(self._seen_BMK, count), seen_BQK], dim=1)
        hung_position_BM = torch.cat([self._position_BM, position_BQ], dim=1)
        on_trunk_BQ = parents_BQ < width
        row_BQ = (parents_BQ - width).clamp(min=0)
        rows_BQK = hung_BMK.gather(1, row_BQ[..., None].expand(-1, -1, hung_BMK.shape[2]))
        prefix_BQK = (keys_K <= parents_BQ[..., None]) & (keys_K < width)
        seen = torch.where(on_trunk_BQ[..., None], prefix_BQK, rows_BQK)
        return seen, torch.where(on_trunk_BQ, parents_BQ, hung_position_BM.gather(1, row_BQ))


def chains(after_BA: Tensor, *, length: int, first: int) -> Tensor:
    """Parents of A chains of tokens per tree, each `length` long, listed chain by chain in one call: [B, A * length].

    Args:
        after_BA: the token each chain continues from.
        length: tokens of a chain, at least 1.
        first: cache index of the first token of the first chain.
    """
    batch, count = after_BA.shape
    number_AL = first + torch.arange(count * length, device=after_BA.device).view(count, length)
    inside_BAL = number_AL[:, :-1].expand(batch, -1, -1)
    return torch.cat([after_BA[..., None], inside_BAL], dim=2).flatten(1)


def with_trunk(nodes: Nodes, width: int) -> Tensor:
    """Mask of one call over whole trees, trunks and their first branches: [B, T + Q, K]."""
    batch, _, keys = nodes.mask_BQK.shape
    causal_TK = torch.ones((width, keys), dtype=torch.bool, device=nodes.mask_BQK.device).tril()
    return torch.cat([causal_TK.expand(batch, -1, -1), nodes.mask_BQK], dim=1)


def _widen(seen_BMK: Tensor, count: int) -> Tensor:
    return torch.nn.functional.pad(seen_BMK, (0, count))


def _generations(parents_BQ: Tensor, first: int) -> Tensor:
    """How many ancestors of each token are in the same call, [B, Q]."""
    generation_BQ = torch.zeros_like(parents_BQ)
    inside_BQ = parents_BQ >= first
    if not bool(inside_BQ.any()):
        return generation_BQ
    for _ in range(parents_BQ.shape[1]):
        of_parent = generation_BQ.gather(1, (parents_BQ - first).clamp(min=0))
        grown = torch.where(inside_BQ, of_parent + 1, 0)
        if bool((grown == generation_BQ).all()):
            break
        generation_BQ = grown
    return generation_BQ
