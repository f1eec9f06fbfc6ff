"""Plain attention of a training in bf16 on a CPU: what SDPA computes in fp32, and SDPA itself everywhere else."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from lasar.model import short_attention
from lasar.model.attention import set_attention
from lasar.model.short_attention import MOST, NAME, attend


class Layer(torch.nn.Module):
    is_causal = True

    def __init__(self, groups):
        super().__init__()
        self.num_key_value_groups = groups


def inputs(*, queries, keys, heads=4, groups=2, dtype=torch.float32):
    torch.manual_seed(0)
    sizes = ((3, heads, queries, 8), (3, heads // groups, keys, 8), (3, heads // groups, keys, 8))
    return [torch.randn(size).to(dtype).requires_grad_() for size in sizes]


def masks(queries, keys):
    seen = torch.rand(3, 1, queries, keys, generator=torch.Generator().manual_seed(1)) < 0.5
    seen[..., 0] = True
    return {
        "bool": seen,
        "numbers": torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min),
        "none": None,
    }


def out_and_gradients(function, tensors, mask, **options):
    with torch.autocast("cpu", torch.bfloat16, enabled=function is attend):
        out, _ = function(Layer(2), *tensors, mask, **options)
    torch.manual_seed(2)
    return [out, *torch.autograd.grad(out, tensors, torch.randn(out.shape).to(out.dtype))]


@pytest.mark.parametrize(
    ("kind", "queries", "keys"),
    [(kind, *size) for kind in ("bool", "numbers") for size in ((7, 7), (1, 1), (3, 9))]
    + [("none", 7, 7), ("none", 1, 1)],
)
@pytest.mark.parametrize("scaling", [None, 0.2])
def test_in_autocast_it_is_sdpa_in_fp32(kind, queries, keys, scaling, monkeypatch):
    tensors, mask = inputs(queries=queries, keys=keys), masks(queries, keys)[kind]
    expected = out_and_gradients(sdpa_attention_forward, tensors, mask, scaling=scaling)
    monkeypatch.setattr(short_attention, "sdpa_attention_forward", None)
    found = out_and_gradients(attend, tensors, mask, scaling=scaling, sliding_window=None)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


def test_bf16_inputs_give_bf16_and_are_rounded_once():
    tensors = inputs(queries=9, keys=9, dtype=torch.bfloat16)
    exact = [tensor.detach().float().requires_grad_() for tensor in tensors]
    found = out_and_gradients(attend, tensors, None)
    assert {tensor.dtype for tensor in found} == {torch.bfloat16}
    for one, other in zip(found, out_and_gradients(attend, exact, None), strict=True):
        torch.testing.assert_close(one.float(), other, atol=2e-2, rtol=1e-2)


@pytest.mark.parametrize("case", ["fp32", "long", "without gradients", "dropout", "bottom right"])
def test_elsewhere_it_is_sdpa(case, monkeypatch):
    keys = MOST + 1 if case == "long" else 4
    tensors = inputs(queries=2 if case == "bottom right" else keys, keys=keys)
    called = []
    monkeypatch.setattr(
        short_attention, "sdpa_attention_forward", lambda *args, **rest: called.append(rest) or (None, None)
    )
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=case != "fp32"),
        torch.set_grad_enabled(case != "without gradients"),
    ):
        if case == "without gradients":
            tensors = [tensor.detach() for tensor in tensors]
        attend(Layer(2), *tensors, None, dropout=0.1 if case == "dropout" else 0.0)
    assert called == [{"dropout": 0.1 if case == "dropout" else 0.0, "scaling": None, "is_causal": None}]


def test_a_model_trains_in_bf16_as_with_sdpa():
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=20, num_key_value_heads=2, **size))
    ids = torch.randint(20, (3, 11))

    def gradients(attention, *, autocast):
        model.set_attn_implementation(attention)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    exact = gradients("sdpa", autocast=False)
    errors = {name: (gradients(name, autocast=True) - exact).norm() / exact.norm() for name in ("sdpa", NAME)}
    assert errors[NAME] < 1.05 * errors["sdpa"] < 0.05
    model.set_attn_implementation("sdpa")
    set_attention(model, "cpu")
    assert model.config._attn_implementation == NAME
