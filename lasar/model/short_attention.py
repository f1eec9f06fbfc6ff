"""Attention for training in bf16 on a CPU, where histories are short: plain matrix products, in fp32.

PyTorch's fused attention is made for long sequences. Its backward pass in bf16 takes on a CPU ten to twenty times as
long as plain products for 10 to 70 queries and keys (`benchmarks/short_attention.py`), and for the few queries of
latent steps and answers it is slower whatever the number of keys. In fp32, beyond `MOST` queries, without gradients or
with dropout this is `sdpa`.

Legend: B batch, H heads of queries, J of keys and values, G = H / J, Q queries, K keys, E head width.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "lasar_short"
MOST = 128  # queries; of 250, with as many keys, the two are equally fast
_MORE = ("softcap", "position_bias", "cache")  # what some architectures ask for beside


def attend(
    module: nn.Module,
    query_BHQE: Tensor,
    key_BJKE: Tensor,
    value_BJKE: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """What transformers calls for every layer; see `sdpa_attention_forward` there. Output is [B, Q, H, E]."""
    queries, keys = query_BHQE.shape[2], key_BJKE.shape[2]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    short = torch.is_autocast_enabled(query_BHQE.device.type) and query_BHQE.requires_grad and queries <= MOST
    known = not dropout and (attention_mask is not None or not causal or queries == keys)
    if not short or not known or any(others.get(name) is not None for name in _MORE):
        found: tuple[Tensor, None] = sdpa_attention_forward(
            module, query_BHQE, key_BJKE, value_BJKE, attention_mask,
            dropout=dropout, scaling=scaling, is_causal=is_causal, **others,
        )  # fmt: skip
        return found
    if attention_mask is None and causal:
        attention_mask = torch.ones(queries, keys, dtype=torch.bool, device=query_BHQE.device).tril()
    with torch.autocast(query_BHQE.device.type, enabled=False):
        return _products(query_BHQE, key_BJKE, value_BJKE, attention_mask, scaling), None


def _products(
    query_BHQE: Tensor, key_BJKE: Tensor, value_BJKE: Tensor, mask_XQK: Tensor | None, scaling: float | None
) -> Tensor:
    batch, heads, queries, width = query_BHQE.shape
    groups = key_BJKE.shape[1]
    scale = width**-0.5 if scaling is None else scaling
    # Heads that share keys are more queries of them: nothing is repeated.
    query_BJXE = (query_BHQE.float() * scale).reshape(batch, groups, -1, width)
    scores_BHQK = (query_BJXE @ key_BJKE.float().transpose(2, 3)).view(batch, heads, queries, -1)
    if mask_XQK is not None:
        if mask_XQK.dtype == torch.bool:
            hidden = torch.finfo(torch.float32).min
            mask_XQK = torch.zeros_like(mask_XQK, dtype=torch.float32).masked_fill_(~mask_XQK, hidden)
        scores_BHQK = scores_BHQK + mask_XQK
    shares_BJXK = scores_BHQK.softmax(-1).view(batch, groups, -1, scores_BHQK.shape[-1])
    out_BHQE = (shares_BJXK @ value_BJKE.float()).view(batch, heads, queries, -1)
    return out_BHQE.to(value_BJKE.dtype).transpose(1, 2).contiguous()


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
