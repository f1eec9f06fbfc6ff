"""Several processes of one command, as `torchrun` starts them: who is who, and what they tell each other.

A stage whose Config says `in_ranks` is run by all of them; the others by the first, while the rest wait. What a stage
computes does not depend on how many there are: batches, their dropout and their order are functions of the seed, and
sums over batches or users are sums over processes, too.
"""

import copy
import os
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lasar.errors import ArtifactError, ConfigError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_PATIENCE = timedelta(days=1)  # the first process may be at work for hours while the others wait


@dataclass(frozen=True)
class Ranks:
    """This process among those of its command.

    Attributes:
        rank: its number; the first, 0, writes.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1


_joined = Ranks()


def ranks() -> Ranks:
    """This process among those of its command; alone until `join`."""
    return _joined


@contextmanager
def join(arguments: Sequence[str], *, shared: Collection[str]) -> Iterator[None]:
    """Meet the other processes that `torchrun` has started, if it has; only the first goes on printing.

    Args:
        arguments: of the command.
        shared: the commands that several processes do together.

    Raises:
        ConfigError: what `torchrun` says about them cannot be, or each would do the same.
    """
    global _joined  # a process has one place among others
    size = _number("WORLD_SIZE", 1)
    if size == 1:
        yield
        return
    command = command_of(arguments)
    if command not in shared:
        raise ConfigError(
            f"torchrun: {size} processes would each do `lasar {command}` of their own; start it without torchrun "
            f"(what they do together: {', '.join(shared)})"
        )
    import torch
    from torch import distributed

    if torch.cuda.is_available():
        torch.cuda.set_device(_number("LOCAL_RANK", 0) % torch.cuda.device_count())
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    distributed.init_process_group(backend, timeout=_PATIENCE)
    _joined = Ranks(distributed.get_rank(), size)
    stdout = sys.stdout
    try:
        with open(os.devnull, "w", encoding="utf-8") as nothing:
            sys.stdout = stdout if _joined.rank == 0 else nothing
            yield
    finally:
        sys.stdout = stdout
        _joined = Ranks()
        distributed.destroy_process_group()


@contextmanager
def alone() -> Iterator[None]:
    """Inside, this process does what the others wait for: there is nobody to share with."""
    global _joined
    joined, _joined = _joined, Ranks()
    try:
        yield
    finally:
        _joined = joined


def command_of(arguments: Sequence[str]) -> str:
    """The first of a command line's arguments that is no option."""
    return next((argument for argument in arguments if not argument.startswith("-")), "")


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdigit():
        raise ConfigError(f"environment variable {name}={text!r}: not a number; start with torchrun")
    return int(text)


def tell(value: object = None) -> Any:
    """What the first process passes here, in all of them; every process has to call it.

    Raises:
        ArtifactError: another process has ended.
    """
    if _joined.size == 1:
        return value
    from torch import distributed

    box = [value]
    with others_alive():
        distributed.broadcast_object_list(box, src=0)
    return box[0]


@contextmanager
def others_alive() -> Iterator[None]:
    """Around what processes do together: a failure of the process group, which speaks of sockets, gets a message.

    Raises:
        ArtifactError: another process has ended.
    """
    try:
        yield
    except RuntimeError as error:
        from torch import distributed

        if not isinstance(error, distributed.DistError) and "gloo" not in str(error):
            raise  # ours: memory, a shape
        raise ArtifactError("another process of this command failed; its message says why") from None


def meet() -> None:
    """Wait until every process has come here.

    Raises:
        ArtifactError: another process has ended.
    """
    if _joined.size > 1:
        from torch import distributed

        with others_alive():
            distributed.barrier()


def add_up(tensor: "Tensor") -> "Tensor":
    """The sum over all processes, in place; every process has to call it.

    Raises:
        ArtifactError: another process has ended.
    """
    if _joined.size > 1:
        from torch import distributed

        with others_alive():
            distributed.all_reduce(tensor)
    return tensor


def share_of(count: int) -> NDArray[np.int64]:
    """Which of `count` things this process does: every `size`-th."""
    return np.arange(_joined.rank, count, _joined.size)


def gather(mine_n: NDArray[Any], count: int) -> NDArray[Any]:
    """The results of all `count` things, in order, of what every process computed for its `share_of` them."""
    if _joined.size == 1:
        return mine_n
    from torch import distributed

    parts: list[Any] = [None] * _joined.size
    with others_alive():
        distributed.all_gather_object(parts, mine_n)
    whole = np.empty((count, *mine_n.shape[1:]), dtype=mine_n.dtype)
    for rank, part in enumerate(parts):
        whole[rank :: _joined.size] = part
    return whole


def gather_all(mine: list[Any], *, device: "torch.device") -> list[Any]:
    """Things that were dealt out in turns, in their order, in every process.

    Args:
        mine: of this process.
        device: where their tensors belong, in this process; tensors travel by way of the CPU.
    """
    if _joined.size == 1:
        return mine
    from torch import distributed

    parts: list[Any] = [None] * _joined.size
    with others_alive():
        distributed.all_gather_object(parts, [moved(thing, "cpu") for thing in mine])
    count = sum(len(part) for part in parts)
    dealt = [parts[number % _joined.size][number // _joined.size] for number in range(count)]
    return [moved(thing, device) for thing in dealt]


def moved(thing: Any, device: "torch.device | str") -> Any:
    """A copy of a dataclass with its tensors, and those of dataclasses inside it, on a device."""
    import torch

    if isinstance(thing, torch.Tensor):
        return thing.to(device)
    if not is_dataclass(thing):
        return thing
    there = copy.copy(thing)
    for field in fields(thing):
        object.__setattr__(there, field.name, moved(getattr(thing, field.name), device))  # frozen ones, too
    return there
