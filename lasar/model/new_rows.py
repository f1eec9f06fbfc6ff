"""Where the embeddings of new tokens start: semantic-ID codes and items, in tables that may hold words already.

Legend: I items, L levels, C codebook, E width of item vectors, V vocabulary, D hidden width.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from lasar.model.backbone import INITIAL_STD, input_table, output_table, token_weights
from lasar.prompts.vocabulary import Vocabulary


class Encoder(Protocol):
    """Whatever turns a text into token ids."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""


def place_codes(
    model: nn.Module,
    vocabulary: Vocabulary,
    vectors_LCE: Tensor,
    *,
    vectors_IE: Tensor | None = None,
    among_words: bool = False,
) -> None:
    """Start the embeddings of the codes (and items), input and output, where they lie in a space of vectors.

    Codes that are near each other start near each other. Their mean and spread are those of fresh embeddings, or of
    the words that a pre-trained model knows, so the rest of the model starts as it would anyway.

    Args:
        model: its embedding tables are written.
        vocabulary: where the codes' rows are.
        vectors_LCE: a vector for every code of every level. In the model's own space (E is D, see `title_vectors`) they
            keep their directions, else they are turned at random.
        vectors_IE: a vector for every item with a token of its own.
        among_words: take mean and spread of the first `vocabulary.base_size` rows.
    """
    table_VD = input_table(model)
    words_VD = table_VD[: vocabulary.base_size].detach().double() if among_words else None
    flat = vectors_LCE.flatten(0, 1).double()
    if vectors_IE is not None:
        # Vectors keep their mean, which codes (means of residuals) lack: so items start apart from codes.
        flat = torch.cat([flat, vectors_IE.double()])
    flat = flat - flat.mean(0)
    width = table_VD.shape[1]
    placed = flat if among_words and flat.shape[1] == width else _turned(flat, width)
    placed = placed * (
        (INITIAL_STD if words_VD is None else (words_VD - words_VD.mean(0)).std()) / placed.std()
    )
    if words_VD is not None:
        placed = placed + words_VD.mean(0)
    rows = slice(vocabulary.first_code, vocabulary.size)
    with torch.no_grad():
        for table in (table_VD, output_table(model)):
            table[rows] = placed.to(table)
        if vocabulary.item_answers and output_table(model) is not table_VD:
            for weights in token_weights(model)[1:]:  # answers start as codes alone
                weights[vocabulary.first_item : vocabulary.size] = 0.0


def title_vectors(model: nn.Module, tokenizer: Encoder, titles: Sequence[str]) -> Tensor:
    """The mean embedding of the tokens of every title, [I, D]; that of all tokens where a title has none."""
    table_VD = input_table(model).detach()
    usual_D = table_VD.mean(0)
    rows = [tokenizer.encode(title) for title in titles]
    return torch.stack([table_VD[row].mean(0) if row else usual_D for row in rows])


@contextmanager
def only_new_rows(model: nn.Module, vocabulary: Vocabulary) -> Iterator[None]:
    """Within this, only embeddings of LASAR's own tokens are trained; weight decay, if any, still moves the others.

    Args:
        model: a pre-trained one; what it trains afterwards is what it trained before.
        vocabulary: where the new rows begin.
    """
    trained = {parameter: parameter.requires_grad for parameter in model.parameters()}
    tables = token_weights(model)
    for parameter in trained:
        parameter.requires_grad_(any(parameter is table for table in tables))

    def only_new(gradient: Tensor) -> Tensor:
        return torch.cat(
            [torch.zeros_like(gradient[: vocabulary.base_size]), gradient[vocabulary.base_size :]]
        )

    hooks = [table.register_hook(only_new) for table in tables]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, before in trained.items():
            parameter.requires_grad_(before)


def num_new_weights(model: nn.Module, vocabulary: Vocabulary) -> int:
    """How many weights those embeddings have."""
    return sum(weights[vocabulary.base_size :].numel() for weights in token_weights(model))


def _turned(flat: Tensor, width: int) -> Tensor:
    # The leading principal directions keep distances best; a random rotation spreads them over the channels.
    _, _, directions = torch.linalg.svd(flat, full_matrices=False)
    placed = flat @ directions[:width].T
    placed = torch.cat([placed, placed.new_zeros(len(placed), width - placed.shape[1])], dim=1)
    generator = torch.Generator().manual_seed(0)
    rotation: Tensor = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64, generator=generator))[0]
    return placed @ rotation
