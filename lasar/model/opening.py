"""A Hugging Face causal LM from its files, whole and in float32, or one line that says why not."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from lasar.errors import reason_of

_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")  # what decoders call them


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
        with _quiet():
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
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    for name in sorted(found["unexpected_keys"]):
        if layers is not None and (layer_of(name) or 0) >= layers:
            raise NotOpenedError(f"its config.json says {layers} layers, and its weights hold {name}")
    for name, tensor in model.state_dict().items():
        if not tensor.isfinite().all():
            raise NotOpenedError(f"its weights are damaged: {name} holds what is no finite number")
    return model


def layer_of(name: str) -> int | None:
    """Which decoder layer a weight is of, by its name."""
    found = _LAYER.search(name)
    return int(found[1]) if found else None


@contextmanager
def _quiet() -> Iterator[None]:
    """What transformers says of a model's files beside, in tables, is said here in one line or not at all."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
