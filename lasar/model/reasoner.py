"""A language model that thinks before it answers: backbone, latent loop and Policy Head as one object.

`think` takes computed prompts to the point where an answer begins; what comes after (beams, rollouts) need not know
whether, or how long, the model has thought. Depth 0 leaves the prompt as it is: the plain language model.

Legend: B batch, N depths 1 ... N_max, D hidden.
"""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import pydantic
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from lasar.artifacts import read_json, write_json
from lasar.errors import ArtifactError, ConfigError
from lasar.model.backbone import input_table, load_backbone
from lasar.model.latent import (
    Closing,
    Feedback,
    Latents,
    PolicyHead,
    finish_reasoning,
    reason,
    start_reasoning,
)
from lasar.model.prompt import Prefix
from lasar.prompts.vocabulary import Vocabulary

Depth = Literal["auto", "sampled"] | int

_SETTINGS, _HEAD, _STEPS = "reasoning.json", "policy_head.safetensors", "step_embeddings.safetensors"


@dataclass(frozen=True, kw_only=True)
class ReasoningSettings:
    """What a trained loop must be run with.

    Attributes:
        max_depth: N_max.
        head_width: hidden width of the Policy Head.
        feedback: what a latent slot receives.
        step_embeddings: whether each step adds an embedding of its own to what its slot receives.
        fixed_depth: the depth it was trained at, or None where the Policy Head chooses.
        closing: what stands between the last step and the answer; see `lasar.model.latent.closing_ids`.
    """

    max_depth: int = 8
    head_width: int = 256
    feedback: Feedback = "raw"
    step_embeddings: bool = False
    fixed_depth: int | None = None
    closing: Closing = "marker"


@dataclass(frozen=True, kw_only=True)
class Thought:
    """What `think` did.

    Attributes:
        prefix: prompts continued by the latents of their own depth; answers hang off it.
        depths_B: latent steps taken for each prompt.
        distribution_BN: probability of every depth 1 ... N_max; None where the Policy Head was not asked or trained.
        latents: hidden states of the loop; None at depth 0.
    """

    prefix: Prefix
    depths_B: Tensor
    distribution_BN: Tensor | None
    latents: Latents | None


@runtime_checkable
class OwnLoop(Protocol):
    """A prefix that runs the latent loop in a way of its own; results as of the functions in `lasar.model.latent`."""

    def start_reasoning(self, vocabulary: Vocabulary) -> tuple[Tensor, Tensor]:
        """h_0 [B, 1, D], and the index of `<s>` [B, 1]."""

    def reason(
        self,
        h0_B1D: Tensor,
        depths_B1: Tensor,
        *,
        vocabulary: Vocabulary,
        feedback: Feedback,
        step_vectors_ND: Tensor | None,
        closing: Closing,
    ) -> tuple[Latents, Tensor, Tensor]:
        """All states of the loop, then hidden state [B, 1, D] and index [B, 1] of what closes it."""


