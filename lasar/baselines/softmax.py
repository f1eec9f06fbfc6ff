"""The softmax over the whole catalogue that the trained baselines share.

Legend: P predictions, D hidden, I items.
"""

from torch import Tensor
from torch.nn import functional


def item_scores(hidden_PD: Tensor, table_JD: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Logits of all items, [P, I].

    Args:
        hidden_PD: what the model made of the histories.
        table_JD: item embeddings; the last row is the start token, which is never an answer.
        temperature: divides the logits.
    """
    return hidden_PD @ table_JD[:-1].T / temperature


def item_loss(hidden_PD: Tensor, table_JD: Tensor, targets_P: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Cross-entropy over all items, no sampled negatives, summed over the predictions, fp32."""
    logits_PI = item_scores(hidden_PD, table_JD, temperature=temperature)
    return functional.cross_entropy(logits_PI.float(), targets_P, reduction="sum")
