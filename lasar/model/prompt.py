"""Prompts computed once, and whatever grows from them.

A `Prefix` is a batch of token sequences whose keys and values lie in one cache: first the prompts, then, if the model
reasons, latent steps, then beams or rollouts. Growing it never copies, repeats or reorders what is there.

Legend: B batch, T prompt tokens, Q new tokens, D hidden.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from lasar.model.attention import causal_mask, growth_mask, tree_mask
from lasar.model.backbone import trunk
from lasar.model.tree import Nodes, Tree


@dataclass
class Prefix:
    """Sequences that can be continued.

    Attributes:
        model: the causal LM.
        tree: which token follows which.
        cache: keys and values of every token of the tree.
        tip_B1: index of the token that each sequence continues from.
        hidden_B1D: hidden state after the final norm at the tip; it predicts what comes next.
        opening_B1: the token each prompt ends with, before any `<s>`: what an answer without reasoning hangs off.
    """

    model: nn.Module
    tree: Tree
    cache: DynamicCache
    tip_B1: Tensor
    hidden_B1D: Tensor
    opening_B1: Tensor

    def grow(
        self, parents_BQ: Tensor, *, needed_BQ: Tensor | None = None, final: bool = False, **tokens: Tensor
    ) -> tuple[Tensor, Nodes]:
        """Append tokens in one forward call.

        Args:
            parents_BQ: the token each new one follows; see `Tree.grow`.
            needed_BQ: tokens whose hidden states (and those of what follows them) mean anything, all by default; a
                hint that saves nothing here.
            final: nothing will follow them; another hint.
            tokens: `input_ids` [B, Q], or `inputs_embeds` [B, Q, D] to feed hidden states back.

        Returns:
            Hidden states [B, Q, D] after the final norm, and the nodes.
        """
        nodes = self.tree.grow(parents_BQ)
        hidden_BQD = _forward(
            self.model,
            attention_mask=growth_mask(self.model, nodes),
            position_ids=nodes.position_BQ,
            past_key_values=self.cache,
            use_cache=True,
            **tokens,
        )
        return hidden_BQD, nodes


def encode_prompts(model: nn.Module, ids_BT: Tensor, lengths_B: Tensor) -> Prefix:
    """Compute prompts.

    Args:
        model: a Hugging Face causal LM that accepts 4-D masks and position ids.
        ids_BT: tokens, padded on the right; a causal model never looks at the padding.
        lengths_B: tokens of each prompt, at least 1.
    """
    cache = _empty_cache()
    hidden_BTD = _forward(
        model,
        input_ids=ids_BT,
        attention_mask=causal_mask(model, ids_BT),
        past_key_values=cache,
        use_cache=True,
    )
    tree = Tree(lengths_B, ids_BT.shape[1])
    rows_B = torch.arange(len(lengths_B), device=ids_BT.device)
    return Prefix(
        model=model,
        tree=tree,
        cache=cache,
        tip_B1=tree.trunk_ends_B1,
        hidden_B1D=hidden_BTD[rows_B, lengths_B - 1][:, None],
        opening_B1=ids_BT[rows_B, lengths_B - 1][:, None],
    )


def encode_branched(
    model: nn.Module, ids_BT: Tensor, lengths_B: Tensor, *, parents_BQ: Tensor, branch_ids_BQ: Tensor
) -> tuple[Prefix, Tensor, Tensor, Nodes]:
    """Compute prompts and a first generation of branches off them in one forward call.

    Args:
        model: as in `encode_prompts`.
        ids_BT: prompts, padded on the right.
        lengths_B: tokens of each prompt, at least 1.
        parents_BQ: the token each branch token follows; see `Tree.grow`.
        branch_ids_BQ: the branch tokens.

    Returns:
        The prefix (its tip is the end of each prompt), hidden states of the prompts [B, T, D] and of the branch
        tokens [B, Q, D], and the branch nodes.
    """
    cache = _empty_cache()
    batch, width = ids_BT.shape
    tree = Tree(lengths_B, width)
    nodes = tree.grow(parents_BQ)
    positions_T = torch.arange(width, device=ids_BT.device).expand(batch, -1)
    hidden_BKD = _forward(
        model,
        input_ids=torch.cat([ids_BT, branch_ids_BQ], dim=1),
        attention_mask=tree_mask(model, nodes),
        position_ids=torch.cat([positions_T, nodes.position_BQ], dim=1),
        past_key_values=cache,
        use_cache=True,
    )
    rows_B = torch.arange(batch, device=ids_BT.device)
    prefix = Prefix(
        model=model, tree=tree, cache=cache, tip_B1=tree.trunk_ends_B1,
        hidden_B1D=hidden_BKD[rows_B, lengths_B - 1][:, None],
        opening_B1=ids_BT[rows_B, lengths_B - 1][:, None],
    )  # fmt: skip
    return prefix, hidden_BKD[:, :width], hidden_BKD[:, width:], nodes


def _empty_cache() -> DynamicCache:
    # Not made for the model's config: with sliding windows that gives a cache which forgets, and a tree has more keys
    # than any of its paths is long.
    return DynamicCache()


def _forward(model: nn.Module, **arguments: Any) -> Tensor:
    hidden = trunk(model)(**arguments).last_hidden_state
    assert isinstance(hidden, Tensor)
    return hidden
