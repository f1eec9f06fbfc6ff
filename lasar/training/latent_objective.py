"""The objective of Stage 2 as one object: what a batch of branches costs, and what the loop looks like meanwhile."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lasar.decoding.trie import Trie
from lasar.model.reasoner import LatentReasoner
from lasar.prompts.latent_batches import LatentBatch
from lasar.training.latent_losses import Alignment, aligned_steps, depth_loss, latent_pass, per_sample
from lasar.training.latent_probe import probe


@dataclass(frozen=True, kw_only=True)
class LatentObjective:
    """CE(answer) + alpha * mean_t distance(h_t, anchor_t) + beta * CE(depth), per sample (paper section 3.4).

    Attributes:
        reasoner: trained.
        trie: the catalogue.
        fetch: anchor indices [S] to anchors [S, D].
        alignment: the distance.
        alpha: its weight; 0 leaves it out.
        beta: weight of the Policy Head's cross-entropy; 0 where depth is fixed.
    """

    reasoner: LatentReasoner
    trie: Trie
    fetch: Callable[[Tensor], Tensor]
    alignment: Alignment
    alpha: float
    beta: float

    def __call__(self, _: nn.Module, batch: LatentBatch) -> Tensor:
        """Summed over the batch's samples; the shape `fit` wants."""
        reasoner = self.reasoner
        done = latent_pass(
            reasoner.backbone, batch, vocabulary=reasoner.vocabulary, trie=self.trie,
            closing=reasoner.settings.closing, **reasoner.loop,
        )  # fmt: skip
        total = done.codes.total
        if self.alpha:
            loss_BPN, has_BPN = aligned_steps(done.latents, batch, self.fetch, kind=self.alignment)
            weights_BP = torch.from_numpy(batch.weights_BP).to(total.device)
            total = total + self.alpha * per_sample(loss_BPN, has_BPN, weights_BP)
        if self.beta and reasoner.policy_head is not None:
            logits_BPN = reasoner.policy_head(done.latents.hidden_BPND[:, :, 0])
            total = total + self.beta * depth_loss(logits_BPN, batch)
        return total

    def probe(self, batches: Sequence[LatentBatch]) -> dict[str, float]:
        """See `lasar.training.latent_probe.probe`; names prefixed by `probe_`."""
        found = probe(self.reasoner, batches, trie=self.trie, fetch=self.fetch, alignment=self.alignment)
        return {f"probe_{name}": value for name, value in found.items()}
