"""Attention of a training step in bf16 on a CPU: ours for few keys against SDPA; forward and backward of a whole model.

Batches of 2,048 tokens of histories that are as long as each other, one length after the other; CPU time of one thread,
in turns, medians. `error` is that of the gradient against fp32's, ours and SDPA's.

Usage: python benchmarks/short_attention.py [--preset 4m] [--runs 5]
"""

import argparse
import json
import os
import statistics
import time

os.environ["OMP_NUM_THREADS"] = "1"

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lasar.model.backbone import build_preset, trunk
from lasar.model.precision import bf16_speed
from lasar.model.short_attention import NAME
from lasar.prompts.vocabulary import Vocabulary

LENGTHS = (10, 32, 64, 128, 256)
TOKENS = 2048


def main() -> None:
    """Print one JSON line for every length."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="4m")
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    vocabulary = Vocabulary(num_levels=3, codebook_size=256)
    model = build_preset(options.preset, vocabulary=vocabulary, seed=0)
    for length in LENGTHS:
        ids_BT = torch.randint(vocabulary.size, (TOKENS // length, length))
        exact, _ = step(model, ids_BT, "sdpa", precise=True)
        seconds: dict[str, list[float]] = {NAME: [], "sdpa": []}
        errors = {}
        for _ in range(options.runs + 1):
            for way, taken in seconds.items():
                gradient, spent = step(model, ids_BT, way)
                errors[way] = float((gradient - exact).norm() / exact.norm())
                taken.append(spent)
        ours, peer = (statistics.median(taken[1:]) for taken in seconds.values())
        line = {
            "benchmark": "short_attention", "ratio": round(peer / ours, 2), "baseline": "SDPA, bf16", "keys": length,
            "ours_ms": round(1e3 * ours, 1), "error": round(errors[NAME], 4),
            "baseline_error": round(errors["sdpa"], 4),
            "bf16_speed": round(bf16_speed(256), 2), "preset": options.preset, "tokens": ids_BT.numel(),
        }  # fmt: skip
        print(json.dumps(line), flush=True)


def step(
    model: PreTrainedModel, ids_BT: Tensor, attention: str, *, precise: bool = False
) -> tuple[Tensor, float]:
    """The gradient of every weight of the decoder, and seconds of CPU time."""
    model.set_attn_implementation(attention)
    model.zero_grad()
    began = time.process_time()
    with torch.autocast("cpu", torch.bfloat16, enabled=not precise):
        hidden_BTD = trunk(model)(input_ids=ids_BT, use_cache=False).last_hidden_state
    torch.manual_seed(0)
    hidden_BTD.backward(torch.randn(hidden_BTD.shape).to(hidden_BTD.dtype))
    spent = time.process_time() - began
    gradients = [parameter.grad for parameter in model.parameters()]
    return torch.cat([gradient.flatten() for gradient in gradients if gradient is not None]), spent


if __name__ == "__main__":
    main()
