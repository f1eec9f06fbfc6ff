import numpy as np
import pytest
import torch
from torch import nn

from lasar.sid.quality import entropy_bits
from lasar.sid.rqvae import ResidualVae, quantize_straight_through

SMALL = {"num_levels": 2, "codebook_size": 8, "latent_width": 4, "hidden_widths": (16,), "batch_size": 64}


@pytest.fixture(scope="module")
def x():
    """Vectors around 8 points in 10 dimensions."""
    rng = np.random.default_rng(0)
    points = rng.normal(size=(8, 10)) * 3 + 1
    return (points[np.arange(256) % 8] + rng.normal(size=(256, 10)) * 0.05).astype(np.float32)


@pytest.fixture(scope="module")
def fitted(x):
    quantizer = ResidualVae(**SMALL, num_epochs=120, learning_rate=5e-3)
    quantizer.fit(x)
    return quantizer


def test_planted_clusters_get_their_own_first_code_and_are_reconstructed(x, fitted):
    codes = fitted.encode(x)
    clusters = np.arange(256) % 8
    pairs = {*zip(clusters.tolist(), (codes[:, 0] * 8 + codes[:, 1]).tolist(), strict=True)}
    assert len({code for _, code in pairs}) == len(pairs)  # no ID covers two clusters
    error = ((x - fitted.decode(codes)) ** 2).sum() / ((x - x.mean(axis=0)) ** 2).sum()
    assert error < 0.05


def test_codes_are_the_least_level_costs(x, fitted):
    codes = fitted.encode(x)
    for level in range(2):
        costs = fitted.level_costs(x, codes[:, :level])
        assert costs.shape == (256, 8)
        assert np.array_equal(costs.argmin(axis=1), codes[:, level])


def test_one_seed_one_result_and_the_global_generator_is_untouched(x):
    states = []
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    for seed in (0, 0, 1):
        quantizer = ResidualVae(**SMALL, num_epochs=3, seed=seed)
        quantizer.fit(x)
        states.append(quantizer.state()[1]["encoder.0.weight"])
    assert np.array_equal(states[0], states[1])
    assert not np.array_equal(states[0], states[2])
    assert torch.equal(torch.random.get_rng_state(), before)


def test_state_restores_to_the_same_function(x, fitted):
    arguments, arrays = fitted.state()
    other = ResidualVae(**arguments)
    other.restore(arrays)
    codes = fitted.encode(x)
    assert np.array_equal(other.encode(x), codes)
    assert np.array_equal(other.decode(codes), fitted.decode(codes))


def test_straight_through_gradient_and_losses_by_hand():
    z = torch.tensor([[1.0, 0.0]], requires_grad=True)
    codebooks = torch.tensor([[[0.8, 0.0], [-1.0, 0.0]], [[0.0, 0.0], [0.1, 0.0]]], requires_grad=True)
    used = torch.zeros(2, 2, dtype=torch.bool)
    quantized, loss = quantize_straight_through(z, codebooks, 0.25, used)
    assert quantized.tolist()[0] == pytest.approx([0.9, 0.0])
    # Residuals 0.2 and 0.1 in one of two dimensions; codebook term weight 1, commitment 0.25.
    assert loss.item() == pytest.approx(1.25 * (0.2**2 / 2 + 0.1**2 / 2))
    assert used.tolist() == [[True, False], [False, True]]
    (grad,) = torch.autograd.grad(quantized.sum(), z, retain_graph=True)
    assert grad.tolist() == [[1.0, 1.0]]
    grad_z, grad_codebooks = torch.autograd.grad(loss, [z, codebooks])
    assert grad_z[0, 0].item() == pytest.approx(0.25 * (0.2 + 0.1))
    assert grad_codebooks[0, 0, 0].item() == pytest.approx(-0.2)
    assert grad_codebooks[0, 1].tolist() == [0, 0]


def test_dead_codes_are_revived(x):
    quantizer = ResidualVae(**SMALL, num_epochs=1)
    quantizer.fit(x)
    codebooks = nn.Parameter(torch.zeros(2, 8, 4))
    with torch.no_grad():
        codebooks[:, 1:] = 1000  # nobody's nearest
    used = torch.zeros(2, 8, dtype=torch.bool)
    used[:, 0] = True
    quantizer._revive(torch.from_numpy(x), codebooks, used)
    assert codebooks.abs().max() < 100
    assert torch.equal(codebooks[:, 0], torch.zeros(2, 4))


def test_no_collapse_and_balanced_evens_codes_out():
    x = np.random.default_rng(1).normal(size=(512, 6)).astype(np.float32) ** 3
    bits = {}
    for balanced in (False, True):
        quantizer = ResidualVae(**SMALL, num_epochs=20, balanced=balanced)
        quantizer.fit(x)
        codes = quantizer.encode(x)
        bits[balanced] = min(entropy_bits(column[:, None]) for column in codes.T)
    assert bits[False] > 1
    assert bits[True] > max(2.8, bits[False])
