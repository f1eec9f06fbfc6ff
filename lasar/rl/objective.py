"""The objective of the RL stage: GRPO + gamma * KL_bi(h_N, last anchor) + REINFORCE on the depth (paper section 3.5).

Legend: B batch, G rollouts of a prompt, L levels, D hidden.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lasar.decoding.trie import Trie
from lasar.model.prompt import encode_prompts
from lasar.model.reasoner import LatentReasoner
from lasar.rl.losses import Ratio, kl_to_reference, reinforce, surrogate
from lasar.rl.prompts import Prompts
from lasar.rl.rollouts import Rollouts, assert_fresh
from lasar.rl.scoring import Scored, first_code_entropy, score
from lasar.training.latent_losses import alignment_loss


@dataclass(kw_only=True)
class Judged:
    """Rollouts and what they are worth.

    Attributes:
        rollouts: of one batch of prompts.
        rewards_BG: reward of every item.
        advantages_BG: against the group.
        silent_B: groups without signal.
        depth_advantages_B: what each group's depth is worth; None where the depth is fixed.
        old_BGL: log-probabilities under the policy that rolled out; filled by the first update, which is that policy.
        reference_BGL: under the frozen reference; filled by the first update.
    """

    rollouts: Rollouts
    rewards_BG: Tensor
    advantages_BG: Tensor
    silent_B: Tensor
    depth_advantages_B: Tensor | None = None
    old_BGL: Tensor | None = None
    reference_BGL: Tensor | None = None

    def trained_BG(self, *, skip_silent: bool) -> Tensor:
        """Rollouts that the surrogate is averaged over."""
        real_BG = self.rollouts.real_BG
        return real_BG & ~self.silent_B[:, None] if skip_silent else real_BG


@dataclass(frozen=True, kw_only=True)
class Objective:
    """How a step's batches are turned into one loss.

    Attributes:
        reasoner: the policy.
        reference: the frozen Stage-2 policy.
        trie: the catalogue.
        tokens_IL: tokens of every item.
        fetch: anchor indices [S] to anchors [S, D].
        clip: of the surrogate.
        ratio: of items or of codes.
        kl_weight: of the KL to the reference.
        skip_silent: leave groups without signal out of the surrogate and its mean.
        terminal_weight: of KL_bi(h_N, last anchor).
        depth_weight: of REINFORCE.
        depth_entropy: weight of the entropy bonus within it.
        detach_h0: whether REINFORCE trains the Policy Head alone.
        updates: optimizer steps for one set of rollouts.
    """

    reasoner: LatentReasoner
    reference: LatentReasoner
    trie: Trie
    tokens_IL: Tensor
    fetch: Callable[[Tensor], Tensor]
    clip: float = 0.2
    ratio: Ratio = "item"
    kl_weight: float = 0.02
    skip_silent: bool = True
    terminal_weight: float = 0.0
    depth_weight: float = 1.0
    depth_entropy: float = 0.01
    detach_h0: bool = True
    updates: int = 1

    def __call__(self, judged: Judged, *, version: int, counts: "Counts") -> tuple[Tensor, dict[str, float]]:
        """Loss of one batch as its part of the step's mean, and sums for the record.

        Args:
            judged: the batch.
            version: of the policy now.
            counts: of the whole step, so that batches of any sizes add up to one mean.

        Raises:
            AssertionError: the rollouts are stale.
        """
        rollouts = judged.rollouts
        assert_fresh(rollouts, version, updates=self.updates)
        scored = self.score(self.reasoner, rollouts)
        first_update = version == rollouts.version
        if first_update:
            judged.old_BGL = scored.logprobs_BGL.detach()
            with torch.no_grad():
                judged.reference_BGL = self.score(self.reference, rollouts).logprobs_BGL
        assert judged.old_BGL is not None
        assert judged.reference_BGL is not None
        loss_BG, clipped_BG = surrogate(
            scored.logprobs_BGL, judged.old_BGL, judged.advantages_BG, clip=self.clip, ratio=self.ratio
        )
        kl_BG = kl_to_reference(scored.logprobs_BGL, judged.reference_BGL)
        trained_BG, real_BG = judged.trained_BG(skip_silent=self.skip_silent), rollouts.real_BG
        loss = ((loss_BG + self.kl_weight * kl_BG) * trained_BG).sum() / max(counts.rollouts, 1)
        distance_S = self.terminal(scored.last_BD, rollouts.prompts)
        if self.terminal_weight and len(distance_S):
            loss = loss + self.terminal_weight * distance_S.sum() / max(counts.anchored, 1)
        # On-policy: of several updates only the first is by the policy that drew the depths.
        if self.depth_weight and judged.depth_advantages_B is not None and first_update:
            loss = loss + self.depth_weight * self._depth_loss(scored, judged).sum() / counts.prompts
        with torch.no_grad():
            entropy_B = first_code_entropy(
                self.reasoner.backbone, scored.opening_BD, vocabulary=self.reasoner.vocabulary, trie=self.trie
            )
            gap_BG = (judged.old_BGL.sum(-1) - rollouts.scores_BG).abs()
        sums = {
            "kl": float((kl_BG.detach() * real_BG).sum()),
            "clip_share": float(clipped_BG.sum()),
            "entropy": float(entropy_B.sum()),
            "terminal": float(distance_S.detach().sum()),
            "decoder_gap": float(gap_BG[real_BG].sum()),
        }
        return loss, sums

    def score(self, reasoner: LatentReasoner, rollouts: Rollouts) -> Scored:
        """What a model thinks of rollouts, at the rollouts' depths."""
        return score(
            reasoner, rollouts.prompts.ids_BT, rollouts.prompts.lengths_B, depths_B=rollouts.depths_B,
            items_BG=rollouts.items_BG, tokens_IL=self.tokens_IL, trie=self.trie,
        )  # fmt: skip

    def terminal(self, last_BD: Tensor | None, prompts: Prompts) -> Tensor:
        """KL_bi(h_N, last anchor) of the prompts that have one, [S]; other depths than the rationale's are in use."""
        anchors_B = torch.from_numpy(prompts.anchors_B)
        has_B = anchors_B >= 0
        if last_BD is None or not bool(has_B.any()):
            return torch.zeros(0)
        device = last_BD.device
        anchors_SD = self.fetch(anchors_B[has_B]).to(device)
        return alignment_loss(last_BD[has_B.to(device)], anchors_SD, kind="kl")

    def _depth_loss(self, scored: Scored, judged: Judged) -> Tensor:
        assert scored.h0_BD is not None
        assert self.reasoner.policy_head is not None
        assert judged.depth_advantages_B is not None
        h0_BD = scored.h0_BD.detach() if self.detach_h0 else scored.h0_BD
        return reinforce(
            self.reasoner.policy_head(h0_BD), judged.rollouts.depths_B, judged.depth_advantages_B,
            entropy_weight=self.depth_entropy,
        )  # fmt: skip


