"""Checkpoints that hold everything a training run needs to go on exactly: safetensors and JSON, never a pickle."""

import shutil
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lasar.artifacts import read_json, write_json
from lasar.errors import ArtifactError
from lasar.ranks import ranks
from lasar.training.shards import copy_into, part_of, put, trained, whole

EVERY_SECONDS = 30.0
_BEGIN_ANEW = "delete that folder to train the stage from its beginning"
SHARE = 0.05  # of the time goes into checkpoints at most, where writing one takes long


class Pace:
    """When the next checkpoint is due."""

    def __init__(self) -> None:
        """The first is due after `EVERY_SECONDS`."""
        self._since, self._pause = time.monotonic(), EVERY_SECONDS

    def due(self) -> bool:
        """Whether it is time."""
        return time.monotonic() - self._since >= self._pause

    def saved(self, began: float) -> None:
        """Take note of a checkpoint that was begun at a time of `time.monotonic`."""
        self._since = time.monotonic()
        self._pause = max(EVERY_SECONDS, (self._since - began) / SHARE)


def save_checkpoint(folder: Path, *, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Replace `folder` by a new checkpoint; a kill at any moment leaves the old one or the new one."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file(
        {name: tensor.detach().contiguous() for name, tensor in tensors.items()},
        partial / "state.safetensors",
    )
    write_json(partial / "facts.json", facts)
    retired = folder.with_name(folder.name + ".retired")
    if folder.exists():  # else what a kill between two renames retired is the latest one
        shutil.rmtree(retired, ignore_errors=True)
        folder.rename(retired)
    partial.rename(folder)
    shutil.rmtree(retired, ignore_errors=True)


def load_checkpoint(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Read the latest complete checkpoint, or None if there is none; moves nothing, several processes may read.

    Raises:
        ArtifactError: it is damaged.
    """
    for latest in (folder, folder.with_name(folder.name + ".retired")):
        if latest.exists():
            try:
                return load_file(latest / "state.safetensors"), read_json(latest / "facts.json")
            except (OSError, SafetensorError) as error:
                raise ArtifactError(f"{latest}: a damaged checkpoint ({error}); {_BEGIN_ANEW}") from None
    return None


def save_training(
    folder: Path,
    facts: dict[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    **copies: dict[str, Tensor],
) -> None:
    """Save trained weights, named copies of them and the optimizer's state, whole; every process has to call it."""
    named = trained(model)
    tensors: dict[str, Tensor] = {f"model.{name}": parameter for name, parameter in named}
    for kind, values in copies.items():
        tensors |= {f"{kind}.{name}": value for name, value in values.items()}
    for name, parameter in named:
        slots = optimizer.state.get(parameter, {})
        tensors |= {f"optimizer.{slot}.{name}": torch.as_tensor(value) for slot, value in slots.items()}
    kept = {}
    for key, tensor in tensors.items():  # one by one: a device need not hold all of what is in parts
        value = whole(tensor.detach())
        if not ranks().rank:
            kept[key] = value.cpu()
    if not ranks().rank:
        save_checkpoint(folder, tensors=kept, facts=facts)


def load_training(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, **copies: dict[str, Tensor]
) -> dict[str, Any] | None:
    """Go on from what `save_training` wrote, in whatever number of processes; the facts, None if there are none.

    Raises:
        ArtifactError: the checkpoint is damaged, or of another model or version.
    """
    loaded = load_checkpoint(folder)
    if loaded is None:
        return None
    tensors, facts = loaded
    named = dict(trained(model))
    wanted = [f"model.{name}" for name in named]
    wanted += [f"{kind}.{name}" for kind, values in copies.items() for name in values]
    missing = [key for key in wanted if key not in tensors]
    if missing:
        raise ArtifactError(
            f"{folder}: a checkpoint of another model or version, without {missing[0]} and {len(missing) - 1} others; "
            f"{_BEGIN_ANEW}"
        )
    copy_into(model, {name: tensors[f"model.{name}"] for name in named})
    for kind, values in copies.items():
        for name, value in values.items():
            put(value, tensors[f"{kind}.{name}"])
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, slot, name = key.split(".", 2)
            optimizer.state[named[name]][slot] = part_of(value, like=named[name])
    return facts
