"""A sentence encoder as a reader: text vectors carried into the hidden space of a backbone that knows no text.

A projection is learned in closed form from what both sides know: an item has a text vector, and the frozen Stage-1
model has a state in which it predicts that item. So a segment about shampoo lands where the model is when it predicts
shampoos.

Legend: L levels, D hidden, E text vector width, I items, A anchors, S segments.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from lasar.cot.anchor_sources import Source, states_at
from lasar.cot.segmentation import Segmentation, unit
from lasar.data.interactions import TrainSequence
from lasar.errors import DataError
from lasar.progress import progress
from lasar.prompts.batches import bucket_by_length
from lasar.prompts.vocabulary import Vocabulary
from lasar.ranks import add_up, ranks

Int32Array = NDArray[np.int32]
Int64Array = NDArray[np.int64]
Float32Array = NDArray[np.float32]
Float64Array = NDArray[np.float64]

_CHUNK = 4096  # segments projected at a time
_HELD_OUT = 0.1  # share of items that choose the ridge strength
_FEWEST_ITEMS = 20
_RIDGES = np.logspace(-4, 3, 22)  # relative to the mean variance of a text dimension


@dataclass(frozen=True, kw_only=True)
class ItemStates:
    """Where the backbone is when it predicts items.

    Attributes:
        means_ID: mean hidden state at the positions that predict an item's first code; 0 for an item without any.
        counts_I: positions of each item.
        mean_D: mean over all positions.
        spread: root mean squared distance of a single state to `mean_D`.
    """

    means_ID: Float64Array
    counts_I: Int64Array
    mean_D: Float64Array
    spread: float


def item_states(
    model: nn.Module,
    sequences: Sequence[TrainSequence],
    tokens_IL: Int32Array,
    *,
    vocabulary: Vocabulary,
    train_targets: str,
    batch_tokens: int,
    max_users: int,
    seed: int,
) -> ItemStates:
    """Run training histories through the backbone; one pass over a user gives the state before every item.

    Args:
        model: the frozen backbone.
        sequences: training histories; the newest `vocabulary.max_history` items of each are read.
        tokens_IL: tokens of every item.
        vocabulary: renders the histories.
        train_targets: `all` items of a history, or those of its `last` basket.
        batch_tokens: tokens of a batch at most, padding included.
        max_users: histories read at most.
        seed: of which histories these are.
    """
    rows, ends, items = [], [], []
    for index in np.random.default_rng(seed).permutation(len(sequences))[:max_users].tolist():
        row, end, item = _predictions(sequences[index], tokens_IL, vocabulary, train_targets)
        rows.append(row)
        ends.append(end)
        items.append(item)
    batches = bucket_by_length([len(row) for row in rows], batch_tokens, np.random.default_rng(0))
    width = model.config.hidden_size  # type: ignore[union-attr]
    sums_ID = np.zeros((len(tokens_IL), int(width)))  # type: ignore[arg-type]
    counts_I = np.zeros(len(tokens_IL), dtype=np.int64)
    squares = np.zeros(())
    with progress("reading histories", total=len(rows), unit="users") as advance:
        for number, batch in enumerate(batches):
            advance(len(batch))
            if number % ranks().size != ranks().rank:
                continue
            states = states_at(model, [rows[i] for i in batch], [ends[i] for i in batch], pad=vocabulary.pad)
            item_of_state = np.concatenate([items[i] for i in batch])
            np.add.at(sums_ID, item_of_state, states)
            counts_I += np.bincount(item_of_state, minlength=len(counts_I))
            squares += np.square(states, dtype=np.float64).sum()
    for mine in (sums_ID, counts_I, squares):
        add_up(torch.from_numpy(mine))
    total = max(int(counts_I.sum()), 1)
    mean_D = sums_ID.sum(0) / total
    return ItemStates(
        means_ID=sums_ID / np.maximum(counts_I, 1)[:, None],
        counts_I=counts_I,
        mean_D=mean_D,
        spread=float(np.sqrt(max(float(squares) / total - mean_D @ mean_D, 0.0))),
    )


def _predictions(
    sequence: TrainSequence, tokens_IL: Int32Array, vocabulary: Vocabulary, train_targets: str
) -> tuple[Int32Array, Int64Array, Int64Array]:
    """Tokens of a history, the positions that predict the first code of an item, and those items."""
    items, baskets = sequence.items[-vocabulary.max_history :], sequence.baskets[-vocabulary.max_history :]
    row = vocabulary.render_history(tokens_IL, items, baskets, open_order=False)
    if vocabulary.orders:
        order_of_item = np.cumsum(np.diff(baskets, prepend=-1) != 0) - 1
        ends = np.flatnonzero(row == vocabulary.order)[order_of_item]
    else:
        ends = np.arange(len(items)) * vocabulary.num_levels
    kept = baskets == baskets[-1] if train_targets == "last" else np.ones(len(items), dtype=bool)
    return row, ends[kept].astype(np.int64), items[kept].astype(np.int64)


@dataclass(frozen=True, kw_only=True)
class Projection:
    """Ridge regression from the text vector of an item to the state that predicts it, both sides centred.

    Attributes:
        weights_ED: the map.
        num_items: items it was learned from.
        ridge: the strength chosen, relative to the mean variance of a text dimension.
        held_out_r2: share of the variance of states explained on items that were held out (the mean state has 0).
        held_out_cosine: mean cosine of predicted and true state of held-out items, both centred (the mean state has 0).
    """

    weights_ED: Float64Array
    num_items: int
    ridge: float
    held_out_r2: float
    held_out_cosine: float

    def facts(self) -> dict[str, float]:
        """What a summary says."""
        return {name: value for name, value in vars(self).items() if name != "weights_ED"}


def fit_projection(
    texts: Sequence[str],
    encode: Callable[[list[str]], Float32Array],
    states: ItemStates,
    *,
    max_items: int,
    seed: int,
) -> Projection:
    """Learn the projection; its strength is the one that explains held-out items best.

    An item's weight is the square root of how often it was predicted: a mean over more positions is a better mean, but
    beyond a point it is no better evidence of what a text means.

    Args:
        texts: of every item, "" where none.
        encode: texts to vectors.
        states: of the backbone.
        max_items: items used at most.
        seed: of the choice of items, used and held out.

    Raises:
        DataError: too few items have both a text and a training event.
    """
    rng = np.random.default_rng(seed)
    usable = np.flatnonzero(np.array([bool(text.strip()) for text in texts]) & (states.counts_I > 0))
    if len(usable) < _FEWEST_ITEMS:
        raise DataError(
            f"anchor.source=encoder: {len(usable)} items have a text and a training event, {_FEWEST_ITEMS} are needed "
            "to learn a projection; name the column of titles in prepare.columns, or raise anchor.projection_users"
        )
    items = np.sort(rng.permutation(usable)[:max_items])
    x = unit(encode([texts[i].strip() for i in items.tolist()])).astype(np.float64)
    y, w = states.means_ID[items], np.sqrt(states.counts_I[items])
    held_out = np.zeros(len(x), dtype=bool)
    held_out[rng.permutation(len(x))[: max(2, round(_HELD_OUT * len(x)))]] = True
    solve, centre_E, centre_D = _ridge_path(x[~held_out], y[~held_out], w[~held_out])
    truth, weight = y[held_out] - centre_D, w[held_out]
    scores = []
    for ridge in _RIDGES.tolist():
        guess = (x[held_out] - centre_E) @ solve(ridge)
        r2 = 1 - float(
            weight @ np.square(truth - guess).sum(1) / max(weight @ np.square(truth).sum(1), 1e-12)
        )
        lengths = np.linalg.norm(truth, axis=1) * np.linalg.norm(guess, axis=1)
        scores.append((r2, float(((truth * guess).sum(1) / np.maximum(lengths, 1e-12)).mean()), ridge))
    r2, cosine, ridge = max(scores)
    solve, _, _ = _ridge_path(x, y, w)
    return Projection(
        weights_ED=solve(ridge), num_items=len(x), ridge=ridge, held_out_r2=r2, held_out_cosine=cosine
    )


def _ridge_path(
    x: Float64Array, y: Float64Array, weight: Float64Array
) -> tuple[Callable[[float], Float64Array], Float64Array, Float64Array]:
    """Weighted ridge regression for any strength from one decomposition, and the two centres."""
    weight = weight / weight.sum()
    centre_x, centre_y = weight @ x, weight @ y
    x, y = x - centre_x, y - centre_y
    values, vectors = np.linalg.eigh((x * weight[:, None]).T @ x)
    rotated = vectors.T @ ((x * weight[:, None]).T @ y)

    def solve(ridge: float) -> Float64Array:
        solved: Float64Array = vectors @ (rotated / (values + ridge * values.mean())[:, None])
        return solved

    return solve, centre_x, centre_y


def segment_vectors(segments: Sequence[Int32Array], sentence_vectors: Float32Array) -> Float32Array:
    """Unit vector of each segment: the mean direction of its sentences.

    Args:
        segments: numbers of the sentences of each segment, at least one each.
        sentence_vectors: unit vectors of the distinct sentences, width E.
    """
    lengths = np.array([len(segment) for segment in segments])
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    sums = np.add.reduceat(sentence_vectors[np.concatenate(segments)], starts, axis=0)
    return unit(sums)


@dataclass(frozen=True, kw_only=True)
class Placement:
    """The affine map from segment vectors to anchors.

    Attributes:
        centre_E: mean segment vector; it goes to the mean state.
        weights_ED: projection times scale.
        mean_D: mean state.
        scale: what the projection was multiplied by.
    """

    centre_E: Float64Array
    weights_ED: Float64Array
    mean_D: Float64Array
    scale: float

    def __call__(self, vectors_SE: Float32Array) -> Float32Array:
        """Anchors float32 [S, D]."""
        return np.asarray(self.mean_D + (vectors_SE - self.centre_E) @ self.weights_ED, dtype=np.float32)


def place_segments(
    projection: Projection,
    chunks: Iterable[tuple[Float32Array, Int64Array]],
    *,
    mean_D: Float64Array,
    spread: float | None,
) -> Placement:
    """Fit the projection, learned from item texts, to how rationales speak.

    A sentence about a customer is not an item's title: all of them differ from all titles in one common direction,
    which would shift every anchor alike. So segments are centred by their own mean. And a ridge shrinks: without a
    scale every anchor would lie near the mean state, and a latent step could please them all by staying there.

    Args:
        projection: from item texts.
        chunks: segment vectors [S, E] and how often each is used.
        mean_D: mean state, where the mean segment goes.
        spread: root mean squared distance to the mean that anchors shall have; None leaves them as they are.
    """
    total, sum_E, moment_EE = 0, np.zeros(len(projection.weights_ED)), np.zeros((1, 1))
    for vectors, counts in chunks:
        vectors_SE = vectors.astype(np.float64)
        total += int(counts.sum())
        sum_E = sum_E + counts @ vectors_SE
        moment_EE = moment_EE + (vectors_SE * counts[:, None]).T @ vectors_SE
    centre_E = sum_E / total
    covariance_EE = moment_EE / total - np.outer(centre_E, centre_E)
    variance = float(np.einsum("ed,ef,fd->", projection.weights_ED, covariance_EE, projection.weights_ED))
    scale = 1.0 if spread is None or variance <= 1e-12 else spread / variance**0.5
    return Placement(
        centre_E=centre_E,
        weights_ED=projection.weights_ED * scale,
        mean_D=mean_D,
        scale=scale,
    )


def place_by_encoder(
    segmentation: Segmentation,
    anchors_S: Int32Array,
    *,
    projection: Projection,
    mean_D: Float64Array,
    spread: float | None,
) -> tuple[Source, Placement]:
    """Source `encoder`: the projection of each distinct segment's vector.

    Args:
        segmentation: the segments, and the vectors of their sentences.
        anchors_S: number of the anchor of each segment.
        projection: from item texts.
        mean_D: mean state of the backbone.
        spread: as for `place_segments`.
    """
    _, first_use, uses_A = np.unique(anchors_S, return_index=True, return_counts=True)
    batches = [np.arange(start, min(start + _CHUNK, len(uses_A))) for start in range(0, len(uses_A), _CHUNK)]

    def vectors(batch: Int64Array) -> Float32Array:
        segments = [segmentation.sentences_of(s) for s in first_use[batch].tolist()]
        return segment_vectors(segments, segmentation.vectors_E)

    chunks = ((vectors(batch), uses_A[batch]) for batch in batches)
    place = place_segments(projection, chunks, mean_D=mean_D, spread=spread)
    return Source(batches, lambda number: place(vectors(batches[number]))), place


def nearest_items(vectors_SD: Float32Array, states: ItemStates, *, k: int) -> list[list[int]]:
    """Items whose mean state lies nearest in direction, both sides centred; k items for each vector.

    Only items that were predicted at least as often as the median item: the mean of a few states is mostly noise.
    """
    seen = states.counts_I > 0
    often = seen & (states.counts_I >= np.median(states.counts_I[seen]))
    items = np.flatnonzero(often)
    means = states.means_ID[items] - states.mean_D
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    similarity = (vectors_SD - states.mean_D) @ means.T
    nearest: list[list[int]] = items[np.argsort(-similarity, axis=1, kind="stable")[:, :k]].tolist()
    return nearest
