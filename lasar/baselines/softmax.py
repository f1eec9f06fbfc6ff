"""The softmax over the whole catalogue that the trained baselines share.

Legend: P predictions, R predictions of a chunk, D hidden, I items, J items and the start token.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_CHUNK = 256  # predictions whose logits exist at the same time


def item_scores(hidden_PD: Tensor, table_JD: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Logits of all items, [P, I].

    Args:
        hidden_PD: what the model made of the histories.
        table_JD: item embeddings; the last row is the start token, which is never an answer.
        temperature: divides the logits.
    """
    return hidden_PD @ table_JD[:-1].T / temperature


def item_loss(hidden_PD: Tensor, table_JD: Tensor, targets_P: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Cross-entropy over all items, no sampled negatives, summed over the predictions, fp32.

    Chunk by chunk, and with the gradient on the way forward, so that the logits of all predictions never exist: most of
    the time of the plain form is spent on moving them. Products are made in the type that autocast asks for.
    """
    device = hidden_PD.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_PD.dtype
    loss: Tensor = _ItemLoss.apply(hidden_PD, table_JD[:-1], targets_P, temperature, dtype)  # type: ignore[no-untyped-call]
    return loss


class _ItemLoss(torch.autograd.Function):
    """Summed cross-entropy of `hidden_PD @ table_ID.T / temperature`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_PD: Tensor,
        table_ID: Tensor,
        targets_P: Tensor,
        temperature: float,
        dtype: torch.dtype,
    ) -> Tensor:
        needed = any(ctx.needs_input_grad)
        scaled_PD, small_ID = (hidden_PD / temperature).to(dtype), table_ID.to(dtype)
        loss = torch.zeros((), dtype=torch.float32, device=hidden_PD.device)
        of_hidden_PD = torch.zeros_like(scaled_PD)
        of_table_ID = torch.zeros_like(table_ID, dtype=torch.float32) if needed else None
        for start in range(0, len(scaled_PD), _CHUNK):
            scaled_RD, targets_R1 = scaled_PD[start : start + _CHUNK], targets_P[start : start + _CHUNK, None]
            logits_RI = (scaled_RD @ small_ID.T).float()
            logits_RI -= logits_RI.amax(dim=1, keepdim=True)
            loss -= logits_RI.gather(1, targets_R1).sum()
            sums_R1 = logits_RI.exp_().sum(dim=1, keepdim=True)
            loss += sums_R1.log().sum()
            if of_table_ID is not None:
                error_RI = logits_RI.div_(
                    sums_R1
                )  # probabilities, less one at the target: the gradient of the logits
                error_RI.scatter_add_(1, targets_R1, torch.full_like(sums_R1, -1.0))
                small_RI = error_RI.to(dtype)
                of_hidden_PD[start : start + _CHUNK] = small_RI @ small_ID
                of_table_ID += small_RI.T @ scaled_RD
        ctx.temperature, ctx.types = temperature, (hidden_PD.dtype, table_ID.dtype)
        ctx.save_for_backward(of_hidden_PD, of_table_ID)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        of_hidden_PD, of_table_ID = ctx.saved_tensors
        of_hidden_PD = of_hidden_PD.to(ctx.types[0]) * (upstream / ctx.temperature)
        return of_hidden_PD, (of_table_ID * upstream).to(ctx.types[1]), None, None, None
