"""What a recipe would cost on a machine that is not at hand: operations counted, GPU hours and memory from them.

Reads the recipe and its finished `prepare`, counts the tokens of every stage that a model computes in, and divides the
operations of a decoder by a share of the device's peak: training in bf16, ranking (evaluation, validation, rollouts) in
fp32, as the stages do. Not counted: other text models, what the CPU does, and text tasks. On a machine that is at hand
nothing has to be assumed: `sft`, `latent_sft` and `rl` rehearse and say what they will take before they begin.

Usage: python benchmarks/recipe_cost.py RECIPE [--shape qwen3-0.6b | --config FOLDER] [--peak 798] [--ranking-peak 67]
       [--share 0.35] [stage.key=value ...]
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lasar.config import load_recipe
from lasar.data.interactions import Interactions
from lasar.errors import LasarError
from lasar.stages import STAGES

GB = 1e9
STEPS = 4.0  # latent steps of a typical history: docs/results.md
VALIDATION_BEAMS = 20  # lasar.training.validation
SEGMENT_TOKENS = 12.0  # of a rationale's segment, assumed; a row has STEPS of them
PRODUCTS = (
    34  # bytes a token keeps for the backward pass, of every layer and unit of width: bf16 without attention
)


@dataclass(frozen=True)
class Shape:
    """A decoder.

    Attributes:
        layers: N.
        width: hidden size.
        inner: of the MLP.
        query: width of all query heads together.
        key: width of all key heads together.
        vocabulary: tokens.
        tied: one table for input and output.
    """

    layers: int
    width: int
    inner: int
    query: int
    key: int
    vocabulary: int
    tied: bool

    @property
    def body(self) -> int:
        """Weights without tables."""
        return self.layers * self.width * (2 * self.query + 2 * self.key + 3 * self.inner)

    @property
    def weights(self) -> int:
        """All of them."""
        return self.body + (1 if self.tied else 2) * self.vocabulary * self.width

    def forward(self, context: float) -> float:
        """Operations of a token that sees `context` others, without the output table."""
        return 2 * self.body + 4 * self.layers * self.query * context


SHAPES = {"qwen3-0.6b": Shape(28, 1024, 3072, 2048, 1024, 151_936, True)}


def shape_of(folder: Path) -> Shape:
    """From a model folder's `config.json`."""
    if not (folder / "config.json").is_file():
        raise LasarError(f"--config {folder}: no model folder (no config.json)")
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    heads = values["num_attention_heads"]
    size = values.get("head_dim") or values["hidden_size"] // heads
    return Shape(
        values["num_hidden_layers"], values["hidden_size"], values["intermediate_size"], heads * size,
        values.get("num_key_value_heads", heads) * size, values["vocab_size"], values.get("tie_word_embeddings", True),
    )  # fmt: skip


