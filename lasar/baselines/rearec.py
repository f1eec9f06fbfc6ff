"""ReaRec: SASRec that reasons in latent steps before it answers (Tang et al. 2025, arXiv 2503.22675).

The hidden state at a position is fed back as the next token, a fixed number of times, each time plus the embedding of
the reasoning step. Two ways to learn it:

- `erl`, ensemble: the answer is the mean over all states; a KL term keeps the steps' distributions apart.
- `prl`, progressive: the answer is the last state; earlier states predict the target too, at temperatures that fall
  from step to step, and a contrastive term pulls each step towards its noisy twin.

The paper reasons at the end of one history per sample. Here every position of a history reasons: step k of all
positions is one call in which a token sees its own history and its own earlier steps and nothing else, so that, as for
SASRec, one pass trains every prefix.

Legend: B rows, T positions, D hidden, K keys, S states (steps + 1), P predictions, I items.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from lasar.baselines.ranking import Items, Ranked, rank_scores
from lasar.baselines.sasrec import SasRec
from lasar.baselines.sequences import Histories, TargetBatch
from lasar.baselines.softmax import item_loss, item_scores


class ReaRec(nn.Module):
    """SASRec's encoder, embeddings of the reasoning steps, and two ways to learn them."""

    whole_histories = True
    queries_per_batch = 256

    def __init__(
        self,
        *,
        num_items: int,
        max_history: int,
        hidden_size: int,
        num_layers: int,
        num_heads: int,
        dropout: float,
        temperature: float,
        learning: Literal["erl", "prl"],
        num_steps: int,
        diversity_weight: float,
        temperature_scale: float,
        contrastive_weight: float,
        noise: float,
    ) -> None:
        """Build with random weights.

        Args:
            num_items: see `SasRec`, as up to `dropout`.
            max_history: items seen.
            hidden_size: of the encoder.
            num_layers: blocks.
            num_heads: attention heads.
            dropout: of the encoder.
            temperature: of the answer's logits.
            learning: ensemble or progressive.
            num_steps: latent steps after every position.
            diversity_weight: of the KL term (erl).
            temperature_scale: the logits of a state `n` steps before the last have `scale ** n` times the
                temperature (prl).
            contrastive_weight: of the contrastive term (prl).
            noise: standard deviation of what is added to the noisy twins' tokens (prl).
        """
        super().__init__()
        self.num_items, self.max_history = num_items, max_history
        self.encoder = SasRec(
            num_items=num_items, max_history=max_history, hidden_size=hidden_size, num_layers=num_layers,
            num_heads=num_heads, dropout=dropout, temperature=temperature,
        )  # fmt: skip
        self.steps = nn.Embedding(num_steps, hidden_size)
        nn.init.normal_(self.steps.weight, std=0.02)
        self.learning, self.temperature = learning, temperature
        self.diversity_weight, self.temperature_scale = diversity_weight, temperature_scale
        self.contrastive_weight, self.noise = contrastive_weight, noise

    def reason(self, items_BT: Tensor, *, noise: float = 0.0) -> tuple[Tensor, Tensor | None]:
        """States before and after every step, [B, T, S, D], and with `noise` the twins' [B, T, S - 1, D]."""
        hidden_BTD, past = self.encoder.encode(items_BT)
        states, twins, twin_past = [hidden_BTD], [], past
        own_TT = torch.eye(items_BT.shape[1], dtype=torch.bool, device=items_BT.device)
        mask_TK = torch.ones_like(own_TT).tril()
        for step_D in self.steps.weight:
            mask_TK = torch.cat([mask_TK, own_TT], dim=1)
            token_BTD = states[-1] + step_D
            if noise > 0:
                # As the authors do: a twin starts each step from the clean state, but remembers noisy steps.
                noisy_BTD = token_BTD + noise * torch.randn_like(token_BTD)
                twin_BTD, twin_past = self.encoder.extend(noisy_BTD, twin_past, mask_TK)
                twins.append(twin_BTD)
            hidden_BTD, past = self.encoder.extend(token_BTD, past, mask_TK)
            states.append(hidden_BTD)
        return torch.stack(states, dim=2), torch.stack(twins, dim=2) if twins else None

    def forward(self, batch: TargetBatch) -> Tensor:
        """The loss summed over the batch's predictions."""
        chosen_BT = batch.targets_BT >= 0
        targets_P = batch.targets_BT[chosen_BT]
        progressive = self.learning == "prl"
        noise = self.noise if progressive and self.contrastive_weight > 0 else 0.0
        states_BTSD, twins_BTSD = self.reason(batch.histories.items_BT, noise=noise)
        states_PSD = states_BTSD[chosen_BT]
        loss = self._answer_loss(self.answer(states_PSD), targets_P, self.temperature)
        if not progressive:
            return loss - self.diversity_weight * self._diversity(states_PSD)
        earlier = states_PSD.unbind(1)[:-1]
        for before, state_PD in enumerate(reversed(earlier), start=1):
            warmer = self.temperature * self.temperature_scale**before
            loss = loss + self._answer_loss(state_PD, targets_P, warmer) / len(earlier)
        if twins_BTSD is not None:
            last_B = chosen_BT.long().cumsum(1).argmax(1)
            row_B = torch.arange(len(last_B), device=last_B.device)
            apart = self._contrast(states_BTSD[row_B, last_B][:, 1:], twins_BTSD[row_B, last_B])
            loss = loss + self.contrastive_weight * len(targets_P) * apart
        return loss

    def answer(self, states_PSD: Tensor) -> Tensor:
        """The vector that answers, [P, D]: the mean of the states, or the last one."""
        return states_PSD.mean(1) if self.learning == "erl" else states_PSD[:, -1]

    @torch.no_grad()
    def rank(self, histories: Histories, k: int, *, excluded: Sequence[Items] | None) -> Ranked:
        """Rank the catalogue for each history; see `rank_scores`."""
        states_BTSD, _ = self.reason(histories.items_BT)
        answer_BD = self.answer(histories.last(states_BTSD))
        scores_BI = item_scores(answer_BD, self.encoder.items.weight, temperature=self.temperature)
        return rank_scores(scores_BI, k, excluded=excluded)

    def _answer_loss(self, hidden_PD: Tensor, targets_P: Tensor, temperature: float) -> Tensor:
        return item_loss(hidden_PD, self.encoder.items.weight, targets_P, temperature=temperature)

    def _diversity(self, states_PSD: Tensor) -> Tensor:
        """Mean over pairs of different steps of KL(step || other, held fixed), summed over predictions."""
        logits_PSI = item_scores(states_PSD, self.encoder.items.weight, temperature=self.temperature).float()
        logprobs_PSI = logits_PSI.log_softmax(-1)
        probs_PSI = logprobs_PSI.exp()
        negative_entropy_PS = (probs_PSI * logprobs_PSI).sum(-1)
        cross_PSS = torch.einsum("psi,pri->psr", probs_PSI, logprobs_PSI.detach())
        divergence_PSS = negative_entropy_PS[..., None] - cross_PSS
        steps = divergence_PSS.shape[1]
        different_SS = ~torch.eye(steps, dtype=torch.bool, device=divergence_PSS.device)
        return divergence_PSS[:, different_SS].sum() / (steps * (steps - 1))

    def _contrast(self, clean_BSD: Tensor, twins_BSD: Tensor) -> Tensor:
        """Mean cross-entropy of telling a step's own clean state from those of other rows."""
        similar_SBB = torch.einsum("bsd,csd->sbc", twins_BSD, clean_BSD).float() / self.temperature
        own_B = torch.arange(len(clean_BSD), device=clean_BSD.device)
        return functional.cross_entropy(similar_SBB.flatten(0, 1), own_B.repeat(len(similar_SBB)))
