"""Validation while training: rank held-out events of a fixed sample of users, and score their true items."""

import numpy as np
import torch
from numpy.typing import NDArray

from lasar.data.interactions import EvalCases
from lasar.decoding.ranker import Ranker
from lasar.evaluation.metrics import user_metrics
from lasar.model.prompt import encode_prompts
from lasar.model.reasoner import Depth
from lasar.model.tree import chains
from lasar.prompts.vocabulary import pad_right
from lasar.ranks import add_up, gather, ranks, share_of
from lasar.training.losses import code_nll


def validation_metrics(
    ranker: Ranker, cases: EvalCases, *, exclude_seen: bool, beam_width: int = 20, k: int = 10
) -> dict[str, float]:
    """Mean HR@k and NDCG@k over the cases, and the mean depth where the model reasons.

    Args:
        ranker: its model is in evaluation mode.
        cases: validation users.
        exclude_seen: leave items of the history out of the lists.
        beam_width: narrower than at test time, because this only has to order checkpoints.
        k: items ranked.
    """
    mine = share_of(len(cases))
    items_nK, _, depths_n = ranker.rank(
        [cases.histories[i] for i in mine], [cases.baskets[i] for i in mine], k=k, beam_width=beam_width,
        exclude_seen=exclude_seen, batch_size=64,
    )  # fmt: skip
    items_QK, depths_Q = gather(items_nK, len(cases)), gather(depths_n, len(cases))
    per_case = user_metrics(items_QK, cases.targets, cutoffs=(k,))
    metrics = {name: float(np.mean(per_case[name])) for name in (f"hr@{k}", f"ndcg@{k}")}
    if depths_Q.any():
        metrics["mean_depth"] = float(depths_Q.mean())
    return metrics


@torch.no_grad()
def answer_nll(ranker: Ranker, cases: EvalCases, *, depth: Depth = "auto", batch_size: int = 64) -> float:
    """Mean negative log-likelihood of a case's true items, nats per item (all codes), averaged over cases.

    Less noisy than a ranking metric, and comparable between models that share semantic IDs and normalisation.

    Args:
        ranker: its model is in evaluation mode.
        cases: validation users.
        depth: latent steps before answering.
        batch_size: cases scored together.
    """
    nll_Q = np.zeros(len(cases))
    for chosen in _batches(cases, batch_size)[ranks().rank :: ranks().size]:
        nll_Q[chosen] = _nll_of(ranker, cases, chosen, depth).double().cpu().numpy()
    return float(add_up(torch.from_numpy(nll_Q)).mean())


def _nll_of(ranker: Ranker, cases: EvalCases, chosen: NDArray[np.int64], depth: Depth) -> torch.Tensor:
    vocabulary, device = ranker.vocabulary, ranker.trie.item_of_leaf.device
    rows = [
        vocabulary.render_history(ranker.tokens_IL, cases.histories[q], cases.baskets[q], open_order=True)
        for q in chosen
    ]
    ids_BT, lengths_B = (torch.from_numpy(array).to(device) for array in pad_right(rows, vocabulary.pad))
    prompts = encode_prompts(ranker.reasoner.backbone, ids_BT, lengths_B)
    prefix = ranker.reasoner.think(prompts, depth=depth).prefix
    targets = [torch.from_numpy(cases.targets[q]).long().to(device) for q in chosen]
    items_BA = torch.nn.utils.rnn.pad_sequence(targets, batch_first=True, padding_value=-1)
    tokens_IL = torch.from_numpy(ranker.tokens_IL).long().to(device)
    answers_BAL = tokens_IL[items_BA.clamp(min=0)]
    count, levels = answers_BAL.shape[1:]
    hidden_BALD = prefix.hidden_B1D[:, :, None].expand(-1, count, -1, -1)
    if levels > 1:
        tips_BA = prefix.tip_B1.expand(-1, count)
        parents_BQ = chains(tips_BA, length=levels - 1, first=prefix.tree.num_keys)
        grown_BQD, _ = prefix.grow(parents_BQ, input_ids=answers_BAL[..., :-1].flatten(1))
        later_BALD = grown_BQD.view(len(chosen), count, levels - 1, -1)
        hidden_BALD = torch.cat([hidden_BALD, later_BALD], dim=2)
    real_BA = items_BA >= 0
    nll_P = code_nll(
        prefix.model, hidden_BALD[real_BA].flatten(0, 1), answers_BAL[real_BA].flatten(),
        items_BA[real_BA].repeat_interleave(levels), vocabulary=vocabulary, trie=ranker.trie,
    )  # fmt: skip
    row_P = real_BA.nonzero()[:, 0].repeat_interleave(levels)
    return torch.zeros(len(chosen), device=device).index_add(0, row_P, nll_P) / real_BA.sum(1)


def _batches(cases: EvalCases, batch_size: int) -> list[NDArray[np.int64]]:
    order = np.argsort([len(history) for history in cases.histories], kind="stable")
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
