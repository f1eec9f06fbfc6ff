"""GRU4Rec: a recurrent network over the history (Hidasi et al. 2016), here with full cross-entropy.

The paper samples negatives and uses a pairwise loss; softmax over the whole catalogue is what later comparisons found
strongest where the catalogue allows it. Output and input share one item table.

Legend: B rows, T positions, D hidden, I items, P predictions.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lasar.baselines.ranking import Items, Ranked, rank_scores
from lasar.baselines.sequences import Histories, TargetBatch
from lasar.baselines.softmax import item_loss, item_scores


class Gru4Rec(nn.Module):
    """Item embeddings, GRU layers, one projection, and the item table again."""

    whole_histories = True
    queries_per_batch = 256

    def __init__(
        self, *, num_items: int, max_history: int, hidden_size: int, num_layers: int, dropout: float
    ) -> None:
        """Build with random weights."""
        super().__init__()
        self.num_items, self.max_history = num_items, max_history
        self.items = nn.Embedding(num_items + 1, hidden_size)
        nn.init.normal_(self.items.weight, std=0.02)
        between = dropout if num_layers > 1 else 0.0
        self.gru = nn.GRU(hidden_size, hidden_size, num_layers, batch_first=True, dropout=between)
        self.project = nn.Linear(hidden_size, hidden_size)
        self.drop = nn.Dropout(dropout)

    def hidden(self, items_BT: Tensor) -> Tensor:
        """State after every token, [B, T, D]."""
        states_BTD, _ = self.gru(self.drop(self.items(items_BT)))
        projected: Tensor = self.project(self.drop(states_BTD))
        return projected

    def forward(self, batch: TargetBatch) -> Tensor:
        """Cross-entropy summed over the batch's predictions."""
        chosen_BT = batch.targets_BT >= 0
        hidden_PD = self.hidden(batch.histories.items_BT)[chosen_BT]
        return item_loss(hidden_PD, self.items.weight, batch.targets_BT[chosen_BT])

    @torch.no_grad()
    def rank(self, histories: Histories, k: int, *, excluded: Sequence[Items] | None) -> Ranked:
        """Rank the catalogue for each history; see `rank_scores`."""
        last_BD = histories.last(self.hidden(histories.items_BT))
        return rank_scores(item_scores(last_BD, self.items.weight), k, excluded=excluded)
