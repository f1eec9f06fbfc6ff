"""Explicit chain of thought: the model writes its rationale in words, then answers (after GREAM, METHOD section 7).

A prompt goes on with `<s>`, greedy text and `<e>`; the answer is the usual beam search over the trie, hung off `<e>`.
It is the latent loop with words in the place of hidden states, and is made as quick as words can be: the prompt's keys
and values are computed once and kept, all prompts of a batch write together, and a row leaves the batch at its `<e>`.

Legend: B prompts, A of them still writing, R of them in the buffers in use, T trunk tokens, K keys, H heads, E head
size, D hidden, V text tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from lasar.artifacts import read_json, write_json
from lasar.baselines.ranking import Items
from lasar.engine.forward import Arrangement, Chains
from lasar.engine.prefix import FusedPrefix, continue_chains
from lasar.errors import ArtifactError, ConfigError
from lasar.model.attention import growth_mask
from lasar.model.backbone import input_table, trunk
from lasar.model.prompt import Prefix, encode_prompts
from lasar.model.reasoner import Depth, LatentReasoner, ReasoningSettings, Thought
from lasar.model.tree import Nodes, Tree
from lasar.prompts.vocabulary import Vocabulary, pad_right
from lasar.training.text_loss import text_logits

WRITING_FILE = "explicit_cot.json"


@dataclass(frozen=True, kw_only=True)
class Written:
    """What was written after every prompt.

    Attributes:
        prefix: prompts continued by `<s>`, their texts and `<e>`; answers hang off it.
        texts: token ids of each text, without the markers.
    """

    prefix: Prefix
    texts: Sequence[Sequence[int]]


@torch.no_grad()
def write(prefix: Prefix, *, vocabulary: Vocabulary, max_tokens: int) -> Written:
    """Write greedily after every prompt, each until its `<e>`.

    Args:
        prefix: computed prompts, nothing hung off them yet; used up.
        vocabulary: names `<s>`, `<e>` and the text tokens below the markers.
        max_tokens: of a text; after as many, `<e>` is forced, as in training.
    """
    batch, model = len(prefix.tip_B1), prefix.model
    rows = _ChainRows(prefix, max_tokens + 2) if isinstance(prefix, FusedPrefix) else _CachedRows(prefix)
    hidden_AD = rows.open(vocabulary)
    texts: list[list[int]] = [[] for _ in range(batch)]
    for step in range(max_tokens + 1):
        tokens_A = text_logits(model, hidden_AD, vocabulary=vocabulary).argmax(-1)
        if step == max_tokens:
            tokens_A = torch.full_like(tokens_A, vocabulary.latent_end)
        for row, token in zip(rows.index_A.tolist(), tokens_A.tolist(), strict=True):
            texts[row].append(token)
        hidden_AD = rows.feed(tokens_A)
        closed_A = tokens_A == vocabulary.latent_end
        if bool(closed_A.any()):
            rows.leave(closed_A, hidden_AD)
            hidden_AD = hidden_AD[~closed_A]
        if len(hidden_AD) == 0:
            break
    return Written(prefix=rows.together(), texts=[text[:-1] for text in texts])


class _CachedRows:
    """The rows that are still writing, of any model. Prompts are padded on the right, so a row's keys have a gap.

    Attributes:
        index_A: which prompt each row belongs to.
    """

    def __init__(self, prefix: Prefix) -> None:
        lengths_B = prefix.tip_B1[:, 0] + 1
        self._model, self._cache, self._opening_B1 = prefix.model, prefix.cache, prefix.opening_B1
        self.index_A = torch.arange(len(lengths_B), device=lengths_B.device)
        self._seen_AK = torch.arange(prefix.tree.num_keys, device=lengths_B.device) < lengths_B[:, None]
        self._position_A = lengths_B
        self._done: list[_Finished] = []

    def open(self, vocabulary: Vocabulary) -> Tensor:
        """Append `<s>`."""
        return self.feed(torch.full_like(self._position_A, vocabulary.latent_start))

    def feed(self, tokens_A: Tensor) -> Tensor:
        """Append a token to every row; its hidden state after the final norm, [A, D]."""
        self._seen_AK = torch.nn.functional.pad(self._seen_AK, (0, 1), value=True)
        position_A1 = self._position_A[:, None]
        nodes = Nodes(index_BQ=position_A1, position_BQ=position_A1, mask_BQK=self._seen_AK[:, None])
        hidden_A1D: Tensor = trunk(self._model)(
            input_ids=tokens_A[:, None],
            attention_mask=growth_mask(self._model, nodes),
            position_ids=position_A1,
            past_key_values=self._cache,
            use_cache=True,
        ).last_hidden_state
        self._position_A = self._position_A + 1
        return hidden_A1D[:, 0]

    def leave(self, leaving_A: Tensor, hidden_AD: Tensor) -> None:
        """Take rows out of the batch, with what their answers need."""
        gone_A, stay_A = leaving_A.nonzero()[:, 0], (~leaving_A).nonzero()[:, 0]
        layers = _layers(self._cache)
        self._done.append(
            _Finished(
                index_A=self.index_A[gone_A],
                seen_AK=self._seen_AK[gone_A],
                hidden_AD=hidden_AD[gone_A],
                layers=[(keys[gone_A], values[gone_A]) for keys, values in layers] if len(stay_A) else layers,
            )
        )
        if len(stay_A):
            self._cache.batch_select_indices(stay_A)
        self.index_A, self._position_A = self.index_A[stay_A], self._position_A[stay_A]
        self._seen_AK = self._seen_AK[stay_A]

    def together(self) -> Prefix:
        """All rows in one cache again, in their first order, each row's keys without a gap."""
        order_B = torch.cat([part.index_A for part in self._done]).argsort()
        lengths_B = torch.cat([part.seen_AK.sum(1) for part in self._done])[order_B]
        width = int(lengths_B.max())
        cache = DynamicCache()
        closed_up = [_closed_up(part, width) for part in self._done]
        for number in range(len(closed_up[0])):
            keys, values = (
                torch.cat([layers[number][which] for layers in closed_up])[order_B] for which in (0, 1)
            )
            cache.update(keys, values, number)
        tree = Tree(lengths_B, width)
        return Prefix(
            model=self._model, tree=tree, cache=cache, tip_B1=tree.trunk_ends_B1,
            hidden_B1D=torch.cat([part.hidden_AD for part in self._done])[order_B][:, None],
            opening_B1=self._opening_B1,
        )  # fmt: skip


