"""Can a model grow a tree of branches? A few tokens through it say so; its name says nothing.

Whatever hangs off a trunk relies on five things: a token's state does not depend on later tokens, a 4-D mask hides what
it says it hides, position ids decide a token's position, the key-value cache can be appended to, and no layer has a
window shorter than the longest path. The probe compares a small tree with its root-to-token sequences computed one by
one; only where they differ does it look for the reason. And logits over a part of the vocabulary are computed from
states after the final norm, which must give what the model itself gives.

Legend: B batch, T trunk tokens, Q hung tokens, K = T + Q.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lasar.errors import ConfigError
from lasar.model.attention import causal_mask, tree_mask
from lasar.model.backbone import input_table, trunk
from lasar.model.head import part_logits
from lasar.model.prompt import encode_prompts
from lasar.model.tree import Nodes, Tree

# Two trunks of unequal length; three branches each, siblings and a grandchild: hung tokens are up to 6 places away
# from where their position says they are. First generation, then second; parents are trunk positions or 5 + q.
_LENGTHS = (5, 3)
_WIDTH = 5
_PARENTS = (((4, 2, 4), (0, 2, 1)), ((5, 6, 7), (5, 5, 7)))
_WINDOWS = ("sliding_window", "attention_chunk_size", "window_size")

_Probe = Callable[[], Tensor]


class _UnfitError(Exception):
    """The reason why a model cannot grow a tree."""


def check_tree_attention(model: nn.Module, *, max_tokens: int) -> None:
    """Refuse a model that cannot grow a tree of branches.

    A probe of a dozen tokens, without gradient; weights, mode and random state stay as they are. With
    transformers 5.23 and random weights:

    - can: Qwen2, Qwen3, Llama, Mistral, Gemma 1 to 3, SmolLM3, Phi, Phi3, OLMo 2 and 3, Granite, Cohere, StableLM,
      Starcoder2, GLM4, EXAONE 4, Ernie 4.5, Hunyuan, Seed-OSS, GPT-2, GPT-J, GPT-Neo, GPT-NeoX, GPT-BigCode, CodeGen,
      OPT, BioGPT, XGLM, Falcon with rotary positions; of mixtures of experts Qwen3, Mixtral,
      DeepSeek-V3, GPT-OSS;
    - 4-D masks rejected: Bloom, Falcon with ALiBi, Mamba, GPT-1;
    - position ids ignored: MPT (ALiBi); counted from elsewhere: RoBERTa;
    - masks ignored by recurrent or convolutional layers: Mamba2, RWKV, RecurrentGemma, Jamba, Qwen3-Next, LFM2;
    - not causal: BERT as an encoder, XLNet; more than a matrix on the final states: BERT as a decoder;
    - windows: a Mistral, Gemma, GPT-Neo or GPT-OSS whose window is shorter than `max_tokens` (GPT-OSS: 128 tokens).

    Args:
        model: a Hugging Face causal LM.
        max_tokens: longest path from a root to a token that will be computed: prompt, latent steps and answer.

    Raises:
        ConfigError: it cannot; names the architecture and the reason.
    """
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            _check_length(model, max_tokens)
            _check_tree(model)
            _check_head(model)
    except _UnfitError as unfit:
        config: Any = model.config
        raise ConfigError(
            f"backbone of type {config.model_type!r} ({type(model).__name__}) cannot be used: {unfit}; use a decoder "
            "whose attention follows 4-D masks and position ids, such as Qwen, Llama, SmolLM or GPT-2"
        ) from None
    finally:
        model.train(training)


def _check_length(model: nn.Module, max_tokens: int) -> None:
    # A 4-D mask is taken by every layer as it is, so a window would be lost. Where no path is longer, nothing is.
    config: Any = model.config
    text: Any = config.get_text_config()
    layer_types = getattr(text, "layer_types", None)
    windowed = layer_types is None or any("sliding" in kind or "chunked" in kind for kind in layer_types)
    for field in ("max_position_embeddings", *(_WINDOWS if windowed else ())):
        limit = getattr(text, field, None)
        if isinstance(limit, int) and 0 < limit < max_tokens:
            raise _UnfitError(
                f"its {field} is {limit}, and a prompt with its answer takes up to {max_tokens} tokens "
                "(a shorter sft.max_history fits)"
            )


def _check_tree(model: nn.Module) -> None:
    probe = _Tree(model)
    causal_mask(model, probe.ids_BK)  # refuses an attention that takes no masks at all
    truth_BQ = _attempt("it does not run on token ids alone", probe.one_by_one)
    _require(
        _close(_attempt("it does not run on token ids alone", probe.trunks), probe.trunk_truth()),
        "a token's hidden state depends on the tokens after it (an encoder, or not causal)",
    )
    masked = _attempt(
        "it takes no 4-D attention mask with position ids, as is usual with ALiBi or without attention",
        probe.in_one_pass,
    )
    if not _close(masked, truth_BQ):
        raise _UnfitError(probe.why_not())
    cached = _attempt("its key-value cache cannot be appended to with a 4-D mask", probe.with_cache)
    _require(_close(cached, truth_BQ), "with its key-value cache it computes something else than without")


def _check_head(model: nn.Module) -> None:
    ids_BT = _Tree(model).ids_BK
    hidden_BTD = trunk(model)(input_ids=ids_BT, use_cache=False).last_hidden_state
    own = _attempt("its head does not run", lambda: model(input_ids=ids_BT, use_cache=False).logits)
    _require(
        _close(part_logits(model, hidden_BTD, 0, len(input_table(model))), own),
        "its logits are not those of a head on the states after its final norm (bias, scale and cap are known)",
    )


class _Tree:
    """The probe's tree and the ways to compute it."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        table = input_table(model)
        self.device = table.device
        generator = torch.Generator().manual_seed(0)
        shape = (len(_LENGTHS), _WIDTH + sum(len(generation[0]) for generation in _PARENTS))
        self.ids_BK = torch.randint(len(table), shape, generator=generator).to(self.device)
        self.lengths_B = torch.tensor(_LENGTHS, device=self.device)
        self.parents_BQ = torch.cat([torch.tensor(generation) for generation in _PARENTS], dim=1).to(
            self.device
        )

    def grown(self) -> Nodes:
        return Tree(self.lengths_B, _WIDTH).grow(self.parents_BQ)

    def one_by_one(self) -> Tensor:
        """Every hung token at the end of its own sequence."""
        states = []
        for mask_QK, ids_K in zip(self.grown().mask_BQK, self.ids_BK, strict=True):
            states.append(torch.stack([self._last(ids_K[path_K]) for path_K in mask_QK]))
        return torch.stack(states)

    def trunks(self) -> Tensor:
        return self._forward(input_ids=self.ids_BK[:1, :_WIDTH])

    def trunk_truth(self) -> Tensor:
        ids_T = self.ids_BK[0, :_WIDTH]
        return torch.stack([self._last(ids_T[: end + 1]) for end in range(_WIDTH)])[None]

    def in_one_pass(self, stretch: int = 1, ids_BK: Tensor | None = None) -> Tensor:
        nodes = self.grown()
        trunk_BT = torch.arange(_WIDTH, device=self.device).expand(len(nodes.position_BQ), -1)
        hidden_BKD = self._forward(
            input_ids=self.ids_BK if ids_BK is None else ids_BK,
            attention_mask=tree_mask(self.model, nodes),
            position_ids=stretch * torch.cat([trunk_BT, nodes.position_BQ], dim=1),
        )
        return hidden_BKD[:, _WIDTH:]

    def with_cache(self) -> Tensor:
        prefix = encode_prompts(self.model, self.ids_BK[:, :_WIDTH], self.lengths_B)
        states, first = [], _WIDTH
        for generation in _PARENTS:
            parents_BQ = torch.tensor(generation, device=self.device)
            ids_BQ = self.ids_BK[:, first : first + parents_BQ.shape[1]]
            states.append(prefix.grow(parents_BQ, input_ids=ids_BQ)[0])
            first += parents_BQ.shape[1]
        return torch.cat(states, dim=1)

    def why_not(self) -> str:
        """What the model does with mask and position ids, given that a tree in one pass comes out wrong."""
        # Hung token 1 of row 0 is seen by token 4 and itself. To others it is multiplied by zero: no rounding differs.
        changed_BK = self.ids_BK.clone()
        changed_BK[0, _WIDTH + 1] = (changed_BK[0, _WIDTH + 1] + 1) % len(input_table(self.model))
        others = [0, 2, 3, 5]
        found, usual = self.in_one_pass(ids_BK=changed_BK)[0, others], self.in_one_pass()[0, others]
        if not _close(found, usual, digits=0.9):
            return "a token sees what a 4-D mask hides from it (no attention to mask, or masks are ignored)"
        # Stretched, because a shift alone changes nothing where positions are relative.
        if torch.equal(self.in_one_pass(stretch=2), self.in_one_pass()):
            return "it ignores position ids: its positions follow from the order of tokens, as in ALiBi"
        positions_1T = torch.arange(_WIDTH, device=self.device)[None]
        counted = self._forward(input_ids=self.ids_BK[:1, :_WIDTH], position_ids=positions_1T)
        if not _close(counted, self.trunks()):
            return "it does not count positions from 0"
        return "a tree with 4-D mask and position ids comes out different from its sequences one by one"

    def _last(self, ids_T: Tensor) -> Tensor:
        return self._forward(input_ids=ids_T[None])[0, -1]

    def _forward(self, **arguments: Any) -> Tensor:
        hidden = trunk(self.model)(use_cache=False, **arguments).last_hidden_state
        assert isinstance(hidden, Tensor)
        return hidden


def _attempt(failure: str, compute: _Probe) -> Tensor:
    try:
        return compute()
    except Exception as error:  # whatever a foreign architecture raises is its answer
        text = " ".join(str(error).split())
        raise _UnfitError(f"{failure} ({type(error).__name__}: {text[:200]})") from None


def _close(found: Tensor, expected: Tensor, *, digits: float = 0.5) -> bool:
    """Whether states agree to a share of the digits of their type; half is far above rounding."""
    error = (found - expected).float().norm(dim=-1)
    return bool((error <= torch.finfo(expected.dtype).eps ** digits * expected.float().norm(dim=-1)).all())


def _require(holds: bool, reason: str) -> None:
    if not holds:
        raise _UnfitError(reason)
