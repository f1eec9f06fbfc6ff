"""Recipes with pre-trained models, the paper's among them: each starts and steps on a tiny copy of its architecture."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from lasar.artifacts import run_stage
from lasar.config import load_recipe
from lasar.stages import STAGES

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "qwen3_0.6b_paper.yaml"
SECTIONS = {name: module.Config for name, module in STAGES.items()}


def test_it_says_what_the_paper_says():
    recipe = load_recipe(RECIPE, sections=SECTIONS)
    sft, anchor, latent, rl, evaluate = (
        recipe.configs[stage] for stage in ("sft", "anchor", "latent_sft", "rl", "evaluate")
    )
    assert recipe.stages == tuple(stage for stage in STAGES if SECTIONS[stage].by_default)
    assert (sft.backbone, sft.learning_rate, sft.epochs) == ("Qwen/Qwen3-0.6B", 5e-4, 10)
    assert (sft.weights.item_tokens, sft.weights.item_answers, sft.text.tasks) == (False, False, {})
    assert (anchor.source, anchor.context, anchor.max_depth) == ("backbone", "alone", 8)
    assert (latent.learning_rate, latent.epochs, latent.alignment) == (5e-5, 4, "kl")
    assert (latent.loop.feedback, latent.loop.closing, latent.loop.head_width) == ("raw", "marker", 256)
    assert (rl.rollouts.group_size, rl.grpo.clip, rl.learning_rate) == (8, 0.2, 1e-5)
    assert (rl.depth.baseline_decay, rl.depth.entropy, rl.terminal_share > 0) == (0.99, 0.01, True)
    assert (evaluate.beam_width, evaluate.k) == (50, 20)


SMALL = {
    "vocab_size": 256, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "tie_word_embeddings": True, "max_position_embeddings": 1024,
}  # fmt: skip
TINY = {
    "qwen3_0.6b_paper": (Qwen3ForCausalLM, Qwen3Config),
    "backbones/smollm2_135m": (LlamaForCausalLM, LlamaConfig),
    "backbones/gemma3_270m": (Gemma3ForCausalLM, Gemma3TextConfig),
    "backbones/qwen2.5_coder_1.5b": (Qwen2ForCausalLM, Qwen2Config),
    "backbones/tinyllama_1.1b": (LlamaForCausalLM, LlamaConfig),
}


def tiny_model(recipe, folder):
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[]))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    architecture, config = TINY[recipe]
    torch.manual_seed(0)
    model = architecture(config(**SMALL))
    model.save_pretrained(folder)
    words.save(str(folder / "tokenizer.json"))
    return type(model).__name__


def test_every_recipe_with_a_model_is_tried():
    files = [RECIPE, *sorted((ROOT / "recipes" / "backbones").glob("*.yaml"))]
    assert {str(file.relative_to(ROOT / "recipes").with_suffix("")) for file in files} == set(TINY)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(TINY))
def test_it_starts_and_steps_on_a_tiny_copy_of_the_architecture(name, tmp_path):
    architecture = tiny_model(name, tmp_path / "model")
    subprocess.run([sys.executable, str(ROOT / "examples" / "make_mini_data.py"), str(tmp_path)], check=True)
    small = [
        f"prepare.source={tmp_path / 'events.csv'}", f"prepare.items={tmp_path / 'items.csv'}", "prepare.reader=table",
        "prepare.columns={}", "prepare.format={}", "prepare.clean={}",
        "prepare.split=last_basket", "prepare.users=60", f"run_dir={tmp_path / 'run'}",
        f"sft.backbone={tmp_path / 'model'}",
        "embed.kind=collaborative", "embed.collaborative_width=16",
        "quantize.num_levels=2", "quantize.codebook_size=16",
        "rationalize.catalogue.min_items=4", "rationalize.catalogue.max_share=0.3", "anchor.text_model=ngrams",
        "sft.epochs=1", "sft.max_history=10", "latent_sft.epochs=1", "rl.steps=2", "rl.rollouts.prompts=8",
        "evaluate.bootstrap_samples=20", "evaluate.beam_width=20", "evaluate.precision=fp32",
    ]  # fmt: skip
    recipe = load_recipe(ROOT / "recipes" / f"{name}.yaml", overrides=small, sections=SECTIONS)
    for stage in recipe.stages:
        run_stage(stage, STAGES[stage], recipe)
    anchors = json.loads((tmp_path / "run" / "anchor" / "summary.json").read_text())
    assert anchors["source"] == recipe.configs["anchor"].source
    methods = json.loads((tmp_path / "run" / "evaluate" / "metrics.json").read_text())["methods"]
    assert {"sft", "latent_sft", "rl"} <= set(methods)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "rl" / "model")
    assert type(reloaded).__name__ == architecture
