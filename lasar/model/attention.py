"""What a model's forward takes as `attention_mask`: the reachability of a tree, in the form its attention wants.

The backends compute the same numbers; `config._attn_implementation` says which one a model uses:

- `sdpa`: a boolean mask, one byte for every query, key and row of the batch. Everywhere.
- `lasar_short`: the same, for CPUs; few queries are trained in bf16 by plain products (`lasar.model.short_attention`).
- `flex_attention`: a block mask, for CUDA (torch trains it nowhere else). Blocks of 128 x 128 in which nobody sees
  anything are skipped; inside the others the kernel compares positions for the trunk, and reads the same bytes for what
  hangs off it: M * K for a row of the batch, never T * T. Finding the blocks holds a byte for every query, key and row
  for a moment; nothing of size queries x keys exists per head, forward or backward.
- `eager`: the mask as numbers to add, for the few architectures that have nothing better (Gemma 2).

A plain causal trunk needs no mask, and without one SDPA takes its fast path. FlexAttention gets one all the same: left
to itself, transformers compiles the making of a block mask anew in every forward.

Legend: B batch, T trunk tokens, Q new tokens, M tokens hung off the trunk, K keys.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from lasar.errors import ConfigError
from lasar.model.short_attention import NAME as SHORT
from lasar.model.tree import Nodes, with_trunk

Mask = Tensor | BlockMask

_KNOWN = ("sdpa", SHORT, "flex_attention", "eager")
_FLEX_WIDTH = 512  # of a model from which on compiling FlexAttention pays
_VARIANTS = 64  # of the compiled kernel, at most
_DROPOUT_FIELDS = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")


def choose_attention(device: torch.device | str, width: int) -> str:
    """The backend for a device and a model's hidden size: FlexAttention for wide models on CUDA, SDPA for others.

    A narrow model is trained before its FlexAttention is compiled. On CPUs it is SDPA but for training in bf16 on few
    queries.
    """
    if torch.device(device).type != "cuda":
        return SHORT
    return "flex_attention" if width >= _FLEX_WIDTH else "sdpa"


def without_plans() -> None:
    """Keep PyTorch from attention that makes an execution plan for every new shape (cuDNN's, first choice on Hopper).

    Histories, latents and beams have other shapes in every batch, and a plan takes longer than many batches.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


def set_attention(model: nn.Module, device: torch.device | str) -> None:
    """Make a model use what `choose_attention` says for a device, if it can.

    It keeps what it has where its architecture knows no FlexAttention, and where attention itself has dropout, which
    FlexAttention cannot do.

    Args:
        model: a Hugging Face model.
        device: where it is going to run.
    """
    without_plans()
    config: Any = model.config
    dropout = any(getattr(config, field, None) for field in _DROPOUT_FIELDS)
    flexible = getattr(model, "_supports_flex_attn", False) and not dropout
    current = config._attn_implementation
    wanted = choose_attention(device, config.get_text_config().hidden_size)
    if wanted == "flex_attention" and flexible:
        # Torch compiles it anew for a single row, query or block, for other layouts of keys and for gradients: about
        # 40 variants over all sizes. Past its limit of 8 it would go on uncompiled, with all scores in memory.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _VARIANTS)
    if wanted == SHORT and not getattr(model, "_supports_attention_backend", False):
        wanted = "sdpa"  # it looks at the name by itself
    if wanted != current and (flexible if wanted == "flex_attention" else current != "eager"):
        model.set_attn_implementation(wanted)  # type: ignore[operator]


def causal_mask(model: nn.Module, ids_BT: Tensor) -> BlockMask | None:
    """Mask of trunks alone, each token seeing all before it.

    Args:
        model: says which backend.
        ids_BT: the trunks, padded on the right; only shape and device matter.

    Raises:
        ConfigError: the model uses an attention that takes no tree.
    """
    if _attention_of(model) != "flex_attention":
        return None
    batch, length = ids_BT.shape
    nothing_BMK = torch.zeros((batch, 1, length), dtype=torch.bool, device=ids_BT.device)
    return _block_mask(nothing_BMK, trunk=length, queries=length)


def growth_mask(model: nn.Module, nodes: Nodes) -> Mask:
    """Mask of tokens appended to a key-value cache, [B, 1, Q, K].

    Args:
        model: says which backend.
        nodes: the new tokens, last in the cache.

    Raises:
        ConfigError: the model uses an attention that takes no tree.
    """
    if _attention_of(model) == "flex_attention":
        return _block_mask(nodes.mask_BQK, trunk=0, queries=nodes.mask_BQK.shape[1])
    return _dense_mask(model, nodes.mask_BQK)


def tree_mask(model: nn.Module, nodes: Nodes) -> Mask:
    """Mask of whole trees in one pass without a cache, trunk and all, [B, 1, K, K].

    Args:
        model: says which backend.
        nodes: everything that hangs off the trunks, grown in one call.

    Raises:
        ConfigError: the model uses an attention that takes no tree.
    """
    mask_BMK = nodes.mask_BQK
    _, hung, keys = mask_BMK.shape
    width = keys - hung
    if _attention_of(model) == "flex_attention":
        return _block_mask(mask_BMK, trunk=width, queries=keys)
    return _dense_mask(model, with_trunk(nodes, width))


def _attention_of(model: nn.Module) -> str:
    config: Any = model.config
    attention = config._attn_implementation
    if attention not in _KNOWN:
        raise ConfigError(
            f"{type(model).__name__} uses attention {attention!r}, which takes no tree of branches; "
            f"load it with attn_implementation set to one of: {', '.join(_KNOWN)}"
        )
    return str(attention)


def _dense_mask(model: nn.Module, mask_BQK: Tensor) -> Tensor:
    mask = mask_BQK[:, None]
    if _attention_of(model) in ("sdpa", SHORT):
        return mask
    dtype = next(model.parameters()).dtype
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(
        ~mask, torch.finfo(dtype).min
    )


def _block_mask(mask_BMK: Tensor, *, trunk: int, queries: int) -> BlockMask:
    # The first `trunk` queries are the trunk, the others are the rows of `mask_BMK`. One function for all uses, with
    # what differs in tensors, so that the compiled kernel is made once and not once for each use and size.
    trunk_tokens = torch.tensor(trunk, device=mask_BMK.device)

    def visible(b: Tensor, _: Tensor, q: Tensor, k: Tensor) -> Tensor:
        # Both sides are computed for every query, so a trunk token must read some row: the first.
        row = (q - trunk_tokens).clamp(min=0)
        return torch.where(q < trunk_tokens, k <= q, mask_BMK[b, row, k])

    # One mask for all heads. Lengths need no padding to whole blocks: torch takes what lies beyond them as unseen.
    batch, _, keys = mask_BMK.shape
    return create_block_mask(visible, B=batch, H=None, Q_LEN=queries, KV_LEN=keys, device=mask_BMK.device)
