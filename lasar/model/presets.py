"""Sizes of the backbones that are trained from scratch (Qwen3 architecture)."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from lasar.errors import ConfigError, nearest

_MODELS = "models"
HOW_TO_GET = (
    "a pre-trained model is a folder of config.json, model.safetensors and tokenizer.json, or made of a GGUF file: "
    "lasar data get smollm2-135m-instruct, then lasar data import-model FILE.gguf FOLDER --texts-of RUN"
)

CodeStart = Literal["vectors", "text", "mean", "random"]

PRESETS: Mapping[str, Mapping[str, int]] = MappingProxyType(
    {
        "tiny": {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 64,
        },
        "500k": {
            "hidden_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 256,
        },
        "1m": {
            "hidden_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "intermediate_size": 512,
        },
        "4m": {
            "hidden_size": 256,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "intermediate_size": 768,
        },
        "12m": {
            "hidden_size": 384,
            "num_hidden_layers": 6,
            "num_attention_heads": 6,
            "intermediate_size": 1152,
        },
    }
)


def check_backbone(name: str) -> None:
    """Refuse at once what can be neither a preset, a folder nor a hub id.

    Raises:
        ConfigError: no such preset or folder.
    """
    if name in PRESETS:
        return
    path, first = Path(name), name.partition("/")[0]
    gguf = [path] if path.suffix == ".gguf" else sorted(path.glob("*.gguf"))
    if gguf and not (path / "config.json").is_file():
        raise ConfigError(
            f"backbone {name!r}: a GGUF file becomes a model folder first: lasar data import-model {gguf[0]} "
            f"{_MODELS}/NAME --texts-of RUN (a run up to rationalize: lasar run RECIPE --until rationalize); then "
            f"sft.backbone={_MODELS}/NAME"
        )
    looks_like_path = first in (".", "..", "", "~", _MODELS) or Path(first).is_dir() or name.count("/") > 1
    if path.is_dir() or ("/" in name and not looks_like_path):
        return
    what = "no such folder" if looks_like_path else f"no such preset or folder{nearest(name, PRESETS)}"
    raise ConfigError(
        f"backbone {name!r}: {what}; presets: {', '.join(PRESETS)}; a hub id looks like owner/name; {HOW_TO_GET}"
    )


def check_start(start: CodeStart, name: str) -> None:
    """Refuse a start of codes that this backbone cannot have.

    Raises:
        ConfigError: titles or old tokens that a preset does not know, or random rows in a pre-trained model.
    """
    preset = name in PRESETS
    if start in (("text", "mean") if preset else ("random",)):
        kind, usual = (
            ("preset", "vectors or random") if preset else ("pre-trained model", "vectors, text or mean")
        )
        raise ConfigError(f"sft.weights.code_init={start}: {name!r} is a {kind}; set {usual}")
