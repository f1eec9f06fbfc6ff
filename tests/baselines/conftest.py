"""Tiny versions of the trained baselines, and shops with a planted rule."""

import numpy as np
import pytest
import torch

from lasar.baselines.trained import Trained
from lasar.data.interactions import TrainSequence
from lasar.training.fit import FitPlan

NUM_ITEMS = 8
CODES_IL = np.stack([np.arange(NUM_ITEMS) // 3, np.arange(NUM_ITEMS) % 3], axis=1).astype(np.int32)
ENCODER = {"max_history": 6, "hidden_size": 32, "num_layers": 1, "num_heads": 2, "dropout": 0.0}
REASONING = {
    "temperature": 0.5, "num_steps": 2, "diversity_weight": 0.02, "temperature_scale": 2.0,
    "contrastive_weight": 0.1, "noise": 0.01,
}  # fmt: skip
SETTINGS = {
    "gru4rec": {"max_history": 6, "hidden_size": 32, "num_layers": 1, "dropout": 0.0},
    "sasrec": ENCODER,
    "rearec_erl": ENCODER | REASONING | {"learning": "erl"},
    "rearec_prl": ENCODER | REASONING | {"learning": "prl"},
    "tiger": ENCODER | {"num_levels": 2, "codebook_size": 3, "head_size": 16, "feed_size": 64},
}


def make(name, *, epochs=20, learning_rate=1e-2, seed=0, batch_tokens=256, **options):
    """An unfitted baseline."""
    given = {"codes_IL": torch.from_numpy(CODES_IL)} if name == "tiger" else None
    plan = FitPlan(epochs=epochs, learning_rate=learning_rate, precision="fp32", seed=seed)
    return Trained(
        name.partition("_")[0], settings=SETTINGS[name], plan=plan, batch_tokens=batch_tokens, given=given, **options
    )  # fmt: skip


def walks(rule, *, num_users=60, length=6, seed=0, num_random=1):
    """Histories that start with random items and then follow `rule(the one before, the last)`."""
    rng = np.random.default_rng(seed)
    rows = []
    for user in range(num_users):
        items = rng.integers(NUM_ITEMS, size=num_random).tolist()
        while len(items) < length:
            items.append(rule(items[-2] if len(items) > 1 else None, items[-1]))
        rows.append(TrainSequence(user, np.array(items, np.int32), np.arange(length, dtype=np.int32)))
    return rows


@pytest.fixture(params=sorted(SETTINGS))
def name(request):
    """Every trained baseline in turn."""
    return request.param
