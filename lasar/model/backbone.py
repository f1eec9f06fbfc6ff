"""The decoder-only language model: a preset trained from scratch, or any Hugging Face causal LM by path.

Both are the same kind of object (`PreTrainedModel` with a `.model` trunk and a head over the vocabulary), so that
nothing after this file asks which one it has. Presets are Qwen3, the paper's architecture, at sizes a CPU can train.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM
from transformers.utils.logging import disable_progress_bar

from lasar.errors import ArtifactError, ConfigError, reason_of, require
from lasar.model.attention import set_attention
from lasar.model.opening import NotOpenedError, open_model
from lasar.model.presets import PRESETS, check_backbone, not_loadable
from lasar.prompts.vocabulary import Normalise, Vocabulary

disable_progress_bar()  # our own bars say what is going on

_HEAD_DIM = 64
_MAX_POSITIONS = 4096
INITIAL_STD = 0.02  # of fresh embeddings, as in Qwen3


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """A model and the tokens it was extended with."""

    model: PreTrainedModel
    vocabulary: Vocabulary


def build_backbone(
    name: str,
    *,
    num_levels: int,
    codebook_size: int,
    orders: bool,
    max_history: int,
    normalise: Normalise,
    dropout: float,
    lora_rank: int,
    seed: int,
    pretrained: bool = True,
    text_size: int = 0,
    num_items: int = 0,
    item_answers: bool = False,
) -> Backbone:
    """A preset with random weights, or a pre-trained causal LM with an extended vocabulary.

    Args:
        name: a key of `PRESETS`, a model folder, or a hub id.
        num_levels: codes per item.
        codebook_size: codes per level.
        orders: whether histories carry order markers.
        max_history: items of a history that are rendered.
        normalise: what a code's probability is normalised over.
        dropout: of every residual branch while training (presets only).
        lora_rank: rank of LoRA adapters (pre-trained models only); 0 trains all weights.
        seed: of random weights.
        pretrained: False gives a model folder's architecture random weights: a control.
        text_size: text tokens that the model is to read and write; a preset gets that many, a pre-trained model
            must have them.
        num_items: items with tokens of their own; see `Vocabulary`.
        item_answers: whether these tokens count in answers; see `Vocabulary`.

    Raises:
        ConfigError: no such preset or model, a model without that many tokens, or LoRA on a preset.
        MissingExtraError: LoRA without peft.
    """
    sizes: dict[str, Any] = {
        "num_levels": num_levels, "codebook_size": codebook_size, "orders": orders, "max_history": max_history,
        "normalise": normalise, "num_items": num_items,
        "item_answers": item_answers and num_items > 0 and normalise == "trie",
    }  # fmt: skip
    if name in PRESETS:
        if lora_rank or not pretrained:
            key = f"lora_rank={lora_rank}" if lora_rank else "pretrained=false"
            raise ConfigError(f"sft.weights.{key}: preset {name!r} has no pre-trained weights; leave it out")
        vocabulary = Vocabulary(base_size=text_size, **sizes)
        return Backbone(
            model=build_preset(name, vocabulary=vocabulary, seed=seed, dropout=dropout), vocabulary=vocabulary
        )
    check_backbone(name)
    model = _load_pretrained(name) if pretrained else _random_weights(name, seed)
    base_size = input_table(model).shape[0]
    if text_size > base_size:
        raise ConfigError(
            f"sft.backbone: {name}: its tokenizer has {text_size:,} tokens and its model {base_size:,}; "
            f"give a folder whose tokenizer.json belongs to the model, or no sft.text.tasks"
        )
    vocabulary = Vocabulary(base_size=base_size, **sizes)
    _extend_embeddings(model, vocabulary.size)
    if lora_rank:
        _add_lora(model, lora_rank, seed)
    return Backbone(model=model, vocabulary=vocabulary)


def build_preset(preset: str, *, vocabulary: Vocabulary, seed: int, dropout: float = 0.0) -> PreTrainedModel:
    """A Qwen3 decoder with random weights whose whole vocabulary is LASAR's.

    Args:
        preset: a key of `PRESETS`.
        vocabulary: its size is the embedding's.
        seed: of the initial weights.
        dropout: of every residual branch while training.
    """
    sizes = PRESETS[preset]
    values: dict[str, Any] = {
        "vocab_size": vocabulary.size,
        "num_key_value_heads": sizes["num_attention_heads"],
        "head_dim": min(_HEAD_DIM, sizes["hidden_size"] // sizes["num_attention_heads"]),
        "max_position_embeddings": _MAX_POSITIONS,
        "tie_word_embeddings": False,
        "pad_token_id": vocabulary.pad,
        "bos_token_id": vocabulary.user,
        "eos_token_id": None,
        "attn_implementation": "sdpa",
        **sizes,
    }
    config = Qwen3Config(**values)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config)
    add_residual_dropout(model, dropout)
    return model


def save_backbone(backbone: Backbone, folder: Path) -> None:
    """Write `model/` (a plain Hugging Face folder, LoRA merged) and `vocabulary.json` under `folder`."""
    _merge_lora(backbone.model)
    backbone.model.save_pretrained(folder / "model", safe_serialization=True)
    backbone.vocabulary.save(folder / "vocabulary.json")


def load_backbone(folder: Path, *, device: torch.device | str = "cpu") -> PreTrainedModel:
    """Open a saved model folder in evaluation mode.

    Raises:
        ArtifactError: the folder is not a model folder, or is damaged.
    """
    if not (folder / "config.json").is_file():
        raise ArtifactError(f"{folder}: not a model folder (no config.json); run the training stage again")
    try:
        model = open_model(str(folder), local_files_only=True, use_safetensors=True)
    except NotOpenedError as reason:
        raise ArtifactError(f"{folder}: damaged model ({reason}); run the training stage again") from None
    move(model, device)
    model.eval()
    return model


def trunk(model: nn.Module) -> Any:
    """The decoder under the head: token ids or embeddings in, hidden states after the final norm out."""
    prefix = model.base_model_prefix
    assert isinstance(prefix, str)
    return model.get_submodule(prefix)


def freeze_tokens(model: nn.Module) -> None:
    """Train neither token embeddings nor the output head; what is between them stays as it is."""
    for weights in token_weights(model):
        weights.requires_grad_(False)


def input_table(model: nn.Module) -> Tensor:
    """Token embeddings, [V, D]."""
    weight = model.get_input_embeddings().weight  # type: ignore[operator]
    assert isinstance(weight, Tensor)
    return weight


def input_scale(model: nn.Module) -> float:
    """What a model multiplies its token embeddings by before the first layer: 1, or the root of the width (Gemma)."""
    return float(getattr(model.get_input_embeddings(), "scalar_embed_scale", 1.0))  # type: ignore[operator]


def output_table(model: nn.Module) -> Tensor:
    """Weights of the output head, [V, D]; the same object as `input_table` where they are tied."""
    weight = model.get_output_embeddings().weight  # type: ignore[operator]
    assert isinstance(weight, Tensor)
    return weight


def head_bias(model: nn.Module) -> Tensor | None:
    """What the output head adds to every logit, [V]; most models have none."""
    bias = getattr(model.get_output_embeddings(), "bias", None)  # type: ignore[operator]
    assert bias is None or isinstance(bias, Tensor)
    return bias


def token_weights(model: nn.Module) -> list[Tensor]:
    """All that has an entry for every token, each once: embeddings, the head's matrix and its bias, if any."""
    tables = {id(table): table for table in (input_table(model), output_table(model), head_bias(model))}
    return [table for table in tables.values() if table is not None]


