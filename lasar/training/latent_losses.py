"""Losses of Stage 2: answers after latent reasoning, steps aligned to anchors, depth (paper sections 3.2 to 3.4).

Every branch is one sample of the paper for each of its answers: samples of one branch share prompt, latents and depth,
so what they share is computed once and counted as often as there are answers.

Legend: B batch, T trunk tokens, P branches per row, N latent steps, A answers per row, L levels, D hidden, S steps.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from lasar.decoding.trie import Trie
from lasar.model.latent import Closing, Feedback, Latents, closing_ids, reason
from lasar.model.prompt import Prefix, encode_branched
from lasar.model.tree import chains
from lasar.prompts.latent_batches import LatentBatch
from lasar.prompts.vocabulary import Vocabulary
from lasar.training.losses import CodeLoss, code_loss

Alignment = Literal["kl", "mse", "cosine", "none"]


@dataclass(frozen=True, kw_only=True)
class LatentPass:
    """One forward pass over a batch of branches.

    Attributes:
        codes: cross-entropy of the answers.
        latents: hidden states of the loop.
    """

    codes: CodeLoss
    latents: Latents


def latent_pass(
    model: nn.Module,
    batch: LatentBatch,
    *,
    vocabulary: Vocabulary,
    trie: Trie,
    feedback: Feedback,
    step_vectors_ND: Tensor | None = None,
    closing: Closing = "marker",
) -> LatentPass:
    """Encode the trunks, run the loop on every branch, score every answer: 2 + N forward calls.

    A branch of depth 0 takes no part in the loop: its answers hang off the opening itself, as in Stage 1.

    Args:
        model: a causal LM.
        batch: trunks, branches and answers.
        vocabulary: token ids.
        trie: the catalogue, on the model's device.
        feedback: see `lasar.model.latent.reason`.
        step_vectors_ND: likewise.
        closing: see `lasar.model.latent.closing_ids`.
    """
    device = trie.item_of_leaf.device
    ids_BT, lengths_B, openings_BP, depths_BP = (
        torch.from_numpy(array).to(device)
        for array in (batch.ids_BT, batch.lengths_B, batch.openings_BP, batch.answer_depths_BP)
    )
    starts_BP = torch.full_like(openings_BP, vocabulary.latent_start)
    prefix, trunk_BTD, h0_BPD, nodes = encode_branched(
        model, ids_BT, lengths_B, parents_BQ=openings_BP, branch_ids_BQ=starts_BP
    )
    widths = batch.widths
    latents = reason(
        prefix, h0_BPD, nodes.index_BQ, num_steps=len(widths), feedback=feedback,
        step_vectors_ND=step_vectors_ND, widths=widths,
    )  # fmt: skip
    plain_BP = depths_BP == 0
    opening_BPD = trunk_BTD.gather(1, openings_BP[..., None].expand(-1, -1, trunk_BTD.shape[2]))
    tips_BP = torch.where(plain_BP, -1, latents.tips_BP(depths_BP))
    ends_BP = closing_ids(ids_BT.gather(1, openings_BP), vocabulary=vocabulary, closing=closing)
    codes = _answer_loss(
        prefix, openings_BP, opening_BPD, tips_BP, ends_BP, batch, vocabulary=vocabulary, trie=trie
    )
    return LatentPass(codes=codes, latents=latents)


def alignment_loss(hidden_SD: Tensor, anchors_SD: Tensor, *, kind: Alignment) -> Tensor:
    """Distance of hidden states to their anchors, one value per step [S], in fp32.

    Args:
        hidden_SD: hidden states after the final norm.
        anchors_SD: their anchors.
        kind: `kl`: (KL(softmax a || softmax b) + KL(softmax b || softmax a)) / 2 over the hidden dimensions; `mse`:
            mean squared difference; `cosine`: 1 - cosine; `none`: zero.
    """
    hidden_SD, anchors_SD = hidden_SD.float(), anchors_SD.float()
    if kind == "kl":
        p_SD, q_SD = hidden_SD.log_softmax(-1), anchors_SD.log_softmax(-1)
        return ((p_SD.exp() - q_SD.exp()) * (p_SD - q_SD)).sum(-1) / 2
    if kind == "mse":
        return (hidden_SD - anchors_SD).square().mean(-1)
    if kind == "cosine":
        return 1 - functional.cosine_similarity(hidden_SD, anchors_SD, dim=-1)
    return hidden_SD.new_zeros(len(hidden_SD))


def aligned_steps(
    latents: Latents, batch: LatentBatch, fetch: Callable[[Tensor], Tensor], *, kind: Alignment
) -> tuple[Tensor, Tensor]:
    """Alignment of every step that has an anchor.

    Args:
        latents: of `latent_pass`.
        batch: names the anchors.
        fetch: anchor indices [S] to anchors [S, D], on the model's device.
        kind: see `alignment_loss`.

    Returns:
        Loss per step [B, P, N] (0 where there is no anchor), and which steps have one [B, P, N].
    """
    device = latents.hidden_BPND.device
    taken = latents.hidden_BPND.shape[2] - 1
    anchors_BPN = torch.from_numpy(batch.anchors_BPN)[:, :, :taken].long()
    has_BPN = (anchors_BPN >= 0).to(device)
    loss_BPN = torch.zeros(has_BPN.shape, device=device)
    if kind == "none" or not bool(has_BPN.any()):
        return loss_BPN, has_BPN
    hidden_SD = latents.hidden_BPND[:, :, 1:][has_BPN]
    anchors_SD = fetch(anchors_BPN[anchors_BPN >= 0]).to(device)
    loss_BPN[has_BPN] = alignment_loss(hidden_SD, anchors_SD, kind=kind)
    return loss_BPN, has_BPN


def per_sample(loss_BPN: Tensor, has_BPN: Tensor, weights_BP: Tensor) -> Tensor:
    """Sum over samples of the mean over their steps (paper: alpha * 1/N sum_t KL_bi)."""
    steps_BP = has_BPN.sum(-1).clamp(min=1)
    return (loss_BPN.sum(-1) / steps_BP * weights_BP).sum()


def depth_loss(logits_BPN: Tensor, batch: LatentBatch) -> Tensor:
    """Cross-entropy of the Policy Head against the depth of the rationale, summed over samples with one.

    Args:
        logits_BPN: of the Policy Head at h_0; entry n is depth n + 1.
        batch: depths and which are supervised.
    """
    device = logits_BPN.device
    depths_BP, weights_BP = (
        torch.from_numpy(array).to(device) for array in (batch.depths_BP, batch.weights_BP)
    )
    supervised_BP = torch.from_numpy(batch.supervised_BP).to(device) & (depths_BP > 0)
    nll_BP = functional.cross_entropy(
        logits_BPN.float().flatten(0, 1), (depths_BP.flatten() - 1).clamp(min=0), reduction="none"
    ).view_as(depths_BP)
    return (nll_BP * weights_BP * supervised_BP).sum()


def _answer_loss(
    prefix: Prefix,
    openings_BP: Tensor,
    opening_BPD: Tensor,
    tips_BP: Tensor,
    ends_BP: Tensor,
    batch: LatentBatch,
    *,
    vocabulary: Vocabulary,
    trie: Trie,
) -> CodeLoss:
    """Cross-entropy of the codes of all answers; `<e>` of every branch and all codes are one forward call.

    `tips_BP` is the last slot of each branch, -1 for a branch that doesn't reason; `ends_BP` are tokens that close it.
    """
    device = tips_BP.device
    branch_BA, answers_BAL, items_BA = (
        torch.from_numpy(array).to(device) for array in (batch.branch_BA, batch.answers_BAL, batch.items_BA)
    )
    rows, answers, levels = answers_BAL.shape
    branches, first = tips_BP.shape[1], prefix.tree.num_keys
    plain_BP = tips_BP < 0
    # Tokens of this call: <e> of branch p is token p; then the codes of every answer but the last, a chain each.
    end_BP = (first + torch.arange(branches, device=device)).expand(rows, -1)
    parents_BQ = torch.where(plain_BP, openings_BP, tips_BP)
    if levels > 1:
        after_BA = torch.where(plain_BP, openings_BP, end_BP).gather(1, branch_BA)
        codes_BQ = chains(after_BA, length=levels - 1, first=first + branches)
        parents_BQ = torch.cat([parents_BQ, codes_BQ], dim=1)
    hidden_BQD, _ = prefix.grow(
        parents_BQ, input_ids=torch.cat([ends_BP, answers_BAL[..., :-1].flatten(1)], dim=1)
    )
    width = hidden_BQD.shape[2]
    first_BPD = torch.where(plain_BP[..., None], opening_BPD, hidden_BQD[:, :branches])
    first_BAD = first_BPD.gather(1, branch_BA[..., None].expand(-1, -1, width))
    later_BALD = hidden_BQD[:, branches:].view(rows, answers, levels - 1, width)
    hidden_BALD = torch.cat([first_BAD[:, :, None], later_BALD], dim=2)
    real_BA = items_BA >= 0
    return code_loss(
        prefix.model,
        hidden_BALD[real_BA].flatten(0, 1),
        answers_BAL[real_BA].flatten(),
        items_BA[real_BA].repeat_interleave(levels),
        vocabulary=vocabulary,
        trie=trie,
    )
