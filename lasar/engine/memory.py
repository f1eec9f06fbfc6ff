"""Prompts seen lately: their keys and values are kept, and a prompt that begins like one of them is only continued.

What a causal decoder computes for a token depends on the tokens before it alone. A user who comes back after another
purchase has the same history and a few tokens more, so a few tokens are all that has to be computed.

Legend: B batch, T prompt tokens, L layers, K key heads, F head size, C tokens kept.
"""

import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lasar.engine.forward import Arrangement
from lasar.engine.prefix import FusedPrefix, continue_chains, empty_chains, encode, prefix_of
from lasar.engine.weights import FusedWeights
from lasar.model.backbone import input_table

_LEAST = 8  # tokens that are worth looking for
_MOST_NEW = 32  # tokens that are added to a known prompt; more are computed with the fresh ones
_MODULUS = (1 << 61) - 1


class _Known(NamedTuple):
    """A prompt: its tokens, a mark for each of its beginnings, keys and values [2, L, K, C, F]."""

    tokens: tuple[int, ...]
    marks: list[int]
    states: Tensor


@dataclass(frozen=True, kw_only=True)
class Recall:
    """How much was known already: tokens of prompts, and those of them that were kept."""

    tokens: int
    known: int


class PromptMemory:
    """Keys and values of prompts within a number of bytes; what was not used for longest goes first.

    Attributes:
        last: of the last batch.
    """

    def __init__(self, limit_bytes: int) -> None:
        """Empty.

        Args:
            limit_bytes: of keys and values.
        """
        self._limit, self._held, self._lock = limit_bytes, 0, threading.Lock()
        self._known: OrderedDict[int, _Known] = OrderedDict()
        self._prompt_of_mark: dict[int, int] = {}
        self.last = Recall(tokens=0, known=0)

    def __len__(self) -> int:
        """Prompts kept."""
        return len(self._known)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values kept."""
        return self._held

    def clear(self) -> None:
        """Forget all."""
        with self._lock:
            self._known.clear()
            self._prompt_of_mark.clear()
            self._held = 0

    def find(self, tokens: tuple[int, ...]) -> tuple[Tensor | None, int]:
        """Keys and values of a prompt that begins alike, and how many tokens are; the last one never is."""
        marks = _marks(tokens[:-1])
        with self._lock:
            for length in range(len(marks), _LEAST - 1, -1):
                prompt = self._prompt_of_mark.get(marks[length - 1])
                if prompt is None:
                    continue
                known = self._known[prompt]
                if known.tokens[:length] == tokens[:length]:  # a mark is a hash
                    self._known.move_to_end(prompt)
                    return known.states, length
        return None, 0

    def keep(self, tokens: tuple[int, ...], states: Tensor) -> None:
        """Remember a prompt's keys and values [2, L, K, C, F]; they are not copied."""
        marks = _marks(tokens)
        with self._lock:
            if states.nbytes > self._limit or marks[-1] in self._known:
                return
            self._known[marks[-1]] = _Known(tokens, marks, states)
            self._prompt_of_mark |= dict.fromkeys(marks, marks[-1])
            self._held += states.nbytes
            while self._held > self._limit:
                prompt, oldest = self._known.popitem(last=False)
                self._held -= oldest.states.nbytes
                for mark in oldest.marks:
                    if self._prompt_of_mark.get(mark) == prompt:
                        del self._prompt_of_mark[mark]


def _marks(tokens: tuple[int, ...]) -> list[int]:
    """A hash of every beginning."""
    marks, mark = [], 1
    for token in tokens:
        mark = (mark * 1_000_003 + token + 1) % _MODULUS
        marks.append(mark)
    return marks


@torch.no_grad()
def encode_with_memory(
    weights: FusedWeights, ids_BT: Tensor, lengths_B: Tensor, *, opened: bool, room: int, memory: PromptMemory
) -> FusedPrefix:
    """As `lasar.engine.prefix.encode`, but for what is in memory; what was computed is then kept there."""
    lengths = lengths_B.tolist()
    prompts = [tuple(row[:length]) for row, length in zip(ids_BT.tolist(), lengths, strict=True)]
    found = [memory.find(prompt) for prompt in prompts]
    known = [
        length if states is not None and len(prompt) - length <= _MOST_NEW else 0
        for prompt, (states, length) in zip(prompts, found, strict=True)
    ]
    memory.last = Recall(tokens=sum(lengths), known=sum(known))
    fresh = [row for row, length in enumerate(known) if not length]
    if len(fresh) == len(prompts):
        prefix = encode(weights, ids_BT, lengths_B, opened=opened, room=room)
    else:
        prefix = _continued(weights, ids_BT, lengths_B, opened=opened, room=room, fresh=fresh)
        chains = prefix.chains
        for row, ((states, _), length) in enumerate(zip(found, known, strict=True)):
            if states is not None and length:
                for layer, (keys, values) in enumerate(zip(chains.keys, chains.values, strict=True)):
                    keys[row, :, :length] = states[0, layer, :, :length]
                    values[row, :, :length] = states[1, layer, :, :length]
        _add_new(weights, prefix, ids_BT, lengths_B, torch.tensor(known, device=ids_BT.device))
    for row, prompt in enumerate(prompts):
        if known[row] < len(prompt) - 1:
            kept = [
                torch.stack([part[row, :, : len(prompt)] for part in parts])
                for parts in (prefix.chains.keys, prefix.chains.values)
            ]
            memory.keep(prompt, torch.stack(kept))
    return prefix


def _continued(
    weights: FusedWeights, ids_BT: Tensor, lengths_B: Tensor, *, opened: bool, room: int, fresh: list[int]
) -> FusedPrefix:
    """A batch of which only some prompts are computed."""
    (batch, length), device = ids_BT.shape, ids_BT.device
    chains = empty_chains(weights, batch, length + room, device)
    hidden_B1D = torch.zeros(batch, 1, input_table(weights.model).shape[1], device=device)
    if fresh:
        rows = torch.tensor(fresh, device=device)
        longest = int(lengths_B[rows].max())
        part = encode(weights, ids_BT[rows, :longest], lengths_B[rows], opened=opened, room=room)
        for whole, own in ((chains.keys, part.chains.keys), (chains.values, part.chains.values)):
            for layer, tensor in enumerate(own):
                whole[layer][rows, :, : tensor.shape[2]] = tensor
        hidden_B1D[rows] = part.hidden_B1D
    return prefix_of(weights, chains, hidden_B1D, ids_BT, lengths_B, opened=opened)


def _add_new(
    weights: FusedWeights, prefix: FusedPrefix, ids_BT: Tensor, lengths_B: Tensor, known_B: Tensor
) -> None:
    """Compute the tokens of known prompts that are new."""
    position_T = torch.arange(ids_BT.shape[1], device=ids_BT.device)
    new_BT = (position_T >= known_B[:, None]) & (position_T < lengths_B[:, None]) & (known_B[:, None] > 0)
    arrangement = Arrangement(new_BT)
    x_nD, _ = weights.embed(ids_BT.flatten()[arrangement.places_n])
    positions_n = arrangement.places_n % ids_BT.shape[1]
    hidden_nD = continue_chains(weights, prefix.chains, x_nD, arrangement, positions_n)
    last_n = positions_n == lengths_B[arrangement.rows_n] - 1
    prefix.hidden_B1D[arrangement.rows_n[last_n], 0] = hidden_nD[last_n]
