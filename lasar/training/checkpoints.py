"""Checkpoints that hold everything a training run needs to go on exactly: safetensors and JSON, never a pickle."""

import shutil
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lasar.artifacts import read_json, write_json

EVERY_SECONDS = 30.0
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
    """Read the latest complete checkpoint, or None if there is none; moves nothing, several processes may read."""
    for latest in (folder, folder.with_name(folder.name + ".retired")):
        if latest.exists():
            return load_file(latest / "state.safetensors"), read_json(latest / "facts.json")
    return None


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as named tensors."""
    state = optimizer.state_dict()["state"]
    return {
        f"optimizer.{index}.{name}": torch.as_tensor(value)
        for index, slots in state.items()
        for name, value in slots.items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Inverse of `optimizer_tensors`."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".")
            state.setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
