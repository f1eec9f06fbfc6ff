"""The cost model counts what is there: weights of a model, tokens of an epoch, operations of a forward pass."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen3Config, Qwen3ForCausalLM

from lasar.artifacts import run_stage
from lasar.config import load_recipe
from lasar.data.interactions import Interactions
from lasar.stages import STAGES

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import recipe_cost

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "qwen3_0.6b_paper.yaml"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    config = Qwen3Config(
        vocab_size=100, hidden_size=32, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, tie_word_embeddings=True, attn_implementation="eager",
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("qwen")
    found = Qwen3ForCausalLM(config)
    found.save_pretrained(folder)
    return found, recipe_cost.shape_of(folder)


def test_weights_are_those_of_the_model(model):
    found, shape = model
    norms = sum(p.numel() for name, p in found.named_parameters() if "norm" in name)
    assert shape.weights == sum(p.numel() for p in found.parameters()) - norms


def test_operations_are_those_of_a_forward_pass(model):
    found, shape = model
    length = 64
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        found.model(torch.zeros(1, length, dtype=torch.long))
    # A plain implementation multiplies with all positions, the later ones masked.
    assert length * shape.forward(length) == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_tokens_are_those_of_an_epoch(tmp_path):
    subprocess.run([sys.executable, str(ROOT / "examples" / "make_mini_data.py"), str(tmp_path)], check=True)
    overrides = [
        f"prepare.source={tmp_path / 'events.csv'}", f"prepare.items={tmp_path / 'items.csv'}", "prepare.reader=table",
        "prepare.split=leave_one_out", f"run_dir={tmp_path / 'run'}",
    ]  # fmt: skip
    recipe = load_recipe(RECIPE, overrides=overrides, sections={n: m.Config for n, m in STAGES.items()})
    run_stage("prepare", STAGES["prepare"], recipe)
    costs = recipe_cost.stage_costs(recipe, recipe_cost.SHAPES["qwen3-0.6b"], tmp_path / "run" / "prepare")
    lengths = [len(s.items) for s in Interactions.load(tmp_path / "run" / "prepare").train_sequences()]
    assert costs["sft"]["tokens"] == 10 * (4 * np.minimum(lengths, 50).sum() + len(lengths))
    rows = sum(length - 1 for length in lengths)  # every item but the first is asked for after latent steps
    assert costs["latent_sft"]["tokens"] == pytest.approx(
        0.4 * costs["sft"]["tokens"] + 4 * rows * (1 + recipe_cost.STEPS + 4)
    )
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "recipe_cost.py"), str(RECIPE), *overrides],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    last = json.loads(done.stdout.splitlines()[-1])
    assert last["weights"] == pytest.approx(0.6e9, rel=0.02)
    assert last["hours"] > 0
