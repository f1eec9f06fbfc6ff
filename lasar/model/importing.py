"""A pre-trained language model as a plain folder that `sft.backbone` takes: from GGUF, or from another folder."""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel

from lasar.artifacts import file_sha256, permit_as, write_json
from lasar.errors import ConfigError, DataError, reason_of, require
from lasar.model.backbone import head_bias, input_table, num_parameters, output_table
from lasar.model.opening import open_model
from lasar.prompts.trimming import trim

FACTS_FILE = "import.json"
_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id")


def import_model(source: Path, out: Path, *, texts: Iterable[str] | None = None) -> dict[str, Any]:
    """Write a model folder: float32 safetensors, `config.json`, `tokenizer.json`, and what was done in `import.json`.

    Args:
        source: a `.gguf` file, or a folder with `config.json`, safetensors and `tokenizer.json`.
        out: the folder to write; it appears when it is complete.
        texts: keep only the tokens that these (and special tokens, and single bytes) need; None: all.

    Returns:
        What was done.

    Raises:
        ConfigError: `out` exists, or the tokenizer cannot be trimmed.
        DataError: the source cannot be read.
        MissingExtraError: GGUF without the package gguf.
    """
    if out.exists():
        raise ConfigError(f"{out}: is there already; choose another folder, or remove it")
    model, tokenizer = _open(source)
    facts: dict[str, Any] = {
        "source": source.name, "sha256": file_sha256(source) if source.is_file() else None,
        "architecture": type(model).__name__, "tokens_before": len(input_table(model)),
        "parameters_before": num_parameters(model),
    }  # fmt: skip
    if texts is not None:
        texts = list(texts)
        trimmed = trim(tokenizer, texts, name=str(source))
        tokenizer = trimmed.tokenizer
        if (last := trimmed.old_ids[-1]) >= facts["tokens_before"]:
            raise DataError(
                f"{source}: its tokenizer has a token {last} and its model {facts['tokens_before']:,} rows; give the "
                "tokenizer.json that belongs to the model"
            )
        keep_rows(model, torch.from_numpy(trimmed.old_ids))
        facts["texts"] = len(texts)
        facts["texts_sha256"] = hashlib.sha256("\0".join(texts).encode()).hexdigest()
    facts |= {"tokens": len(input_table(model)), "parameters": num_parameters(model)}
    if texts is not None:
        facts["old_ids"] = trimmed.old_ids.tolist()  # of the tokens that were kept, by new id
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
        partial = Path(scratch) / "model"
        model.save_pretrained(partial, safe_serialization=True)
        tokenizer.save(str(partial / "tokenizer.json"))
        write_json(partial / FACTS_FILE, facts)
        permit_as(partial / FACTS_FILE)
        partial.rename(out)
    return facts


def keep_rows(model: PreTrainedModel, ids_V: torch.Tensor) -> None:
    """Leave a model with some of its tokens, numbered anew in the order given.

    Args:
        model: changed in place; tied tables stay tied.
        ids_V: old token ids.
    """
    before, after = input_table(model), output_table(model)
    own: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    own.weight = nn.Parameter(before.detach()[ids_V].clone())
    head.weight = own.weight if after is before else nn.Parameter(after.detach()[ids_V].clone())
    if (bias := head_bias(model)) is not None:
        head.bias = nn.Parameter(bias.detach()[ids_V].clone())
    own.num_embeddings = head.out_features = len(ids_V)
    new_id = {old: new for new, old in enumerate(ids_V.tolist())}
    for config in (model.config, model.generation_config):
        for name in _SPECIAL:
            old = getattr(config, name, None)
            if isinstance(old, int):
                setattr(config, name, new_id.get(old))
            elif isinstance(old, list):
                setattr(config, name, [new_id[i] for i in old if i in new_id] or None)
    model.config.get_text_config().vocab_size = len(ids_V)


def _open(source: Path) -> tuple[PreTrainedModel, Tokenizer]:
    if not source.exists():
        raise DataError(f"{source}: no such file or folder")
    if source.suffix == ".gguf":
        return _open_gguf(source)
    if not (source / "config.json").is_file():
        raise DataError(f"{source}: neither a .gguf file nor a model folder (no config.json)")
    if not (source / "tokenizer.json").is_file():
        raise DataError(f"{source}: has no tokenizer.json; write one with AutoTokenizer.save_pretrained")
    try:
        model = open_model(str(source), local_files_only=True, use_safetensors=True)
        return model, Tokenizer.from_file(str(source / "tokenizer.json"))
    except Exception as error:  # tokenizers raises bare Exception
        raise DataError(f"{source}: cannot be opened: {reason_of(error)}; get it again") from None


def _open_gguf(source: Path) -> tuple[PreTrainedModel, Tokenizer]:
    for package in ("gguf", "accelerate"):
        require(package, extra="gguf")
    place: dict[str, Any] = {"gguf_file": source.name, "local_files_only": True}
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.parent, **place).backend_tokenizer
        model = open_model(str(source.parent), **place)
    except Exception as error:  # whatever the reader stumbles over in a damaged file
        raise DataError(f"{source}: cannot be opened: {reason_of(error)}; get it again") from None
    # The weights are float32 now, but transformers keeps in mind that they were not, and would refuse to save them.
    loaded: Any = model
    loaded.hf_quantizer, loaded.is_quantized = None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    assert isinstance(tokenizer, Tokenizer)
    return model, tokenizer
