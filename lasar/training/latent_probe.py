"""What the latent loop is doing while it is trained, measured on a fixed sample of training rows.

Anchors exist for training rows only, so drift can be seen nowhere else; the model is in evaluation mode.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from lasar.decoding.trie import Trie
from lasar.model.reasoner import LatentReasoner
from lasar.prompts.latent_batches import LatentBatch
from lasar.training.latent_losses import Alignment, aligned_steps, latent_pass, per_sample


@torch.no_grad()
def probe(
    reasoner: LatentReasoner,
    batches: Sequence[LatentBatch],
    *,
    trie: Trie,
    fetch: Callable[[Tensor], Tensor],
    alignment: Alignment,
) -> dict[str, float]:
    """Losses and geometry of the loop, means over samples (branch times answer) or over steps.

    Args:
        reasoner: in evaluation mode.
        batches: a fixed sample.
        trie: the catalogue.
        fetch: anchor indices to anchors.
        alignment: the distance that is trained; `none` still measures `kl`.

    Returns:
        `ce`: cross-entropy of an answer, all codes, nats. `alignment`: mean over samples of the mean over steps.
        `alignment_1` ...: mean distance of h_t to its anchor. `step_1` ...: mean relative change of h_t against
        h_{t-1}. `depth_accuracy`: how often the Policy Head's choice is the rationale's depth, where it chooses.
        `norm_ratio`: of what is fed back against token embeddings.
    """
    kind: Alignment = "kl" if alignment == "none" else alignment
    totals = _Means()
    for batch in batches:
        done = latent_pass(
            reasoner.backbone, batch, vocabulary=reasoner.vocabulary, trie=trie,
            closing=reasoner.settings.closing, **reasoner.loop,
        )  # fmt: skip
        samples = batch.num_targets
        totals.add("ce", float(done.codes.total), samples)
        hidden_BPND = done.latents.hidden_BPND
        device = hidden_BPND.device
        weights_BP = torch.from_numpy(batch.weights_BP).to(device)
        depths_BP = torch.from_numpy(batch.depths_BP).to(device)
        if hidden_BPND.shape[2] == 1:
            continue
        loss_BPN, has_BPN = aligned_steps(done.latents, batch, fetch, kind=kind)
        totals.add("alignment", float(per_sample(loss_BPN, has_BPN, weights_BP)), samples)
        change_BPN = 1 - functional.cosine_similarity(hidden_BPND[:, :, 1:], hidden_BPND[:, :, :-1], dim=-1)
        for step in range(loss_BPN.shape[2]):
            aligned_BP, taken_BP = has_BPN[..., step], depths_BP > step
            totals.add(f"alignment_{step + 1}", float(loss_BPN[..., step].sum()), int(aligned_BP.sum()))
            totals.add(f"step_{step + 1}", float(change_BPN[..., step][taken_BP].sum()), int(taken_BP.sum()))
        totals.add("norm_ratio", float(done.latents.norm_ratio), 1)
        if reasoner.policy_head is not None and reasoner.settings.fixed_depth is None:
            supervised_BP = torch.from_numpy(batch.supervised_BP).to(device) & (depths_BP > 0)
            right_BP = reasoner.policy_head(hidden_BPND[:, :, 0]).argmax(-1) + 1 == depths_BP
            totals.add("depth_accuracy", float(right_BP[supervised_BP].sum()), int(supervised_BP.sum()))
    return totals.means()


class _Means:
    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, int]] = {}

    def add(self, name: str, total: float, count: int) -> None:
        before, number = self._sums.get(name, (0.0, 0))
        self._sums[name] = before + total, number + count

    def means(self) -> dict[str, float]:
        return {name: total / count for name, (total, count) in self._sums.items() if count}