def best_device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def move(model: nn.Module, device: torch.device | str) -> None:
    """Move a model in place, and give it the attention that is fastest there."""
    model.to(torch.device(device))
    set_attention(model, device)


def num_parameters(model: nn.Module) -> int:
    """Number of parameters, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def add_residual_dropout(model: PreTrainedModel, probability: float) -> None:
    """Drop parts of the embeddings and of every residual branch while training; 0 changes nothing."""
    # Hugging Face decoders have attention dropout only, which does little for models this small and forces a slow
    # attention path on CPUs.
    if probability <= 0.0:
        return

    def drop(module: nn.Module, _: Any, output: Any) -> Any:
        if not module.training:
            return output
        if isinstance(output, tuple):
            return (nn.functional.dropout(output[0], probability), *output[1:])
        return nn.functional.dropout(output, probability)

    for layer in trunk(model).layers:
        layer.self_attn.register_forward_hook(drop)
        layer.mlp.register_forward_hook(drop)
    trunk(model).embed_tokens.register_forward_hook(drop)


def _load_pretrained(name: str) -> PreTrainedModel:
    try:
        return open_model(name, use_safetensors=True)
    except NotOpenedError as reason:
        raise not_loadable(name, str(reason)) from None


def _random_weights(name: str, seed: int) -> PreTrainedModel:
    try:
        config = AutoConfig.from_pretrained(name)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        return model
    except Exception as error:  # foreign files make it stumble anywhere
        raise not_loadable(name, reason_of(error)) from None


def _extend_embeddings(model: PreTrainedModel, size: int) -> None:
    # New rows start at the mean of the old ones: neither more nor less likely than the average token.
    old = input_table(model).shape[0]
    model.resize_token_embeddings(size, mean_resizing=False)
    with torch.no_grad():
        for weights in token_weights(model):
            weights[old:] = weights[:old].mean(0)


def _add_lora(model: PreTrainedModel, rank: int, seed: int) -> None:
    peft = require("peft", extra="lora")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(
            peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"), model
        )
    for weights in token_weights(model):
        weights.requires_grad_(True)


def _merge_lora(model: Any) -> None:
    adapters = [(name, module) for name, module in model.named_modules() if hasattr(module, "get_base_layer")]
    for name, module in adapters:
        module.merge()
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module.get_base_layer())
