"""Log-probabilities of all rollouts of all prompts: prompt and latents once, every answer in one tree-attention call.

Legend: B batch, G rollouts of a prompt, L levels, D hidden, C first codes that exist.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lasar.decoding.trie import Trie
from lasar.model.head import part_logits
from lasar.model.latent import closing_ids, reason, start_reasoning
from lasar.model.prompt import Prefix, encode_prompts
from lasar.model.reasoner import LatentReasoner
from lasar.model.tree import chains
from lasar.prompts.vocabulary import Vocabulary
from lasar.training.losses import code_nll


@dataclass(frozen=True, kw_only=True)
class Scored:
    """What a policy thinks of rollouts, differentiable.

    Attributes:
        logprobs_BGL: log-probability of every code given the codes before it; 0 where there is no item.
        opening_BD: hidden state that predicts the first code.
        h0_BD: hidden state at `<s>`, None at depth 0.
        last_BD: h_N at each prompt's own depth, None at depth 0.
    """

    logprobs_BGL: Tensor
    opening_BD: Tensor
    h0_BD: Tensor | None
    last_BD: Tensor | None


def score(
    reasoner: LatentReasoner,
    ids_BT: Tensor,
    lengths_B: Tensor,
    *,
    depths_B: Tensor,
    items_BG: Tensor,
    tokens_IL: Tensor,
    trie: Trie,
) -> Scored:
    """Score groups at given depths.

    Args:
        reasoner: the policy or the reference.
        ids_BT: prompts, padded on the right.
        lengths_B: tokens of each.
        depths_B: latent steps of each; 0 for all, where the model never reasons.
        items_BG: the rollouts, -1 where there is none.
        tokens_IL: tokens of every item.
        trie: the catalogue.
    """
    vocabulary = reasoner.vocabulary
    prefix = encode_prompts(reasoner.backbone, ids_BT, lengths_B)
    answers_BGL = tokens_IL[items_BG.clamp(min=0)]
    deepest = int(depths_B.max())
    if deepest == 0:
        hidden_BGLD = _hang_answers(prefix, prefix.tip_B1, answers_BGL, end_B1=None)
        h0_BD = last_BD = None
    else:
        h0_B1D, start_B1 = start_reasoning(prefix, prefix.tip_B1, vocabulary=vocabulary)
        latents = reason(prefix, h0_B1D, start_B1, num_steps=deepest, **reasoner.loop)
        tips_B1 = latents.tips_BP(depths_B[:, None])
        end_B1 = closing_ids(prefix.opening_B1, vocabulary=vocabulary, closing=reasoner.settings.closing)
        hidden_BGLD = _hang_answers(prefix, tips_B1, answers_BGL, end_B1=end_B1)
        h0_BD = h0_B1D[:, 0]
        last_BD = latents.hidden_BPND[torch.arange(len(depths_B), device=depths_B.device), 0, depths_B]
    real_BG = items_BG >= 0
    logprobs_BGL = torch.zeros(answers_BGL.shape, device=hidden_BGLD.device)
    levels = answers_BGL.shape[2]
    logprobs_BGL[real_BG] = -code_nll(
        prefix.model, hidden_BGLD[real_BG].flatten(0, 1), answers_BGL[real_BG].flatten(),
        items_BG[real_BG].repeat_interleave(levels), vocabulary=vocabulary, trie=trie,
    ).view(-1, levels)  # fmt: skip
    return Scored(logprobs_BGL=logprobs_BGL, opening_BD=hidden_BGLD[:, 0, 0], h0_BD=h0_BD, last_BD=last_BD)


def first_code_entropy(model: nn.Module, opening_BD: Tensor, *, vocabulary: Vocabulary, trie: Trie) -> Tensor:
    """Entropy of the first code over the first codes that exist, nats [B]."""
    logits_BV = part_logits(model, opening_BD, vocabulary.level_start(0), vocabulary.level_start(1))
    logits_BC = logits_BV.float()[:, trie.levels[1].code]
    logprobs_BC = logits_BC.log_softmax(-1)
    return -(logprobs_BC.exp() * logprobs_BC).sum(-1)


def _hang_answers(prefix: Prefix, tips_B1: Tensor, answers_BGL: Tensor, *, end_B1: Tensor | None) -> Tensor:
    """Hidden states [B, G, L, D] that predict the codes; `<e>` (if any) and all answers are one forward call."""
    batch, group, levels = answers_BGL.shape
    first = prefix.tree.num_keys
    if end_B1 is None:
        after_B1, opening_B1D, parents, ids = tips_B1, prefix.hidden_B1D, [], []
    else:
        after_B1, parents, ids = torch.full_like(tips_B1, first), [tips_B1], [end_B1]
    if levels > 1:
        after_BG = after_B1.expand(-1, group)
        parents.append(chains(after_BG, length=levels - 1, first=first + len(parents)))
        ids.append(answers_BGL[..., :-1].flatten(1))
    if not parents:
        return opening_B1D[:, :, None].expand(-1, group, 1, -1)
    grown_BQD, _ = prefix.grow(torch.cat(parents, dim=1), input_ids=torch.cat(ids, dim=1))
    if end_B1 is not None:
        opening_B1D, grown_BQD = grown_BQD[:, :1], grown_BQD[:, 1:]
    later_BGLD = grown_BQD.reshape(batch, group, levels - 1, grown_BQD.shape[2])
    return torch.cat([opening_B1D[:, :, None].expand(-1, group, -1, -1), later_BGLD], dim=2)
