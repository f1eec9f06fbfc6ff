"""FlexAttention's block masks against SDPA's explicit ones: same states, same losses, same gradients.

On a CPU FlexAttention runs as plain arithmetic (uncompiled), which tests the masks and all that carries them; the
compiled CPU kernel is a slow test, the CUDA kernels run where there is a GPU.
"""

from contextlib import contextmanager

import numpy as np
import pytest
import torch
import transformers.integrations.flex_attention as integration
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.attention import flex_attention as flex
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from lasar.data.interactions import TrainSequence
from lasar.decoding.trie import Trie
from lasar.model.backbone import build_preset, move, trunk
from lasar.model.latent import finish_reasoning, reason, start_reasoning
from lasar.model.prompt import encode_prompts
from lasar.prompts.batches import epoch_batches
from lasar.prompts.vocabulary import Vocabulary
from lasar.training.losses import tree_loss

VOCABULARY = Vocabulary(num_levels=3, codebook_size=6, orders=True)
NUM_ITEMS = 20
SMALL = {
    "vocab_size": VOCABULARY.size, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2,
}  # fmt: skip
BACKENDS = ("sdpa", "flex_attention")


def models():
    torch.manual_seed(0)
    built = {
        "preset": build_preset("tiny", vocabulary=VOCABULARY, seed=1),
        "qwen2": Qwen2ForCausalLM(Qwen2Config(**SMALL, num_attention_heads=4, num_key_value_heads=2)),
        # A number of heads that is no power of two takes another way to grouped keys in transformers.
        "llama": LlamaForCausalLM(
            LlamaConfig(**(SMALL | {"hidden_size": 96}), num_attention_heads=6, num_key_value_heads=3)
        ),
    }
    for model in built.values():
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim >= 2:
                    parameter.mul_(4.0)
    return {name: model.eval() for name, model in built.items()}


MODELS = models()
EACH_MODEL = pytest.mark.parametrize("name", list(MODELS))
QUIET = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # of torch's compiler
ON_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@contextmanager
def using(model, backend, device="cpu"):
    model.to(device)
    model.set_attn_implementation(backend)
    try:
        yield model
    finally:
        model.to("cpu")
        model.set_attn_implementation("sdpa")


@pytest.fixture
def uncompiled(monkeypatch):
    def plain(query, key, value, training=False, **options):
        return flex.flex_attention(query, key, value, **options)

    monkeypatch.setattr(integration, "compile_friendly_flex_attention", plain)
    monkeypatch.setattr(flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)


