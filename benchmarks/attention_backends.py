"""FlexAttention's block masks against SDPA's explicit mask on CUDA: seconds and peak memory of a training step.

Trees as on Amazon Beauty: 64 histories of up to 150 tokens, 50 branches each (`<s>`, 4 latent slots, `<e>`, 3 answer
codes, hung at places spread over the history), all in one forward and backward pass in bf16 autocast. The hidden
states and gradients of both must agree first (in fp32, on a quarter of the histories). Runs are interleaved; times are
medians between CUDA events, compilation not counted; memory is the peak above what the model holds. Without a GPU there
is nothing to measure, and the line says so.

Usage: python benchmarks/attention_backends.py [--preset 4m] [--histories 64] [--trunk 150] [--branches 50] [--runs 5]
"""

import argparse
import json
import statistics

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lasar.model.attention import tree_mask
from lasar.model.backbone import build_preset, trunk
from lasar.model.tree import Tree
from lasar.prompts.vocabulary import Vocabulary

BACKENDS = {"ours": "flex_attention", "peer": "sdpa"}
LATENT_STEPS, LEVELS = 4, 4
BRANCH_TOKENS = 1 + LATENT_STEPS + 1 + LEVELS - 1  # the last code is predicted, never read
WARM_UP = 3


def main() -> None:
    arguments = _arguments()
    line: dict[str, object] = {"benchmark": "attention_backends", "baseline": "SDPA with an explicit mask"}
    if not torch.cuda.is_available():
        print(json.dumps({**line, "skipped": "needs a GPU: FlexAttention trains on CUDA only"}))
        return
    print(json.dumps(line | _compare(arguments)))


def _compare(arguments: argparse.Namespace) -> dict[str, object]:
    vocabulary = Vocabulary(num_levels=LEVELS, codebook_size=256)
    model = build_preset(arguments.preset, vocabulary=vocabulary, seed=0).cuda().train()
    sizes = {"histories": arguments.histories, "trunk": arguments.trunk, "branches": arguments.branches}
    error = _disagreement(model, **(sizes | {"histories": max(arguments.histories // 4, 1)}))
    seconds: dict[str, list[float]] = {way: [] for way in BACKENDS}
    peaks: dict[str, int] = {}
    batch = _trees(vocabulary.size, **sizes)
    for run in range(WARM_UP + arguments.runs):
        for way, backend in BACKENDS.items():
            model.set_attn_implementation(backend)
            taken, peak = _measured_step(model, *batch)
            if run >= WARM_UP:
                seconds[way].append(taken)
                peaks[way] = max(peak, peaks.get(way, 0))
    median = {way: statistics.median(values) for way, values in seconds.items()}
    return {
        "ratio": round(median["peer"] / median["ours"], 2),
        "memory_ratio": round(peaks["peer"] / peaks["ours"], 2),
        "parity": error < 1e-4,
        "relative_error": error,
        "ours_seconds": round(median["ours"], 4),
        "baseline_seconds": round(median["peer"], 4),
        "ours_peak_mib": peaks["ours"] >> 20,
        "baseline_peak_mib": peaks["peer"] >> 20,
        "tokens_per_history": arguments.trunk + arguments.branches * BRANCH_TOKENS,
        "preset": arguments.preset,
        "device": torch.cuda.get_device_name(),
        **sizes,
    }


def _trees(
    vocabulary_size: int, *, histories: int, trunk: int, branches: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, trunk lengths and parents; branches are laid out one after the other."""
    rng = torch.Generator().manual_seed(0)
    lengths_B = torch.randint(trunk // 3, trunk + 1, (histories,), generator=rng)
    lengths_B[0] = trunk
    ends_BP = torch.linspace(0, 1, branches) * (lengths_B[:, None] - 1)
    inside_PS = trunk + torch.arange(branches * BRANCH_TOKENS).view(branches, BRANCH_TOKENS)
    parents_BPS = (inside_PS - 1).expand(histories, -1, -1).clone()
    parents_BPS[:, :, 0] = ends_BP.round().long()
    ids_BK = torch.randint(1, vocabulary_size, (histories, trunk + branches * BRANCH_TOKENS), generator=rng)
    return ids_BK.cuda(), lengths_B.cuda(), parents_BPS.flatten(1).cuda()


def _step(model: PreTrainedModel, ids_BK: Tensor, lengths_B: Tensor, parents_BM: Tensor) -> Tensor:
    """Forward and backward from scratch, mask and all; hidden states of the branches."""
    width = ids_BK.shape[1] - parents_BM.shape[1]
    nodes = Tree(lengths_B, width).grow(parents_BM)
    positions_BT = torch.arange(width, device=ids_BK.device).expand(len(ids_BK), -1)
    hidden_BKD = trunk(model)(
        input_ids=ids_BK,
        attention_mask=tree_mask(model, nodes),
        position_ids=torch.cat([positions_BT, nodes.position_BQ], dim=1),
        use_cache=False,
    ).last_hidden_state
    hidden_BMD: Tensor = hidden_BKD[:, width:]
    hidden_BMD.float().pow(3).mean().backward()  # squares would do nothing: the final norm fixes their sum
    return hidden_BMD.detach()


def _measured_step(model: PreTrainedModel, *batch: Tensor) -> tuple[float, int]:
    model.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    with torch.autocast("cuda", torch.bfloat16):
        _step(model, *batch)
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000, torch.cuda.max_memory_allocated() - before


def _disagreement(model: PreTrainedModel, **sizes: int) -> float:
    """Largest difference of hidden states and of gradients in fp32, relative to each tensor's largest entry."""
    batch = _trees(model.config.vocab_size, **sizes)
    found = []
    for backend in BACKENDS.values():
        model.set_attn_implementation(backend)
        model.zero_grad(set_to_none=True)
        hidden_BMD = _step(model, *batch)
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        found.append([hidden_BMD, *gradients])
    return max(
        ((ours - peer).abs().max() / peer.abs().max()).item() for ours, peer in zip(*found, strict=True)
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="4m")
    parser.add_argument("--histories", type=int, default=64)
    parser.add_argument("--trunk", type=int, default=150)
    parser.add_argument("--branches", type=int, default=50)
    parser.add_argument("--runs", type=int, default=5)
    return parser.parse_args()


if __name__ == "__main__":
    main()
