"""Logits over a part of the vocabulary, as the model's own forward pass gives them for all of it.

After the matrix of its head a model may add a bias (Phi, GPT-J), scale (Granite, Cohere) or cap (Gemma 2). Models that
do something else are refused by `check_tree_attention`.
"""

from typing import Any

from torch import Tensor, nn

from lasar.model.backbone import head_bias, output_table


def part_logits(model: nn.Module, hidden_XD: Tensor, start: int, stop: int) -> Tensor:
    """Logits of tokens `start:stop`, `[..., stop - start]`.

    Args:
        model: a causal LM.
        hidden_XD: its states after the final norm, `[..., D]`.
        start: first token.
        stop: the token after the last.
    """
    return as_logits(model, hidden_XD @ output_table(model)[start:stop].T, slice(start, stop))


def as_logits(model: nn.Module, products_XV: Tensor, tokens: slice | Tensor) -> Tensor:
    """Logits from the products of hidden states and rows of the head.

    Args:
        model: a causal LM.
        products_XV: any shape.
        tokens: which token's row each product is with; broadcasts against the products.
    """
    bias_V = head_bias(model)
    if bias_V is not None:
        products_XV = products_XV + bias_V[tokens].to(products_XV.dtype)
    config: Any = model.config
    scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
    if scale != 1:
        products_XV = products_XV * scale
    cap = getattr(config, "final_logit_softcapping", None)
    return products_XV if cap is None else cap * (products_XV / cap).tanh()