@pytest.fixture
def uncompiled_with_gradient(uncompiled, monkeypatch):
    # Torch refuses FlexAttention's gradient on CPUs for want of a kernel; its plain arithmetic has one.
    monkeypatch.setattr(flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", False)
    monkeypatch.setattr(flex, "_validate_device", lambda *_: None)


@st.composite
def growths(draw):
    """Trunk lengths and, call by call, parents: trunk tokens, earlier calls' tokens or this call's."""
    batch, width = draw(st.integers(1, 3)), draw(st.sampled_from([3, 8, 131]))
    lengths = [draw(st.integers(1, width)) for _ in range(batch)]
    calls, size = [], width
    for _ in range(draw(st.integers(1, 3))):
        count = draw(st.integers(1, 5))
        calls.append([
            [draw(st.sampled_from([*range(length), *range(width, size + q)])) for q in range(count)]
            for length in lengths
        ])  # fmt: skip
        size += count
    return lengths, width, calls, draw(st.integers(0, 99))


def grown(model, growth, device="cpu"):
    """Hidden states of everything that hangs off the prompts, and the prompts' last ones."""
    lengths, width, calls, seed = growth
    rng = torch.Generator().manual_seed(seed)

    def tokens(count):
        return torch.randint(1, VOCABULARY.size, (len(lengths), count), generator=rng).to(device)

    prefix = encode_prompts(model, tokens(width), torch.tensor(lengths, device=device))
    states = [prefix.hidden_B1D]
    for rows in calls:
        parents = torch.tensor(rows, device=device)
        states.append(prefix.grow(parents, input_ids=tokens(parents.shape[1]))[0])
    return torch.cat(states, dim=1)


def reasoned(model, device="cpu"):
    prefix = encode_prompts(
        model, torch.tensor([[1, 9, 12, 7], [1, 8, 0, 0]], device=device), torch.tensor([4, 2], device=device)
    )
    h0, start = start_reasoning(prefix, torch.tensor([[0, 3], [1, 1]], device=device), vocabulary=VOCABULARY)
    latents = reason(prefix, h0, start, num_steps=3)
    depths = torch.tensor([[3, 1], [0, 2]], device=device)
    hidden, _ = finish_reasoning(prefix, latents.tips_BP(depths), vocabulary=VOCABULARY)
    return hidden


def losses(model, *, branches, device="cpu"):
    rng = np.random.default_rng(0)
    codes = np.stack(np.unravel_index(rng.choice(6**3, NUM_ITEMS, replace=False), (6, 6, 6)), axis=1)
    vocabulary = Vocabulary(num_levels=3, codebook_size=6, orders=branches)
    sequences = [
        TrainSequence(user, rng.integers(0, NUM_ITEMS, n).astype(np.int32), np.arange(n, dtype=np.int32) // 2)
        for user, n in enumerate((1, 4, 9, 40))
    ]
    batches = epoch_batches(
        sequences, vocabulary.item_tokens(codes.astype(np.int32)), vocabulary=vocabulary,
        batch_tokens=256, train_targets="all", seed=0, epoch=0,
    )  # fmt: skip
    trie = Trie(codes.astype(np.int32), device=device)
    assert bool(batches[0].parents_BM.shape[1]) == branches
    return torch.stack([tree_loss(model, batch, vocabulary=vocabulary, trie=trie).total for batch in batches])


def gradients(model, compute):
    model.zero_grad()
    result = compute(model)
    weights = torch.randn(result.shape, generator=torch.Generator().manual_seed(0)).to(result.device)
    (result * weights).sum().backward()
    found = {n: p.grad.clone().cpu() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def both(model, compute, device="cpu"):
    with torch.no_grad():
        results = []
        for backend in BACKENDS:
            with using(model, backend, device):
                results.append(compute(model).cpu())
    return results


def assert_same(model, compute, device="cpu", tolerance=1e-5):
    explicit, block = both(model, compute, device)
    torch.testing.assert_close(block, explicit, atol=tolerance, rtol=tolerance)


def assert_same_gradients(model, compute, device="cpu"):
    found = []
    for backend in BACKENDS:
        with using(model, backend, device):
            found.append(gradients(model, compute))
    explicit, block = found
    assert explicit.keys() == block.keys() != set()
    for n, gradient in explicit.items():
        scale = gradient.abs().max()
        torch.testing.assert_close(block[n] / scale, gradient / scale, atol=1e-4, rtol=1e-4)


COMPUTATIONS = {
    "latent loop": reasoned,
    "loss of branches": lambda model, **device: losses(model, branches=True, **device),
    "loss of plain trunks": lambda model, **device: losses(model, branches=False, **device),
}
EACH_COMPUTATION = pytest.mark.parametrize("computation", list(COMPUTATIONS))


@EACH_MODEL
@settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(growth=growths())
def test_grown_trees_are_the_same(uncompiled, name, growth):
    assert_same(MODELS[name], lambda model: grown(model, growth))


@EACH_MODEL
@torch.no_grad()
def test_block_masks_give_what_one_sequence_alone_gives(uncompiled, name):
    growth = ([5, 2], 5, [[[4, 2], [1, 0]], [[5, 6], [5, 5]]], 3)
    lengths, width, calls, seed = growth
    rng = torch.Generator().manual_seed(seed)
    ids = torch.cat([torch.randint(1, VOCABULARY.size, (2, n), generator=rng) for n in (5, 2, 2)], dim=1)
    with using(MODELS[name], "flex_attention") as model:
        found = grown(model, growth)
    for b in range(2):
        parents = {**{t: t - 1 for t in range(width)}, 5: calls[0][b][0], 6: calls[0][b][1]}
        parents |= {7: calls[1][b][0], 8: calls[1][b][1]}
        for column, node in enumerate([lengths[b] - 1, 5, 6, 7, 8]):
            path = []
            while node >= 0:
                path.insert(0, node)
                node = parents[node]
            alone = trunk(MODELS[name])(input_ids=ids[b, path][None], use_cache=False).last_hidden_state[
                0, -1
            ]
            torch.testing.assert_close(found[b, column], alone, atol=1e-5, rtol=1e-5)


@EACH_MODEL
@EACH_COMPUTATION
def test_loops_and_losses_are_the_same(uncompiled, name, computation):
    assert_same(MODELS[name], COMPUTATIONS[computation])


@QUIET
@pytest.mark.parametrize(
    ("name", "computation"), [("preset", "loss of branches"), ("qwen2", "latent loop"), ("llama", "loss of branches")]
)  # fmt: skip
def test_gradients_are_the_same(uncompiled_with_gradient, name, computation):
    assert_same_gradients(MODELS[name], COMPUTATIONS[computation])


@QUIET
@pytest.mark.slow
@pytest.mark.timeout(600)
@EACH_COMPUTATION
def test_the_compiled_cpu_kernel_is_the_same(computation):
    # Torch 2.13's CPU kernel does not compile for sizes that it leaves open ("cur_kvSplitSize5 was not declared").
    torch._dynamo.reset()
    with torch._dynamo.config.patch(automatic_dynamic_shapes=False):
        assert_same(MODELS["qwen2"], COMPUTATIONS[computation])


@QUIET
@ON_CUDA
@EACH_MODEL
@EACH_COMPUTATION
def test_the_cuda_kernels_are_the_same(name, computation):
    def compute(model):
        return COMPUTATIONS[computation](model, device="cuda")

    assert_same(MODELS[name], compute, "cuda", tolerance=1e-4)
    assert_same_gradients(MODELS[name], compute, "cuda")


@QUIET
@ON_CUDA
@EACH_MODEL
@settings(max_examples=6)
@given(growth=growths())
def test_grown_trees_are_the_same_on_cuda(name, growth):
    assert_same(MODELS[name], lambda model: grown(model, growth, "cuda"), "cuda", tolerance=1e-4)


@QUIET
@ON_CUDA
def test_a_wide_model_on_cuda_uses_block_masks():
    size = {"hidden_size": 512, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 8}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=16, **size))
    move(model, "cuda")
    assert model.config._attn_implementation == "flex_attention"
