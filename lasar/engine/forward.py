"""Decoder layers over loose tokens: padding exists inside attention and nowhere else.

The linear layers, where nearly all arithmetic is, run over the n tokens that a step really has, of whatever request,
in one product each. Only attention arranges them by request. Keys and values of a request's chain (prompt, latents)
lie where their position says, in buffers that are written once and never moved; keys of beams are kept in lists, one
for each generation, and looked up by ancestry. Attention over whole chains goes by groups of requests whose chains are
of like lengths, so that a long history in a batch costs the short ones nothing.

Legend: B batch, n tokens, D hidden, H query heads, K key heads (H = K * G), F head size, C places of a chain's buffer,
S places that are looked at, Q tokens of a request at most.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention, silu

from lasar.engine.weights import FusedLayer, FusedWeights, plus_times

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]

_SHORT = 16  # tokens that are not worth a group of their own


@dataclass(kw_only=True)
class Chains:
    """Keys and values of the batch's chains.

    Attributes:
        keys: for every layer [B, K, C, F].
        values: for every layer [B, K, C, F].
    """

    keys: list[Tensor]
    values: list[Tensor]

    def write(self, layer: int, keys_nKF: Tensor, values_nKF: Tensor, *, at: tuple[Tensor, Tensor]) -> None:
        """Put the keys and values of n tokens at their request and position."""
        rows_n, positions_n = at
        self.keys[layer][rows_n, :, positions_n] = keys_nKF
        self.values[layer][rows_n, :, positions_n] = values_nKF


@dataclass(frozen=True, kw_only=True)
class Generation:
    """Beams that were computed together: keys and values of each layer, [n, K, F]."""

    keys: list[Tensor]
    values: list[Tensor]


class Arrangement:
    """n loose tokens as a rectangle of requests and back."""

    def __init__(self, present_BQ: Tensor) -> None:
        """Number the tokens that are present, request by request."""
        self.batch = len(present_BQ)
        self.number_BQ = (present_BQ.flatten().cumsum(0) - 1).view_as(present_BQ)
        self.places_n = present_BQ.flatten().nonzero()[:, 0]
        self.rows_n = self.places_n // present_BQ.shape[1]
        counts_B = present_BQ.sum(1)
        self.width = int(counts_B.max())
        self._number_of_place: Tensor | None = None
        if len(self.places_n) < self.batch * self.width:
            first_B1 = (counts_B.cumsum(0) - counts_B)[:, None]
            column_Q = torch.arange(self.width, device=present_BQ.device)
            # A place that no token has repeats a token; the last one, if it must.
            last = len(self.places_n) - 1
            self._number_of_place = (first_B1 + column_Q).clamp(max=last).flatten()
            own_BQ = column_Q < counts_B[:, None]
            self._place_of_number = own_BQ.flatten().nonzero()[:, 0]

    def spread(self, x_n: Tensor) -> Tensor:
        """[n, ...] to [B, Q, ...]."""
        if self._number_of_place is not None:
            x_n = x_n[self._number_of_place]
        return x_n.view(self.batch, self.width, *x_n.shape[1:])

    def collect(self, x_BQ: Tensor) -> Tensor:
        """[B, Q, ...] to [n, ...]."""
        x = x_BQ.flatten(0, 1)
        return x if self._number_of_place is None else x[self._place_of_number]


def groups_of_like_length(lengths_B: Tensor) -> list[slice]:
    """Neighbouring requests whose chains are alike: none longer than twice the shortest, or than a few tokens."""
    groups, start, shortest, longest = [], 0, math.inf, 0
    for row, length in enumerate(lengths_B.tolist()):
        shortest, longest = min(shortest, length), max(longest, length)
        if longest > max(_SHORT, 2 * shortest):
            groups.append(slice(start, row))
            start, shortest, longest = row, length, length
    return [*groups, slice(start, len(lengths_B))]


@dataclass(frozen=True, kw_only=True)
class PromptGroup:
    """Prompts of like lengths among a batch's, as a rectangle.

    Attributes:
        rows: which requests.
        tokens: which loose tokens.
        length: of the longest.
        places: of the tokens in the rectangle; None where it is full.
    """

    rows: slice
    tokens: slice
    length: int
    places: Tensor | None


def group_prompts(lengths_B: Tensor) -> list[PromptGroup]:
    """Prompts whose tokens lie one after another, grouped by length."""
    ends = [0, *lengths_B.cumsum(0).tolist()]
    groups = []
    for rows in groups_of_like_length(lengths_B):
        lengths = lengths_B[rows]
        length = int(lengths.max())
        present = torch.arange(length, device=lengths.device) < lengths[:, None]
        places = None if bool(present.all()) else present.flatten().nonzero()[:, 0]
        tokens = slice(ends[rows.start], ends[rows.stop])
        groups.append(PromptGroup(rows=rows, tokens=tokens, length=length, places=places))
    return groups


def run_layers(
    weights: FusedWeights,
    x_nD: Tensor,
    mixed_n: Tensor | None,
    *,
    rotation: tuple[Tensor, Tensor],
    attend: Attend,
    num_layers: int | None = None,
) -> Tensor:
    """The layers, without the final norm.

    Args:
        weights: of the decoder.
        x_nD: embeddings of the tokens.
        mixed_n: what the first layer's `project` gives for them; None to compute it.
        rotation: of their positions; see `FusedWeights.rotations`.
        attend: called with a layer's number and queries [n, H, F], keys and values [n, K, F]; gives [n, H * F].
        num_layers: how many layers to run, all by default.
    """
    for number, layer in enumerate(weights.layers[:num_layers]):
        mixed_n = weights.project(number, x_nD) if mixed_n is None else mixed_n
        queries, keys, values = split_heads(weights, layer, mixed_n, rotation)
        x_nD, mixed_n = finish_layer(weights, layer, x_nD, attend(number, queries, keys, values)), None
    return x_nD


def split_heads(
    weights: FusedWeights, layer: FusedLayer, mixed_n: Tensor, rotation: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [n, H, F], keys and values [n, K, F] of what `qkv` gives; without queries, of what its rest gives."""
    mixed_nF = mixed_n.view(len(mixed_n), -1, weights.head_size)
    turned_nF, values_nKF = mixed_nF.tensor_split([mixed_nF.shape[1] - weights.key_heads], dim=1)
    if layer.gain is not None:
        turned_nF = weights.scaled(turned_nF).mul_(layer.gain[-turned_nF.shape[1] :])
    cos_n1F, sin_n1F = rotation
    swapped_nF = turned_nF.roll(weights.head_size // 2, -1)
    turned_nF = torch.addcmul(turned_nF * cos_n1F, swapped_nF, sin_n1F)
    queries_nHF, keys_nKF = turned_nF.tensor_split([turned_nF.shape[1] - weights.key_heads], dim=1)
    return queries_nHF, keys_nKF, values_nKF


def finish_layer(weights: FusedWeights, layer: FusedLayer, x_nD: Tensor, attended_n: Tensor) -> Tensor:
    """Both residual branches, given what attention gathered [n, H * F]."""
    x_nD = plus_times(x_nD, attended_n, layer.out)
    # In bf16 the MLP's inner values stay rounded: they are the widest, and the next product would round them anyway.
    gate_n, up_n = (weights.scaled(x_nD).to(layer.gate_up.dtype) @ layer.gate_up).chunk(2, dim=-1)
    return plus_times(x_nD, silu(gate_n).mul_(up_n), layer.down)


def attend_causally(
    chains: Chains, layer: int, queries_nHF: Tensor, *, groups: Sequence[PromptGroup]
) -> Tensor:
    """Attention of whole prompts to themselves; keys are already in their place."""
    key_heads, head_size = chains.keys[layer].shape[1], chains.keys[layer].shape[3]
    heads, attended = queries_nHF.shape[1], []
    for group in groups:
        queries, batch, length = queries_nHF[group.tokens], group.rows.stop - group.rows.start, group.length
        if group.places is not None:
            padded = queries.new_zeros(batch * length, heads, head_size)
            queries = padded.index_copy_(0, group.places, queries)
        found = scaled_dot_product_attention(
            queries.view(batch, length, heads, head_size).transpose(1, 2),
            chains.keys[layer][group.rows, :, :length],
            chains.values[layer][group.rows, :, :length],
            is_causal=True, scale=1.0, enable_gqa=heads != key_heads,
        )  # fmt: skip
        flat = found.transpose(1, 2).reshape(batch * length, heads * head_size)
        attended.append(flat if group.places is None else flat[group.places])
    return attended[0] if len(attended) == 1 else torch.cat(attended)


def attend_along(
    chains: Chains, layer: int, queries_nHF: Tensor, *, arrangement: Arrangement, mask_BQS: Tensor
) -> Tensor:
    """Attention of tokens, a few of each request, to the chain they are part of; keys are already in their place.

    Args:
        chains: keys and values of the requests.
        layer: which layer's.
        queries_nHF: queries.
        arrangement: of the tokens.
        mask_BQS: added to the scores of the chain's first S places.
    """
    key_heads, places = chains.keys[layer].shape[1], mask_BQS.shape[-1]
    attended = scaled_dot_product_attention(
        arrangement.spread(queries_nHF).transpose(1, 2),
        chains.keys[layer][:, :, :places],
        chains.values[layer][:, :, :places],
        attn_mask=mask_BQS[:, None], scale=1.0, enable_gqa=queries_nHF.shape[1] != key_heads,
    )  # fmt: skip
    return arrangement.collect(attended.transpose(1, 2).flatten(2))


def attend_across(
    chains: Chains,
    layer: int,
    queries_nHF: Tensor,
    *,
    arrangement: Arrangement,
    masks: Sequence[tuple[slice, Tensor]],
    own: Sequence[tuple[Tensor, Tensor]],
) -> Tensor:
    """Attention of beams to the chains of their requests and to ancestors of their own.

    All beams of a request are rows of one product with the chain's keys.

    Args:
        chains: keys and values of the requests.
        layer: which layer's.
        queries_nHF: queries.
        arrangement: of the tokens.
        masks: for each group of requests, what is added to the scores of their chains' first S places, [rows, S].
        own: keys and values of the ancestors and of the token itself, a generation each, spread to [B, Q, K, F].
    """
    _, key_heads, _, head_size = chains.keys[layer].shape
    spread = arrangement.spread(queries_nHF)
    spread = spread.view(arrangement.batch, arrangement.width, key_heads, -1, head_size)
    attended = []
    for rows, mask_BS in masks:
        places = mask_BS.shape[1]
        attended.append(
            _attend_beams(
                spread[rows].permute(0, 2, 3, 1, 4).contiguous(),
                chains.keys[layer][rows, :, :places].flatten(0, 1),
                chains.values[layer][rows, :, :places].flatten(0, 1),
                mask_BS,
                [(keys[rows], values[rows]) for keys, values in own],
            )
        )
    return arrangement.collect(attended[0] if len(attended) == 1 else torch.cat(attended))


def _attend_beams(
    queries: Tensor, keys: Tensor, values: Tensor, mask_BS: Tensor, own: Sequence[tuple[Tensor, Tensor]]
) -> Tensor:
    """One group of `attend_across`: queries [B, K, G, Q, F], keys and values [B * K, S, F], to [B, Q, K * G * F]."""
    batch, key_heads, group, width, head_size = queries.shape
    places, rows = mask_BS.shape[1], (batch * key_heads, group * width)
    mask = mask_BS[:, None].expand(-1, key_heads, -1).reshape(-1, 1, places)
    scores = torch.baddbmm(mask, queries.view(*rows, head_size), keys.transpose(1, 2))
    beside = [(queries * _across_groups(keys_own)).sum(-1) for keys_own, _ in own]
    scores = torch.cat([scores, torch.stack(beside, dim=-1).view(*rows, len(own))], dim=-1)
    weights = scores.softmax(-1)
    attended = torch.bmm(weights[..., :places], values).view_as(queries)
    for number, (_, values_own) in enumerate(own):
        share = weights[..., places + number].view(queries.shape[:-1])[..., None]
        attended.addcmul_(share, _across_groups(values_own))
    return attended.permute(0, 3, 1, 2, 4).reshape(batch, width, -1)


def _across_groups(x_BQKF: Tensor) -> Tensor:
    """[B, K, 1, Q, F]: beside queries [B, K, G, Q, F]."""
    return x_BQKF.transpose(1, 2)[:, :, None]
