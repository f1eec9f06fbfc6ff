"""Layers in parts: what two processes make of them, and that one process leaves them alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lasar.training.shards import clip_gradients, copies_of, copy_into, divided, is_divided, local, whole

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("layers", ["all", "some", "frozen"])
def test_two_processes_with_parts_are_one_with_all(tmp_path, layers):
    script = Path(__file__).with_name("in_parts.py")
    words = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script),
        str(tmp_path), layers,
    ]  # fmt: skip
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, capture_output=True, text=True, timeout=100, env=env)
    assert done.returncode == 0, done.stderr[-4000:]
    assert (tmp_path / "model" / "model.safetensors").is_file()


def test_one_process_has_it_all():
    model = torch.nn.Linear(3, 2)
    with divided(model, True):
        assert not is_divided(model)
        assert local(model.weight) is model.weight is whole(model.weight)
    values = copies_of(model)
    torch.nn.init.zeros_(model.weight)
    copy_into(model, values)
    assert torch.equal(model.weight, values["weight"])
    model(torch.full((1, 3), 100.0)).sum().backward()
    clip_gradients(list(model.parameters()), 1.0)
    norm = torch.cat([parameter.grad.flatten() for parameter in model.parameters()]).norm()
    torch.testing.assert_close(norm, torch.tensor(1.0))