class LatentReasoner(nn.Module):
    """Backbone and Policy Head, trained together.

    Attributes:
        backbone: the causal LM.
        policy_head: chooses the depth at h_0; None for a model that never reasons (N_max 0).
        step_table_ND: embedding of every step, starting at 0; None without step embeddings.
        vocabulary: names `<s>` and `<e>`.
        settings: of the loop.
    """

    def __init__(
        self, backbone: PreTrainedModel, *, vocabulary: Vocabulary, settings: ReasoningSettings
    ) -> None:
        """Combine a backbone with a fresh Policy Head.

        Raises:
            ConfigError: the feedback is an expected embedding, but the model has rows that it never learnt to expect.
        """
        super().__init__()
        if settings.feedback == "soft_token" and vocabulary.num_items:
            raise ConfigError(
                "latent_sft.loop.feedback=soft_token: averages over the vocabulary, but nothing ever predicts the "
                "item tokens of this model; train Stage 1 with sft.weights.item_tokens=false, or take another feedback"
            )
        self.backbone = backbone
        self.policy_head: PolicyHead | None = None
        self.step_table_ND: nn.Parameter | None = None
        width: int = backbone.config.get_text_config().hidden_size
        if settings.step_embeddings:
            self.step_table_ND = nn.Parameter(torch.zeros(settings.max_depth, width, device=backbone.device))
        if settings.max_depth:
            head = PolicyHead(width, max_depth=settings.max_depth, width=settings.head_width)
            self.policy_head = head.to(backbone.device)
        self.vocabulary = vocabulary
        self.settings = settings

    @property
    def loop(self) -> dict[str, Any]:
        """How `reason` is to be called for this model: `feedback` and `step_vectors_ND`."""
        return {"feedback": self.settings.feedback, "step_vectors_ND": self.step_table_ND}

    def reasons(self, depth: Depth) -> bool:
        """Whether `think` takes any latent step, and so begins with `<s>`."""
        return (self.settings.fixed_depth if depth == "auto" else depth) != 0

    def think(self, prefix: Prefix, *, depth: Depth = "auto", uniform_B: Tensor | None = None) -> Thought:
        """Reason over computed prompts.

        Args:
            prefix: of this backbone; continued in place.
            depth: `auto`: the most probable depth (or the one it was trained at); `sampled`: drawn from the Policy
                Head's distribution; a number: that many steps for every prompt, 0 for none.
            uniform_B: for `sampled`, a uniform random number per prompt, so that a draw doesn't depend on how prompts
                are batched.

        Raises:
            ConfigError: the depth is not between 0 and N_max, or to be `sampled` where no Policy Head was trained.
        """
        if depth == "sampled" and self.settings.fixed_depth is not None:
            raise ConfigError(
                f"depth='sampled': this model always reasons for {self.settings.fixed_depth} latent steps; "
                "use 'auto' or a number"
            )
        fixed = self.settings.fixed_depth if depth == "auto" else depth
        batch = len(prefix.tip_B1)
        if isinstance(fixed, int):
            check_depth(fixed, self.settings.max_depth)
            if fixed == 0:
                nothing_B = torch.zeros(batch, dtype=torch.int64, device=prefix.tip_B1.device)
                return Thought(prefix=prefix, depths_B=nothing_B, distribution_BN=None, latents=None)
        assert self.policy_head is not None
        if isinstance(prefix, OwnLoop):
            h0_B1D, start_B1 = prefix.start_reasoning(self.vocabulary)
        else:
            h0_B1D, start_B1 = start_reasoning(prefix, prefix.tip_B1, vocabulary=self.vocabulary)
        distribution_BN = self.policy_head(h0_B1D)[:, 0].float().softmax(-1)
        if isinstance(fixed, int):
            depths_B1 = torch.full_like(start_B1, fixed)
        elif depth == "sampled":
            assert uniform_B is not None
            below_BN = distribution_BN.cumsum(-1)[:, :-1] < uniform_B[:, None].to(distribution_BN)
            depths_B1 = below_BN.sum(-1, keepdim=True) + 1
        else:
            depths_B1 = distribution_BN.argmax(-1, keepdim=True) + 1
        if isinstance(prefix, OwnLoop):
            latents, hidden_B1D, tip_B1 = prefix.reason(
                h0_B1D, depths_B1, vocabulary=self.vocabulary, closing=self.settings.closing, **self.loop
            )
        else:
            latents = reason(prefix, h0_B1D, start_B1, num_steps=int(depths_B1.max()), **self.loop)
            hidden_B1D, tip_B1 = finish_reasoning(
                prefix, latents.tips_BP(depths_B1), vocabulary=self.vocabulary, closing=self.settings.closing
            )
        return Thought(
            prefix=replace(prefix, tip_B1=tip_B1, hidden_B1D=hidden_B1D),
            depths_B=depths_B1[:, 0],
            distribution_BN=distribution_BN if self.settings.fixed_depth is None else None,
            latents=latents,
        )


