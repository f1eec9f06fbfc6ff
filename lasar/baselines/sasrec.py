"""SASRec: causal self-attention over the history (Kang and McAuley 2018), in its strong form.

Softmax cross-entropy over the whole catalogue at every position instead of one sampled negative (Klenitskiy and
Vasilev 2023), pre-norm blocks, one item table for input and output. Keys and values of earlier tokens can be kept and
grown, which is all that ReaRec needs on top.

Legend: B rows, T positions, Q new tokens, K keys, H heads, D hidden, P predictions.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from lasar.baselines.ranking import Items, Ranked, rank_scores
from lasar.baselines.sequences import Histories, TargetBatch
from lasar.baselines.softmax import item_loss, item_scores

Past = list[tuple[Tensor, Tensor]]


class Block(nn.Module):
    """Pre-norm self-attention and feed-forward, each on a residual branch."""

    def __init__(self, *, hidden_size: int, num_heads: int, dropout: float) -> None:
        """Build with random weights."""
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm = nn.LayerNorm(hidden_size)
        self.attention_in = nn.Linear(hidden_size, 3 * hidden_size)
        self.attention_out = nn.Linear(hidden_size, hidden_size)
        self.feed_norm = nn.LayerNorm(hidden_size)
        self.feed_in = nn.Linear(hidden_size, 4 * hidden_size)
        self.feed_out = nn.Linear(4 * hidden_size, hidden_size)
        self.drop = nn.Dropout(dropout)

    def forward(
        self, x_BQD: Tensor, past: tuple[Tensor, Tensor] | None, mask_QK: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Outputs of the new tokens, and keys and values of all tokens so far, each [B, H, K, D / H]."""
        joint_BQHE = self.attention_in(self.attention_norm(x_BQD)).unflatten(-1, (self.num_heads, -1))
        query, key, value = joint_BQHE.transpose(1, 2).chunk(3, dim=-1)
        if past is not None:
            key, value = torch.cat([past[0], key], dim=2), torch.cat([past[1], value], dim=2)
        mixed_BHQE = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask_QK)
        x_BQD = x_BQD + self.drop(self.attention_out(mixed_BHQE.transpose(1, 2).flatten(2)))
        grown = self.feed_out(self.drop(functional.gelu(self.feed_in(self.feed_norm(x_BQD)))))
        return x_BQD + self.drop(grown), (key, value)


class SasRec(nn.Module):
    """Item and position embeddings, attention blocks, and the item table again."""

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
        temperature: float = 1.0,
    ) -> None:
        """Build with random weights; `temperature` divides the logits, in training and ranking alike."""
        super().__init__()
        self.num_items, self.max_history, self.temperature = num_items, max_history, temperature
        self.items = nn.Embedding(num_items + 1, hidden_size)
        self.positions = nn.Embedding(max_history + 1, hidden_size)
        for table in (self.items, self.positions):
            nn.init.normal_(table.weight, std=0.02)
        self.input_norm = nn.LayerNorm(hidden_size)
        self.blocks = nn.ModuleList(
            Block(hidden_size=hidden_size, num_heads=num_heads, dropout=dropout) for _ in range(num_layers)
        )
        self.final_norm = nn.LayerNorm(hidden_size)
        self.drop = nn.Dropout(dropout)

    def encode(self, items_BT: Tensor) -> tuple[Tensor, Past]:
        """Hidden states of histories, [B, T, D], and the keys and values to go on from."""
        width = items_BT.shape[1]
        seen_TT = torch.ones(width, width, dtype=torch.bool, device=items_BT.device).tril()
        return self.extend(self.items(items_BT) + self.positions.weight[:width], None, seen_TT)

    def extend(self, x_BQD: Tensor, past: Past | None, mask_QK: Tensor) -> tuple[Tensor, Past]:
        """Append tokens given as vectors; `mask_QK` is true where a new token sees a key, old keys first."""
        x_BQD = self.drop(self.input_norm(x_BQD))
        grown: Past = []
        for number, block in enumerate(self.blocks):
            x_BQD, kept = block(x_BQD, past[number] if past else None, mask_QK)
            grown.append(kept)
        return self.final_norm(x_BQD), grown

    def forward(self, batch: TargetBatch) -> Tensor:
        """Cross-entropy summed over the batch's predictions."""
        chosen_BT = batch.targets_BT >= 0
        hidden_BTD, _ = self.encode(batch.histories.items_BT)
        return item_loss(
            hidden_BTD[chosen_BT], self.items.weight, batch.targets_BT[chosen_BT],
            temperature=self.temperature,
        )  # fmt: skip

    @torch.no_grad()
    def rank(self, histories: Histories, k: int, *, excluded: Sequence[Items] | None) -> Ranked:
        """Rank the catalogue for each history; see `rank_scores`."""
        last_BD = histories.last(self.encode(histories.items_BT)[0])
        scores_BI = item_scores(last_BD, self.items.weight, temperature=self.temperature)
        return rank_scores(scores_BI, k, excluded=excluded)