@torch.no_grad()
def terminal_weight(objective: Objective, batches: Sequence[Prompts], *, loss: float) -> float:
    """The gamma at which the terminal term starts out as large as `loss`; 0 where no prompt has an anchor.

    Args:
        objective: its model is measured as it is, at its own most probable depths.
        batches: training prompts to measure on.
        loss: what the term should weigh.
    """
    reasoner = objective.reasoner
    distances = [torch.zeros(0)]
    for prompts in batches:
        thought = reasoner.think(encode_prompts(reasoner.backbone, prompts.ids_BT, prompts.lengths_B))
        if thought.latents is None:
            continue
        rows_B = torch.arange(len(prompts), device=thought.depths_B.device)
        last_BD = thought.latents.hidden_BPND[rows_B, 0, thought.depths_B]
        distances.append(objective.terminal(last_BD, prompts).cpu())
    distance = float(torch.cat(distances).sum())
    return loss * len(torch.cat(distances)) / distance if distance > 0 else 0.0


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What the means of a step are over.

    Attributes:
        prompts: prompts.
        rollouts: rollouts that the surrogate is averaged over.
        anchored: prompts whose row has a rationale.
        real: rollouts.
    """

    prompts: int
    rollouts: int
    anchored: int
    real: int

    @staticmethod
    def of(batches: Sequence[Judged], *, skip_silent: bool) -> "Counts":
        """Count a step's batches."""
        return Counts(
            prompts=sum(len(b.rollouts.prompts) for b in batches),
            rollouts=sum(int(b.trained_BG(skip_silent=skip_silent).sum()) for b in batches),
            anchored=sum(int((b.rollouts.prompts.anchors_B >= 0).sum()) for b in batches),
            real=sum(int(b.rollouts.real_BG.sum()) for b in batches),
        )
