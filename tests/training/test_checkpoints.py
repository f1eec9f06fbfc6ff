"""A checkpoint survives a kill between any two steps of its writing, and reading it moves nothing."""

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from lasar.errors import ArtifactError
from lasar.training.checkpoints import load_checkpoint, load_training, save_checkpoint, save_training


class KilledError(Exception):
    pass


def save(folder, number):
    save_checkpoint(folder, tensors={"weight": torch.full((2,), float(number))}, facts={"step": number})


def number_in(folder):
    tensors, facts = load_checkpoint(folder)
    assert tensors["weight"].tolist() == [facts["step"]] * 2
    return facts["step"]


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("first", range(1, 7))
@pytest.mark.parametrize("second", range(1, 7))
def test_a_kill_between_any_two_steps_leaves_the_old_or_the_new_one(tmp_path, monkeypatch, first, second):
    folder = tmp_path / "checkpoint"
    save(folder, 0)
    at_least = 0
    for number, after in ((1, first), (2, second)):
        steps = 0

        def counted(original, after=after):
            def step(*arguments, **options):
                nonlocal steps
                steps += 1
                if steps >= after:
                    raise KilledError
                return original(*arguments, **options)

            return step

        with monkeypatch.context() as patched:
            patched.setattr(Path, "rename", counted(Path.rename))
            patched.setattr(Path, "mkdir", counted(Path.mkdir))
            patched.setattr(shutil, "rmtree", counted(shutil.rmtree))
            try:
                save(folder, number)
            except KilledError:
                assert number_in(folder) in (at_least, number)
            else:
                assert number_in(folder) == number
        at_least = number_in(folder)
    save(folder, 3)
    assert number_in(folder) == 3


def test_reading_moves_nothing(tmp_path):
    folder = tmp_path / "checkpoint"
    save(folder, 4)
    folder.rename(tmp_path / "checkpoint.retired")  # as a kill between two renames leaves it
    before = files(tmp_path)
    assert number_in(folder) == 4
    assert files(tmp_path) == before


def test_nothing_is_none(tmp_path):
    assert load_checkpoint(tmp_path / "checkpoint") is None


def test_a_damaged_checkpoint_says_what_to_delete(tmp_path):
    folder = tmp_path / "checkpoint"
    save(folder, 4)
    (folder / "state.safetensors").write_bytes(b"oops")
    with pytest.raises(ArtifactError, match=r"checkpoint: a damaged checkpoint .*delete that folder"):
        load_checkpoint(folder)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    folder = tmp_path / "checkpoint"
    small, large = nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    save_training(folder, {"step": 1}, small, torch.optim.AdamW(small.parameters()))
    with pytest.raises(
        ArtifactError, match=r"another model or version, without model\.0\.weight and 3 others"
    ):
        load_training(folder, large, torch.optim.AdamW(large.parameters()))
