"""The backbone as a reader: hidden states of the frozen Stage-1 model at chosen tokens (paper section 3).

A segment's anchor is the state at its last token, behind the segment alone or behind history and rationale so far.
A `Source` says how anchors are computed batch by batch; `projection.py` has the other one.

Legend: B batch, T tokens, D hidden, A anchors, S segments.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from lasar.cot.rows import TrainingRow
from lasar.cot.segmentation import Segmentation
from lasar.errors import ConfigError, DataError
from lasar.model.backbone import trunk
from lasar.prompts.batches import bucket_by_length
from lasar.prompts.vocabulary import Vocabulary, pad_right

Int32Array = NDArray[np.int32]
Int64Array = NDArray[np.int64]
Float32Array = NDArray[np.float32]


@torch.no_grad()
def states_at(
    model: nn.Module, rows: Sequence[Int32Array], ends: Sequence[Int64Array], *, pad: int
) -> Float32Array:
    """Hidden states after the final norm at chosen tokens, all rows in one forward pass.

    Args:
        model: a causal LM in evaluation mode.
        rows: token ids of each row.
        ends: the positions wanted of each row.
        pad: padding token; it comes last, where a causal model never looks.

    Returns:
        float32 [sum of wanted positions, D], row after row.
    """
    ids_BT, _ = pad_right(rows, pad)
    device = next(model.parameters()).device
    states_BTD = trunk(model)(input_ids=torch.from_numpy(ids_BT).to(device)).last_hidden_state
    row_S = np.repeat(np.arange(len(rows)), [len(end) for end in ends])
    chosen = states_BTD[torch.from_numpy(row_S).to(device), torch.from_numpy(np.concatenate(ends)).to(device)]
    return np.asarray(chosen.float().cpu().numpy(), dtype=np.float32)


def text_row(
    prompt: Int32Array, segments: Sequence[str], encode: Callable[[str], list[int]]
) -> tuple[Int32Array, Int64Array]:
    """Tokens of a prompt and a text behind it, and the position of each segment's last token.

    Segments are encoded one by one, so that a row up to the end of a segment is the beginning of the whole row.

    Args:
        prompt: what the text follows; `<s>` at least, behind which Stage 1 always puts text.
        segments: the text.
        encode: text to token ids.

    Raises:
        DataError: a segment has no tokens.
    """
    pieces = [np.array(encode(segment), dtype=np.int32) for segment in segments]
    for piece, segment in zip(pieces, segments, strict=True):
        if len(piece) == 0:
            raise DataError(
                f"anchor.source=backbone: {segment[:80]!r} has no tokens; use anchor.source=encoder"
            )
    ends = len(prompt) - 1 + np.cumsum([len(piece) for piece in pieces])
    return np.concatenate([prompt, *pieces]).astype(np.int32), ends.astype(np.int64)


def rows_alone(
    texts: Sequence[str], encode: Callable[[str], list[int]], *, vocabulary: Vocabulary
) -> tuple[list[Int32Array], list[Int64Array]]:
    """Every text by itself as tokens, behind `<s>`; see `text_row`."""
    opened = np.array([vocabulary.latent_start], dtype=np.int32)
    pairs = [text_row(opened, [text], encode) for text in texts]
    return [tokens for tokens, _ in pairs], [ends for _, ends in pairs]


def rows_in_context(
    rows: Sequence[TrainingRow],
    segmentation: Segmentation,
    encode: Callable[[str], list[int]],
    *,
    vocabulary: Vocabulary,
    tokens_IL: Int32Array,
) -> tuple[list[Int32Array], list[Int64Array]]:
    """Every row that has a rationale, as tokens: its history, `<s>`, the rationale.

    Args:
        rows: training rows.
        segmentation: of their rationales.
        encode: text to token ids.
        vocabulary: renders histories.
        tokens_IL: tokens of every item.

    Returns:
        Tokens and the segments' last positions, as `text_row` gives them.
    """
    pairs, stop = [], 0
    for row, count in zip(rows, segmentation.counts_R.tolist(), strict=True):
        start, stop = stop, stop + count
        if count:
            history = vocabulary.render_history(tokens_IL, row.history, row.baskets, open_order=True)
            prompt = np.append(history, np.int32(vocabulary.latent_start))
            pairs.append(text_row(prompt, segmentation.texts_S[start:stop], encode))
    return [tokens for tokens, _ in pairs], [ends for _, ends in pairs]


class Source(NamedTuple):
    """How anchors are computed, in batches.

    Attributes:
        batches: the anchors that each batch gives.
        compute: vectors of batch number n, float32 [len(batches[n]), D].
    """

    batches: list[Int64Array]
    compute: Callable[[int], Float32Array]


def read_by_backbone(
    model: nn.Module,
    rows: Sequence[Int32Array],
    ends: Sequence[Int64Array],
    *,
    pad: int,
    batch_tokens: int,
) -> Source:
    """Source `backbone`: one forward pass a row gives the states at all of its ends.

    Args:
        model: the frozen backbone.
        rows: token ids, as `text_row` gives them.
        ends: positions of the anchors of each row; anchors are numbered row after row.
        pad: padding token.
        batch_tokens: tokens of a batch at most, padding included.

    Raises:
        ConfigError: a row is longer than the backbone can read.
    """
    limit = getattr(model.config, "max_position_embeddings", None)
    longest = max(len(row) for row in rows)
    if isinstance(limit, int) and longest > limit:
        raise ConfigError(
            f"anchor.source=backbone: a row has {longest} tokens, the backbone reads at most {limit}; "
            "set anchor.context=alone, or lower sft.max_history"
        )
    first = np.concatenate([[0], np.cumsum([len(end) for end in ends])])
    groups = bucket_by_length([len(row) for row in rows], batch_tokens, np.random.default_rng(0))

    def compute(number: int) -> Float32Array:
        group = groups[number]
        return states_at(model, [rows[i] for i in group], [ends[i] for i in group], pad=pad)

    batches = [np.concatenate([np.arange(first[i], first[i + 1]) for i in group]) for group in groups]
    return Source(batches, compute)