def stage_costs(recipe: Any, shape: Shape, prepare: Path) -> dict[str, dict[str, float]]:
    """Tokens, operations and bytes of every training stage."""
    sft, latent, rl, quantize, evaluate = (
        recipe.configs[stage] for stage in ("sft", "latent_sft", "rl", "quantize", "evaluate")
    )
    events = Interactions.load(prepare)
    lengths_U = np.array([len(sequence.items) for sequence in events.train_sequences()])
    levels = quantize.num_levels
    tokens = float(np.minimum(lengths_U, sft.max_history).sum() * levels + len(lengths_U))
    rows = float(np.maximum(lengths_U - 1, 0).sum())
    context = levels * float((lengths_U**2).sum() / max(lengths_U.sum(), 1)) / 2
    table = (
        2 * shape.width * (shape.vocabulary if sft.loss_vocab == "full" else levels * quantize.codebook_size)
    )
    each, answer = shape.forward(context), 3 * table  # forward, and twice that backward
    prompt = context * 2

    def ranking(users: float, beams: int, times: float = 1.0) -> float:
        return each * times * users * (prompt + STEPS + beams * (levels - 1))

    costs = {
        "sft": (
            sft.epochs * tokens,
            sft.epochs * (3 * tokens * each + rows * levels * answer),
            ranking(sft.validation.users, VALIDATION_BEAMS, sft.epochs),
        )
    }
    if recipe.configs["anchor"].source == "backbone":
        read = rows * STEPS * SEGMENT_TOKENS
        costs["anchor"] = (read, 0.0, shape.forward(SEGMENT_TOKENS / 2) * read)
    branch = rows * (1 + STEPS + levels)
    costs["latent_sft"] = (
        latent.epochs * (tokens + branch),
        latent.epochs * (3 * (tokens + branch) * each + rows * levels * answer),
        ranking(latent.validation.users, VALIDATION_BEAMS, latent.epochs),
    )
    prompts = rl.steps * rl.rollouts.prompts * rl.rollouts.accumulate
    beams = rl.rollouts.beam_width * (levels - 1)
    group = rl.rollouts.group_size * levels
    asked = prompts * (prompt + STEPS + beams)  # the policy asks
    learned = prompts * (prompt + STEPS + group)  # policy and reference read the answers, the policy learns
    costs["rl"] = (
        asked + learned,
        each * (3 + 1) * learned + table * prompts * 4 * group,
        each * asked + table * prompts * beams
        + ranking(rl.guards.users, VALIDATION_BEAMS, rl.steps / rl.guards.validate_every + 1),
    )  # fmt: skip
    models = 1 + len(evaluate.also)
    questions = models * len(lengths_U) * (prompt + STEPS + evaluate.beam_width * (levels - 1))
    costs["evaluate"] = (questions, 0.0, each * questions)
    states = 4 * shape.weights * 5  # weights, gradients, two of Adam, the best so far
    batch = max(sft.batch_tokens, latent.batch_tokens)
    kept = PRODUCTS * batch * shape.layers * shape.width
    logits = 3 * 4 * batch * shape.vocabulary if sft.loss_vocab == "full" else 0
    memory = {
        "anchor": 4 * shape.weights, "sft": states + kept + logits, "latent_sft": states + kept + logits,
        "rl": states + 4 * shape.weights + kept, "evaluate": 4 * shape.weights,
    }  # fmt: skip
    return {
        stage: {"tokens": count, "operations": work, "ranking": ranked, "bytes": memory[stage]}
        for stage, (count, work, ranked) in costs.items()
    }


def main() -> None:
    """Print one JSON line a stage, and one of all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="qwen3-0.6b")
    parser.add_argument("--config", type=Path, help="model folder, instead of a shape")
    parser.add_argument(
        "--peak", type=float, default=798.0, help="TFLOP/s of the device; an H100's in bf16, measured"
    )
    parser.add_argument(
        "--ranking-peak", type=float, default=67.0, help="TFLOP/s in fp32; an H100's, from its data sheet"
    )
    parser.add_argument(
        "--share", type=float, default=0.35, help="of the peak that training reaches: assumed"
    )
    options = parser.parse_intermixed_args()
    sections: Any = {name: module.Config for name, module in STAGES.items()}
    recipe = load_recipe(options.recipe, overrides=options.overrides, sections=sections)
    shape = shape_of(options.config) if options.config else SHAPES[options.shape]
    rates = [peak * 1e12 * options.share * 3600 for peak in (options.peak, options.ranking_peak)]
    prepared = recipe.run_dir / "prepare"
    if not prepared.is_dir():
        raise LasarError(f"{prepared}: there is nothing to count yet; run: lasar prepare {options.recipe}")
    costs = stage_costs(recipe, shape, prepared)
    hours = {s: c["operations"] / rates[0] + c["ranking"] / rates[1] for s, c in costs.items()}
    for stage, cost in costs.items():
        line = {
            "stage": stage, "million_tokens": round(cost["tokens"] / 1e6, 2),
            "petaflop": round(cost["operations"] / 1e15, 2), "ranking_petaflop": round(cost["ranking"] / 1e15, 2),
            "hours": round(hours[stage], 3), "gigabytes": round(cost["bytes"] / GB, 1),
        }  # fmt: skip
        print(json.dumps(line))
    line = {
        "recipe": str(options.recipe), "weights": shape.weights, "hours": round(sum(hours.values()), 2),
        "gigabytes": round(max(cost["bytes"] for cost in costs.values()) / GB, 1),
        "peak_tflops": options.peak, "ranking_tflops": options.ranking_peak, "assumed_share": options.share,
    }  # fmt: skip
    print(json.dumps(line))


if __name__ == "__main__":
    try:
        main()
    except LasarError as error:
        sys.exit(f"error: {error}")
