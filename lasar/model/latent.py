"""The latent loop: reasoning in hidden states instead of words (paper section 3.2).

A sequence that reasons continues `<s>`, N latent slots, `<e>`, answer. `h_0` is the hidden state at `<s>`; slot t
receives `h_{t-1}` as its input embedding and yields `h_t`. N differs per branch: every branch takes all steps of the
deepest, and `<e>` simply hangs off the slot its own N names, so what a shallow branch computed beyond N is seen by
nothing. No branching on N, full gradient through the chain.

Legend: B batch, P branches per row, N latent steps (N_max the deepest), D hidden, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lasar.model.backbone import input_scale, input_table
from lasar.model.head import part_logits
from lasar.model.prompt import Prefix
from lasar.prompts.vocabulary import Vocabulary

Feedback = Literal["raw", "norm_matched", "soft_token"]
Closing = Literal["marker", "opening"]


@dataclass(frozen=True, kw_only=True)
class Latents:
    """What the loop computed.

    Attributes:
        hidden_BPND: h_0 ... h_{N_max}, [B, P, N_max + 1, D].
        index_BPN: cache index of `<s>` and of every slot, [B, P, N_max + 1].
        norm_ratio: mean norm of the fed-back vectors over the mean norm of token embeddings, scalar; 0 without
            steps.
    """

    hidden_BPND: Tensor
    index_BPN: Tensor
    norm_ratio: Tensor

    def tips_BP(self, depths_BP: Tensor) -> Tensor:
        """Cache index of the last slot of each branch at its own depth: the parent of its `<e>`."""
        return self.index_BPN.gather(2, depths_BP[..., None])[..., 0]


def start_reasoning(prefix: Prefix, parents_BP: Tensor, *, vocabulary: Vocabulary) -> tuple[Tensor, Tensor]:
    """Append `<s>` to every branch.

    Args:
        prefix: the prompts.
        parents_BP: the token each branch continues from.
        vocabulary: names `<s>`.

    Returns:
        h_0 [B, P, D], and the cache index of `<s>` [B, P].
    """
    starts_BP = torch.full_like(parents_BP, vocabulary.latent_start)
    hidden_BPD, nodes = prefix.grow(parents_BP, input_ids=starts_BP)
    return hidden_BPD, nodes.index_BQ


def reason(
    prefix: Prefix,
    h0_BPD: Tensor,
    start_BP: Tensor,
    *,
    num_steps: int,
    feedback: Feedback = "raw",
    step_vectors_ND: Tensor | None = None,
    widths: Sequence[int] | None = None,
) -> Latents:
    """Run the loop for `num_steps` steps, all branches of all rows in one forward call per step.

    Args:
        prefix: the sequences, `<s>` appended.
        h0_BPD: hidden states at `<s>`.
        start_BP: cache index of `<s>`.
        num_steps: steps of the deepest branch; 0 runs none.
        feedback: what slot t receives: `h_{t-1}` itself (Coconut), scaled to the mean norm of token embeddings, or
            the expected token embedding under the model's next-token distribution.
        step_vectors_ND: added to what slot 1, 2, ... receives, so that the model can tell steps apart (the reasoning
            position embeddings of ReaRec); none by default, as in the paper.
        widths: how many columns still run at each step, where branches lie deepest first; all by default. States and
            indices of a column that has stopped repeat its last ones.
    """
    states, indices = [h0_BPD], [start_BP]
    embedding_norm = input_table(prefix.model).detach().norm(dim=-1).mean() * input_scale(prefix.model)
    ratios = []
    for step in range(num_steps):
        width = h0_BPD.shape[1] if widths is None else widths[step]
        fed_BPD = fed_back(prefix.model, states[-1][:, :width], embedding_norm, feedback)
        if step_vectors_ND is not None:
            fed_BPD = fed_BPD + step_vectors_ND[step].to(fed_BPD.dtype)
        ratios.append(fed_BPD.detach().norm(dim=-1).mean() / embedding_norm)
        hidden_BPD, nodes = prefix.grow(indices[-1][:, :width], inputs_embeds=fed_BPD)
        states.append(torch.cat([hidden_BPD, states[-1][:, width:]], dim=1))
        indices.append(torch.cat([nodes.index_BQ, indices[-1][:, width:]], dim=1))
    return Latents(
        hidden_BPND=torch.stack(states, dim=2),
        index_BPN=torch.stack(indices, dim=2),
        norm_ratio=torch.stack(ratios).mean() if ratios else embedding_norm.new_zeros(()),
    )


def finish_reasoning(
    prefix: Prefix, tips_BP: Tensor, *, vocabulary: Vocabulary, closing: Closing = "marker"
) -> tuple[Tensor, Tensor]:
    """Append to every branch what closes its reasoning, `<e>` or its prompt's last token; see `start_reasoning`."""
    ends_BP = closing_ids(prefix.opening_B1, vocabulary=vocabulary, closing=closing).expand_as(tips_BP)
    hidden_BPD, nodes = prefix.grow(tips_BP, input_ids=ends_BP)
    return hidden_BPD, nodes.index_BQ


def closing_ids(opening: Tensor, *, vocabulary: Vocabulary, closing: Closing) -> Tensor:
    """The tokens that close reasoning: `<e>`, or once more those that it left from.

    Args:
        opening: ids of the tokens that an answer without reasoning hangs off, any shape.
        vocabulary: names `<e>`.
        closing: which.
    """
    return opening if closing == "opening" else torch.full_like(opening, vocabulary.latent_end)


class PolicyHead(nn.Module):
    """Chooses how deep to reason: softmax(W2 tanh(W1 h_0 + b1) + b2) over depths 1 ... N_max (paper section 3.3)."""

    def __init__(self, hidden_size: int, *, max_depth: int = 8, width: int = 256) -> None:
        """Build with fresh weights."""
        super().__init__()
        self.max_depth = max_depth
        self.inner = nn.Linear(hidden_size, width)
        self.outer = nn.Linear(width, max_depth)

    def forward(self, h0_BPD: Tensor) -> Tensor:
        """Logits over depths, [B, P, N_max]; entry n is depth n + 1."""
        logits: Tensor = self.outer(torch.tanh(self.inner(h0_BPD)))
        return logits


def fed_back(model: nn.Module, hidden_BPD: Tensor, embedding_norm: Tensor, feedback: Feedback) -> Tensor:
    """What a slot receives for the hidden states before it; see `reason`."""
    if feedback == "raw":
        return hidden_BPD
    if feedback == "norm_matched":
        scale_BP1: Tensor = embedding_norm / hidden_BPD.norm(dim=-1, keepdim=True)
        return hidden_BPD * scale_BP1
    probabilities_BPV = part_logits(model, hidden_BPD, 0, len(input_table(model))).float().softmax(-1)
    return probabilities_BPV.to(hidden_BPD.dtype) @ input_table(model) * input_scale(model)
