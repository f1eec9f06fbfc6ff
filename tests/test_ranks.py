"""One process among others: what travels, and what a process alone does."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from lasar.errors import ArtifactError, ConfigError
from lasar.ranks import Ranks, add_up, gather, gather_all, join, moved, others_alive, ranks, share_of, tell


@dataclass(frozen=True)
class Inner:
    x: torch.Tensor
    name: str


@dataclass
class Outer:
    inner: Inner
    y: torch.Tensor
    none: torch.Tensor | None = None


def test_every_tensor_of_nested_dataclasses_is_moved_and_nothing_else_changes():
    thing = Outer(inner=Inner(x=torch.ones(2), name="a"), y=torch.zeros(3))
    there = moved(thing, "meta")
    assert (there.inner.x.device.type, there.y.device.type) == ("meta", "meta")
    assert (there.inner.name, there.none) == ("a", None)
    assert (thing.inner.x.device.type, thing.y.device.type) == ("cpu", "cpu")


def test_a_process_alone_has_everything():
    with join(["recommend"], shared=["run"]):
        assert ranks() == Ranks(0, 1)
    assert share_of(3).tolist() == [0, 1, 2]
    assert gather(np.arange(3), 3).tolist() == [0, 1, 2]
    assert gather_all([1, 2], device=torch.device("cpu")) == [1, 2]
    assert add_up(torch.ones(2)).tolist() == [1, 1]
    assert tell("x") == "x"


def test_a_world_that_is_no_number_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(ConfigError, match="WORLD_SIZE='two'"), join(["run"], shared=["run"]):
        pass


@pytest.mark.parametrize("arguments", [["serve", "runs/demo"], ["--version"], []])
def test_several_processes_do_not_each_do_what_one_should(monkeypatch, arguments):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with (
        pytest.raises(ConfigError, match="2 processes would each do"),
        join(arguments, shared=["run", "sft"]),
    ):
        pass


@pytest.mark.parametrize(
    "failure",
    [
        RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:537] Connection reset by peer"),
        torch.distributed.DistBackendError("NCCL error: remote process exited"),
    ],
)
def test_a_lost_process_is_told_without_sockets(failure):
    with pytest.raises(ArtifactError, match="another process of this command failed"), others_alive():
        raise failure


@pytest.mark.parametrize("failure", [RuntimeError("size mismatch"), torch.OutOfMemoryError("of the GPU")])
def test_a_failure_of_our_own_keeps_its_words(failure):
    with pytest.raises(RuntimeError) as raised, others_alive():
        raise failure
    assert raised.value is failure
