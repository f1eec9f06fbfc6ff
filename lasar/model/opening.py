"""A Hugging Face causal LM from its files, whole and in float32, or one line that says why not."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from lasar.errors import reason_of


class NotOpenedError(Exception):
    """Why a model cannot be opened, in one line; whoever asked knows what the user should do."""


def open_model(place: str, **where: Any) -> PreTrainedModel:
    """Read a model; what its files lack is an error, where transformers would fill it at random.

    Args:
        place: a folder or a hub id.
        where: more for `from_pretrained`, such as `local_files_only` or `gguf_file`.

    Raises:
        NotOpenedError: there is none, or it is damaged, incomplete or of an unknown kind.
    """
    try:
        opened: Any = AutoModelForCausalLM.from_pretrained(
            place, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True, **where
        )
    except Exception as error:  # foreign files make it stumble anywhere
        raise NotOpenedError(reason_of(error)) from None
    model, found = opened
    if found["mismatched_keys"]:
        name, stored, wanted = min(found["mismatched_keys"])
        raise NotOpenedError(
            f"its weights and its config.json do not agree: {name} is {list(stored)} and should be {list(wanted)}"
        )
    if found["missing_keys"]:
        raise NotOpenedError(f"its weights lack {min(found['missing_keys'])}")
    assert isinstance(model, PreTrainedModel)
    return model