def _layers(cache: Any) -> list[tuple[Tensor, Tensor]]:
    return [(layer.keys, layer.values) for layer in cache.layers]


@dataclass
class _Finished:
    index_A: Tensor
    seen_AK: Tensor
    hidden_AD: Tensor
    layers: list[tuple[Tensor, Tensor]]


def _closed_up(part: _Finished, width: int) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of a group with the seen ones first, [A, H, width, E]; what follows them is padding."""
    count = part.seen_AK.shape[1]
    gaps = not bool(part.seen_AK.all())
    place_AK = (~part.seen_AK).to(torch.uint8).argsort(dim=1, stable=True) if gaps else None

    def moved(tensor_AHKE: Tensor) -> Tensor:
        if place_AK is not None:
            index = place_AK[:, None, :, None].expand(-1, tensor_AHKE.shape[1], -1, tensor_AHKE.shape[3])
            tensor_AHKE = tensor_AHKE.gather(2, index)
        return torch.nn.functional.pad(tensor_AHKE[:, :, :width], (0, 0, 0, max(0, width - count)))

    return [(moved(keys), moved(values)) for keys, values in part.layers]


class _ChainRows:
    """The rows that are still writing, on the fused path, where a token's keys have their place and never move.

    A row that has finished takes no further part in the linear layers at once, and in attention as soon as half of the
    rows beside it have finished too: then the others move to buffers of their own.

    Attributes:
        index_A: which prompt each row belongs to.
    """

    def __init__(self, prefix: FusedPrefix, room: int) -> None:
        self._prefix = prefix
        chains = prefix.chains
        chains.keys[:] = [torch.nn.functional.pad(keys, (0, 0, 0, room)) for keys in chains.keys]
        chains.values[:] = [torch.nn.functional.pad(values, (0, 0, 0, room)) for values in chains.values]
        self.index_A = torch.arange(len(prefix.ends_B), device=prefix.ends_B.device)
        self._chains, self._moved_R, self._place_A = chains, self.index_A, self.index_A

    def open(self, vocabulary: Vocabulary) -> Tensor:
        """Append `<s>`, if the prompts were not computed with it."""
        hidden_B1D, _ = self._prefix.start_reasoning(vocabulary)
        self._ends_B = self._prefix.ends_B.clone()
        self._hidden_BD = torch.zeros_like(hidden_B1D[:, 0])
        return hidden_B1D[:, 0]

    def feed(self, tokens_A: Tensor) -> Tensor:
        """Append a token to every row; its hidden state after the final norm, [A, D]."""
        writing_R1 = torch.zeros_like(self._moved_R, dtype=torch.bool)[:, None]
        writing_R1[self._place_A] = True
        hidden_AD = continue_chains(
            self._prefix.weights, self._chains, input_table(self._prefix.model)[tokens_A],
            Arrangement(writing_R1), self._ends_B[self.index_A],
        )  # fmt: skip
        self._ends_B[self.index_A] += 1
        return hidden_AD

    def leave(self, leaving_A: Tensor, hidden_AD: Tensor) -> None:
        """Take rows out of the batch."""
        self._hidden_BD[self.index_A[leaving_A]] = hidden_AD[leaving_A]
        self.index_A, self._place_A = self.index_A[~leaving_A], self._place_A[~leaving_A]
        if 2 * len(self.index_A) <= len(self._moved_R):
            self._put_back()
            own = self._prefix.chains
            self._chains = Chains(
                keys=[keys[self.index_A] for keys in own.keys],
                values=[values[self.index_A] for values in own.values],
            )
            self._moved_R = self.index_A
            self._place_A = torch.arange(len(self.index_A), device=self.index_A.device)

    def together(self) -> FusedPrefix:
        """All rows in one prefix again."""
        self._put_back()
        return replace(
            self._prefix,
            ends_B=self._ends_B,
            tip_B1=self._ends_B[:, None] - 1,
            hidden_B1D=self._hidden_BD[:, None],
        )

    def _put_back(self) -> None:
        own = self._prefix.chains
        if self._chains is not own:
            for to, come in ((own.keys, self._chains.keys), (own.values, self._chains.values)):
                for layer, moved in zip(to, come, strict=True):
                    layer[self._moved_R] = moved


class WordReasoner(LatentReasoner):
    """A model that reasons in words, in the place of one that reasons in hidden states.

    Attributes:
        max_tokens: of a text.
    """

    def __init__(self, backbone: PreTrainedModel, *, vocabulary: Vocabulary, max_tokens: int) -> None:
        """Wrap a backbone; there is nothing else to train."""
        super().__init__(
            backbone, vocabulary=vocabulary, settings=ReasoningSettings(max_depth=0, fixed_depth=0)
        )
        self.max_tokens = max_tokens

    def reasons(self, depth: Depth) -> bool:
        """Whether `think` writes, and so begins with `<s>`."""
        return depth == "auto"

    def think(self, prefix: Prefix, *, depth: Depth = "auto", uniform_B: Tensor | None = None) -> Thought:
        """Write after every prompt; with depth 0, answer without a word.

        Raises:
            ConfigError: latent steps are asked for.
        """
        if depth not in ("auto", 0):
            raise ConfigError(
                f"depth={depth}: explicit_cot reasons in words, not in latent steps; use auto or 0"
            )
        thought = super().think(prefix, depth=0)
        if depth == 0:
            return thought
        written = write(prefix, vocabulary=self.vocabulary, max_tokens=self.max_tokens)
        return replace(thought, prefix=written.prefix)


def write_texts(
    reasoner: WordReasoner,
    tokens_IL: NDArray[np.int32],
    histories: Sequence[Items],
    baskets: Sequence[Items],
    *,
    batch_size: int = 64,
) -> list[Sequence[int]]:
    """What the model writes for histories, as token ids, in their order."""
    rows = [
        reasoner.vocabulary.render_history(tokens_IL, history, basket, open_order=True)
        for history, basket in zip(histories, baskets, strict=True)
    ]
    device = reasoner.backbone.device
    texts: list[Sequence[int]] = []
    for start in range(0, len(rows), batch_size):
        padded = pad_right(rows[start : start + batch_size], reasoner.vocabulary.pad)
        ids_BT, lengths_B = (torch.from_numpy(array).to(device) for array in padded)
        with torch.no_grad():
            prompts = encode_prompts(reasoner.backbone, ids_BT, lengths_B)
        texts += write(prompts, vocabulary=reasoner.vocabulary, max_tokens=reasoner.max_tokens).texts
    return texts


def save_writing(folder: Path, *, max_tokens: int) -> None:
    """Mark a model folder as one that reasons in words."""
    write_json(folder / WRITING_FILE, {"max_tokens": max_tokens})


def load_writing(folder: Path, backbone: PreTrainedModel) -> WordReasoner:
    """The reasoner of an `explicit_cot` artifact around its opened backbone.

    Raises:
        ArtifactError: a file is missing or damaged.
    """
    facts = read_json(folder / WRITING_FILE)
    if not isinstance(facts, dict) or not isinstance(facts.get("max_tokens"), int):
        raise ArtifactError(f"{folder / WRITING_FILE}: damaged; run the stage {folder.name!r} again")
    vocabulary = Vocabulary.load(folder / "vocabulary.json")
    return WordReasoner(backbone, vocabulary=vocabulary, max_tokens=facts["max_tokens"]).eval()
