"""Prompts, latent steps and beams on the fused path, with the interface of `lasar.model.prompt.Prefix`.

A request is a chain (its prompt, then `<s>`, latents and `<e>`) and generations of beams that hang off the chain's end.
Three computations are left out that the result does not depend on: the last layer of prompt tokens other than the
last; latent steps of requests that are finished; and a call of its own for `<e>`, which needs nothing from the last
latent but its keys and therefore goes with it.

Legend: B batch, T prompt tokens, Q new tokens of each request, n new tokens in all, N latent steps, D hidden.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import DynamicCache

from lasar.engine.forward import (
    Arrangement,
    Chains,
    Generation,
    attend_across,
    attend_along,
    attend_causally,
    finish_layer,
    group_prompts,
    groups_of_like_length,
    run_layers,
    split_heads,
)
from lasar.engine.weights import FusedWeights, times
from lasar.model.backbone import input_table
from lasar.model.latent import Closing, Feedback, Latents, closing_ids, fed_back
from lasar.model.prompt import Prefix
from lasar.model.tree import Nodes, Tree
from lasar.prompts.vocabulary import Vocabulary


@dataclass
class FusedPrefix(Prefix):
    """Sequences that can be continued, first by latent steps, then by generations of beams.

    The `tree` and `cache` of the generic path stay empty: what follows what is known here by position and ancestry.

    Attributes:
        weights: of the decoder.
        chains: keys and values of prompts and latents.
        ends_B: tokens of each chain.
        opened: whether the chains end with `<s>`.
        generations: beams, oldest first.
        ancestors: for every generation, the number there of each newest beam's ancestor (of itself, in the newest),
            [B * Q].
    """

    weights: FusedWeights
    chains: Chains
    ends_B: Tensor
    opened: bool
    generations: list[Generation] = field(default_factory=list)
    ancestors: list[Tensor] = field(default_factory=list)

    def grow(
        self, parents_BQ: Tensor, *, needed_BQ: Tensor | None = None, final: bool = False, **tokens: Tensor
    ) -> tuple[Tensor, Nodes]:
        """Append a generation of beams.

        Args:
            parents_BQ: what each new beam follows: the tip, or a beam of the newest generation.
            needed_BQ: which of them to compute, all by default; the hidden states of the others are 0, and nothing may
                follow them whose hidden state is needed.
            final: nothing will follow them, and they are not kept: others may follow the same parents in another call.
            tokens: `input_ids` [B, Q].

        Returns:
            As `Prefix.grow`, but the nodes have no mask.
        """
        input_ids = tokens["input_ids"]
        batch, width = parents_BQ.shape
        if needed_BQ is None:
            needed_BQ = torch.ones_like(parents_BQ, dtype=torch.bool)
        arrangement, before = Arrangement(needed_BQ), self.ancestors
        self._inherit(parents_BQ)
        position_BQ = (self.ends_B + len(self.generations))[:, None].expand(-1, width)
        hidden = torch.zeros(batch * width, self.hidden_B1D.shape[2], device=parents_BQ.device)
        self.generations.append(Generation(keys=[], values=[]))
        if len(arrangement.places_n):
            ids_n = input_ids.flatten()[arrangement.places_n]
            hidden[arrangement.places_n] = self._beams(ids_n, position_BQ, arrangement)
        if final:
            self.generations.pop()
            self.ancestors = before
        else:
            self.ancestors.append(arrangement.number_BQ.flatten())
        nodes = Nodes(
            index_BQ=torch.arange(width, device=parents_BQ.device).expand(batch, -1),
            position_BQ=position_BQ,
            mask_BQK=torch.zeros((batch, width, 0), dtype=torch.bool, device=parents_BQ.device),
        )
        return hidden.view(batch, width, -1), nodes

    def start_reasoning(self, vocabulary: Vocabulary) -> tuple[Tensor, Tensor]:
        """Append `<s>` where the prompts don't have it already: h_0 [B, 1, D], and where `<s>` is [B, 1]."""
        if not self.opened:
            start_B1 = torch.full_like(self.tip_B1, vocabulary.latent_start)
            x_nD = input_table(self.model)[start_B1[:, 0]]
            hidden_nD = self._extend(x_nD, Arrangement(start_B1 >= 0), self.ends_B)
            self.hidden_B1D, self.tip_B1 = hidden_nD[:, None], self.ends_B[:, None]
            self.ends_B, self.opened = self.ends_B + 1, True
        return self.hidden_B1D, self.tip_B1

    def reason(
        self,
        h0_B1D: Tensor,
        depths_B1: Tensor,
        *,
        vocabulary: Vocabulary,
        feedback: Feedback,
        step_vectors_ND: Tensor | None,
        closing: Closing,
    ) -> tuple[Latents, Tensor, Tensor]:
        """Run the loop, each request to its own depth, and close it.

        Args:
            h0_B1D: hidden states at `<s>`.
            depths_B1: latent steps of each request, at least 1.
            vocabulary: names `<e>`.
            feedback: see `lasar.model.latent.reason`.
            step_vectors_ND: see there.
            closing: see `lasar.model.latent.closing_ids`.

        Returns:
            What the loop computed (states of a request that has finished repeat its last), and hidden state [B, 1, D]
            and index [B, 1] of `<e>`.
        """
        model, norm = self.model, self.weights.embedding_norm
        ends_B1 = closing_ids(self.opening_B1, vocabulary=vocabulary, closing=closing)
        end_BD = input_table(model)[ends_B1[:, 0]]
        states, fed = [h0_B1D[:, 0]], []
        answer_BD = torch.empty_like(states[0])
        num_steps = int(depths_B1.max())
        for step in range(num_steps):
            fed_BD = fed_back(model, states[-1], norm, feedback)
            if step_vectors_ND is not None:
                fed_BD = fed_BD + step_vectors_ND[step].to(fed_BD.dtype)
            fed.append(fed_BD)
            last_B1 = depths_B1 == step + 1
            present_BQ = torch.cat([depths_B1 > step, last_B1], dim=1)
            tokens_BQD = torch.stack([fed_BD, end_BD.to(fed_BD.dtype)], dim=1)
            position_BQ = (self.ends_B + step)[:, None] + torch.arange(2, device=end_BD.device)
            arrangement = Arrangement(present_BQ)
            places_n = arrangement.places_n
            hidden = torch.zeros_like(tokens_BQD).flatten(0, 1)
            hidden[places_n] = self._extend(
                tokens_BQD.flatten(0, 1)[places_n], arrangement, position_BQ.flatten()[places_n]
            )
            slot_BD, closed_BD = hidden.view_as(tokens_BQD).unbind(1)
            states.append(torch.where(present_BQ[:, :1], slot_BD, states[-1]))
            answer_BD = torch.where(last_B1, closed_BD, answer_BD)
        step_N = torch.arange(num_steps + 1, device=depths_B1.device)
        latents = Latents(
            hidden_BPND=torch.stack(states, dim=1)[:, None],
            index_BPN=(self.tip_B1 + step_N.minimum(depths_B1))[:, None],
            norm_ratio=torch.stack(fed).norm(dim=-1).mean() / norm,
        )
        self.ends_B = self.ends_B + depths_B1[:, 0] + 1
        return latents, answer_BD[:, None], self.ends_B[:, None] - 1

    def _extend(self, x_nD: Tensor, arrangement: Arrangement, positions_n: Tensor) -> Tensor:
        """Hidden states of n tokens of the chains."""
        return continue_chains(self.weights, self.chains, x_nD, arrangement, positions_n)

    def _inherit(self, parents_BQ: Tensor) -> None:
        if self.generations:
            batch = len(parents_BQ)
            width = len(self.ancestors[-1]) // batch
            parents = (parents_BQ + width * torch.arange(batch, device=parents_BQ.device)[:, None]).flatten()
            self.ancestors = [numbers[parents] for numbers in self.ancestors]

    def _beams(self, ids_n: Tensor, position_BQ: Tensor, arrangement: Arrangement) -> Tensor:
        newest, older = self.generations[-1], self.generations[:-1]
        ancestors = [numbers[arrangement.places_n] for numbers in self.ancestors]
        masks = [(rows, padding_mask(self.ends_B[rows])) for rows in groups_of_like_length(self.ends_B)]

        def attend(layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            newest.keys.append(keys)
            newest.values.append(values)
            own = [(g.keys[layer][n], g.values[layer][n]) for g, n in zip(older, ancestors, strict=True)]
            return attend_across(
                self.chains, layer, queries, arrangement=arrangement, masks=masks,
                own=[(arrangement.spread(k), arrangement.spread(v)) for k, v in (*own, (keys, values))],
            )  # fmt: skip

        positions_n = position_BQ.flatten()[arrangement.places_n]
        rotation = self.weights.rotations(positions_n, int(self.ends_B.max()) + len(self.generations))
        hidden_nD = run_layers(self.weights, *self.weights.embed(ids_n), rotation=rotation, attend=attend)
        return self.weights.final_norm(hidden_nD)


def continue_chains(
    weights: FusedWeights, chains: Chains, x_nD: Tensor, arrangement: Arrangement, positions_n: Tensor
) -> Tensor:
    """Hidden states of n tokens that continue the chains of their requests, at most a few each."""
    num_places = int(positions_n.max()) + 1
    mask_BQS = causal_mask(arrangement, positions_n, num_places)
    at = (arrangement.rows_n, positions_n)

    def attend(layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        chains.write(layer, keys, values, at=at)
        return attend_along(chains, layer, queries, arrangement=arrangement, mask_BQS=mask_BQS)

    rotation = weights.rotations(positions_n, num_places)
    return weights.final_norm(run_layers(weights, x_nD, None, rotation=rotation, attend=attend))


@torch.no_grad()
def encode(
    weights: FusedWeights, ids_BT: Tensor, lengths_B: Tensor, *, opened: bool, room: int
) -> FusedPrefix:
    """Compute prompts.

    Args:
        weights: of the decoder.
        ids_BT: tokens, padded on the right.
        lengths_B: tokens of each prompt, at least 1.
        opened: whether the prompts end with `<s>`.
        room: latent steps, `<s>` and `<e>` that may follow.
    """
    (batch, length), device = ids_BT.shape, ids_BT.device
    present_BT = torch.arange(length, device=device) < lengths_B[:, None]
    places_n = present_BT.flatten().nonzero()[:, 0]
    at = (places_n // length, places_n % length)
    chains = empty_chains(weights, batch, length + room, device)
    groups = group_prompts(lengths_B)

    def attend(layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        chains.write(layer, keys, values, at=at)
        return attend_causally(chains, layer, queries, groups=groups)

    x_nD, mixed_n = weights.embed(ids_BT.flatten()[places_n])
    rotation = weights.rotations(at[1], length)
    num_layers = len(weights.layers) - 1
    if num_layers:
        x_nD = run_layers(weights, x_nD, mixed_n, rotation=rotation, attend=attend, num_layers=num_layers)
    hidden_BD = _last_layer(weights, chains, x_nD, at=at, lengths_B=lengths_B, rotation=rotation)
    return prefix_of(weights, chains, hidden_BD[:, None], ids_BT, lengths_B, opened=opened)


def empty_chains(weights: FusedWeights, batch: int, places: int, device: torch.device) -> Chains:
    """Room for the keys and values of chains."""
    size = (batch, weights.key_heads, places, weights.head_size)
    return Chains(
        keys=[torch.zeros(size, device=device) for _ in weights.layers],
        values=[torch.zeros(size, device=device) for _ in weights.layers],
    )


def prefix_of(
    weights: FusedWeights,
    chains: Chains,
    hidden_B1D: Tensor,
    ids_BT: Tensor,
    lengths_B: Tensor,
    *,
    opened: bool,
) -> FusedPrefix:
    """Prompts whose keys, values and last hidden states [B, 1, D] are known."""
    return FusedPrefix(
        model=weights.model, tree=Tree(lengths_B, ids_BT.shape[1]), cache=DynamicCache(), weights=weights,
        chains=chains, tip_B1=lengths_B[:, None] - 1, hidden_B1D=hidden_B1D, ends_B=lengths_B, opened=opened,
        opening_B1=ids_BT.gather(1, (lengths_B - 1 - int(opened))[:, None]),
    )  # fmt: skip


def _last_layer(
    weights: FusedWeights,
    chains: Chains,
    x_nD: Tensor,
    *,
    at: tuple[Tensor, Tensor],
    lengths_B: Tensor,
    rotation: tuple[Tensor, Tensor],
) -> Tensor:
    """The last layer of the prompts: keys and values of all tokens, the rest for the last of each prompt."""
    layer, number = weights.layers[-1], len(weights.layers) - 1
    first = weights.heads * weights.head_size
    bias = None if layer.qkv_bias is None else layer.qkv_bias[first:]
    mixed_n = times(weights.scaled(x_nD), layer.qkv[:, first:], bias)
    _, keys, values = split_heads(weights, layer, mixed_n, rotation)
    chains.write(number, keys, values, at=at)
    last_B = lengths_B.cumsum(0) - 1
    x_BD = x_nD[last_B]
    cos_B1F, sin_B1F = rotation[0][last_B], rotation[1][last_B]
    queries, _, _ = split_heads(weights, layer, weights.project(number, x_BD), (cos_B1F, sin_B1F))
    arrangement = Arrangement(torch.ones_like(lengths_B, dtype=torch.bool)[:, None])
    mask_BQS = causal_mask(arrangement, lengths_B - 1, int(lengths_B.max()))
    attended = attend_along(chains, number, queries, arrangement=arrangement, mask_BQS=mask_BQS)
    return weights.final_norm(finish_layer(weights, layer, x_BD, attended))


def padding_mask(lengths_B: Tensor) -> Tensor:
    """What is to be added to the scores of chains of these lengths, [B, S]."""
    place_S = torch.arange(int(lengths_B.max()), device=lengths_B.device)
    hidden_BS = place_S >= lengths_B[:, None]
    return torch.zeros(hidden_BS.shape, device=lengths_B.device).masked_fill_(hidden_BS, -torch.inf)


def causal_mask(arrangement: Arrangement, positions_n: Tensor, num_places: int) -> Tensor:
    """What is to be added to the scores of tokens that see their chain up to themselves, [B, Q, S]."""
    place_S = torch.arange(num_places, device=positions_n.device)
    hidden_BQS = place_S > arrangement.spread(positions_n)[..., None]
    return torch.zeros(hidden_BQS.shape, device=positions_n.device).masked_fill_(hidden_BQS, -torch.inf)