def without_reasoning(backbone: PreTrainedModel, *, vocabulary: Vocabulary) -> LatentReasoner:
    """A plain language model as a reasoner whose only depth is 0."""
    settings = ReasoningSettings(max_depth=0, fixed_depth=0)
    return LatentReasoner(backbone, vocabulary=vocabulary, settings=settings)


def place_markers(
    backbone: PreTrainedModel, vocabulary: Vocabulary, *, how: Literal["opening", "mean"]
) -> None:
    """Give `<s>`, `<t>` and `<e>` their first embeddings.

    Args:
        backbone: its input table is written.
        vocabulary: where the markers are.
        how: `opening`: the embedding of what precedes an answer in Stage 1 (the order marker, or else the mean of the
            last level's codes), so that Stage 2 starts from Stage 1's loss; `mean`: the mean of all embeddings.
    """
    table_VD = input_table(backbone)
    last_level = slice(vocabulary.level_start(vocabulary.num_levels - 1), vocabulary.size)
    with torch.no_grad():
        if how == "mean":
            vector_D = table_VD.mean(0)
        else:
            vector_D = table_VD[vocabulary.order] if vocabulary.orders else table_VD[last_level].mean(0)
        table_VD[vocabulary.latent_start : vocabulary.latent_end + 1] = vector_D


def check_depth(depth: int, max_depth: int) -> None:
    """Refuse a depth the model was not trained for.

    Raises:
        ConfigError: it is not between 0 and N_max.
    """
    if not 0 <= depth <= max_depth:
        raise ConfigError(f"depth={depth}: this model reasons for 0 to {max_depth} latent steps")


def save_reasoner(reasoner: LatentReasoner, folder: Path) -> None:
    """Write `model/` (a plain Hugging Face folder), `vocabulary.json`, the Policy Head and the settings."""
    assert reasoner.policy_head is not None
    reasoner.backbone.save_pretrained(folder / "model", safe_serialization=True)
    reasoner.vocabulary.save(folder / "vocabulary.json")
    save_file(
        {
            name: tensor.detach().cpu().contiguous()
            for name, tensor in reasoner.policy_head.state_dict().items()
        },
        folder / _HEAD,
    )
    if reasoner.step_table_ND is not None:
        save_file({"steps": reasoner.step_table_ND.detach().cpu().contiguous()}, folder / _STEPS)
    write_json(folder / _SETTINGS, asdict(reasoner.settings))


def load_reasoner(folder: Path, *, device: torch.device | str = "cpu") -> LatentReasoner:
    """Open what a training stage saved; a model without a Policy Head is one that never reasons (depth 0).

    Raises:
        ArtifactError: a file is missing or damaged.
    """
    backbone = load_backbone(folder / "model", device=device)
    vocabulary = Vocabulary.load(folder / "vocabulary.json")
    if not (folder / _SETTINGS).is_file():
        return without_reasoning(backbone, vocabulary=vocabulary).eval()
    reasoner = LatentReasoner(backbone, vocabulary=vocabulary, settings=_settings(folder / _SETTINGS))
    assert reasoner.policy_head is not None
    with _named(folder / _HEAD):
        reasoner.policy_head.load_state_dict(load_file(folder / _HEAD))
    if reasoner.step_table_ND is not None:
        with _named(folder / _STEPS):
            reasoner.step_table_ND.data.copy_(load_file(folder / _STEPS)["steps"])
    return reasoner.eval()


def _settings(path: Path) -> ReasoningSettings:
    facts = read_json(path)
    with _named(path):
        if not isinstance(facts, dict) or facts.keys() != {field.name for field in fields(ReasoningSettings)}:
            raise KeyError("not the settings of a latent loop")
        return pydantic.TypeAdapter(ReasoningSettings).validate_json(json.dumps(facts), strict=True)


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError, KeyError, pydantic.ValidationError, SafetensorError) as error:
        reason_given = str(error).strip().partition("\n")[0]
        raise ArtifactError(f"{path}: damaged ({reason_given}); run the training stage again") from None
