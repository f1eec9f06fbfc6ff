"""Sizes of the backbones that are trained from scratch (Qwen3 architecture)."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from lasar.errors import ConfigError, nearest

_MODELS = "models"
_FROM_GGUF = (
    "make one of a GGUF file: lasar data get smollm2-135m-instruct, then lasar data import-model FILE.gguf FOLDER "
    "--texts-of RUN"
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
    if path.suffix == ".gguf" and not path.exists():
        raise ConfigError(f"backbone {name!r}: no such file; {_FROM_GGUF}")
    gguf = [path] if path.suffix == ".gguf" else sorted(path.glob("*.gguf"))
    if (path / "config.json").is_file():
        return
    if gguf:
        raise ConfigError(
            f"backbone {name!r}: a GGUF file becomes a model folder first: lasar data import-model {gguf[0]} "
            f"{_MODELS}/NAME --texts-of RUN (a run up to rationalize: lasar run RECIPE --until rationalize); then "
            f"sft.backbone={_MODELS}/NAME"
        )
    if path.is_dir():
        raise ConfigError(
            f"backbone {name!r}: has no config.json; a model folder is config.json, model.safetensors and "
            f"tokenizer.json, as on its hub page; or {_FROM_GGUF}"
        )
    looks_like_path = first in (".", "..", "", "~", _MODELS) or Path(first).is_dir() or name.count("/") > 1
    if "/" in name and not looks_like_path:
        return
    what = "no such folder" if looks_like_path else f"no such preset or folder{nearest(name, PRESETS)}"
    raise ConfigError(
        f"backbone {name!r}: {what}; presets: {', '.join(PRESETS)}; a hub id looks like owner/name; or put a model's "
        f"config.json, model.safetensors and tokenizer.json into a folder, or {_FROM_GGUF}"
    )


def not_loadable(name: str, reason: str) -> ConfigError:
    """What to say of a folder or a hub id that `check_backbone` let pass and that did not load."""
    if Path(name).is_dir():
        return ConfigError(
            f"backbone {name!r}: this folder holds no causal LM that loads: {reason}; get its files again"
        )
    from huggingface_hub import is_offline_mode

    folder = f"{_MODELS}/{Path(name).name}"
    if is_offline_mode():
        reason = "HF_HUB_OFFLINE is set, so no hub was asked, and its cache does not hold it"
    return ConfigError(
        f"backbone {name!r}: not a folder here, and not loaded from the hub ({reason}); download its config.json, "
        f"tokenizer.json and all *.safetensors into {folder} (where there is a network: hf download {name} --local-dir "
        f"{folder}) and set sft.backbone={folder}"
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
