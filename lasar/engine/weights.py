"""Weights of a Qwen2, Qwen3 or Llama decoder, arranged for few large matrix products.

What is done once here is not done per request: query, key and value projections in one matrix, gate and up projections
in another, the weights of a layer's two RMSNorms multiplied into the matrices that follow them, the attention's scale
multiplied into the queries. The final norm stays as it is, because its output is what latent steps feed back.

In bf16 the matrices are rounded, and what is multiplied with them; sums, norms, attention, the residual stream and the
output head stay in fp32.

Legend: D hidden, H query heads, K key heads (H = K * G), F head size, I inner size of the MLP, P positions.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM

from lasar.model.backbone import input_table, trunk
from lasar.model.precision import Precision

_KNOWN: tuple[type[nn.Module], ...] = (Qwen2ForCausalLM, Qwen3ForCausalLM, LlamaForCausalLM)
# Static functions of the position; the others change with the length of a sequence.
_ROTARY = ("default", "linear", "llama3")
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")
_BIASED = ("q_proj", "k_proj", "v_proj")
_TABLE_TOKENS = 1 << 14  # of a vocabulary for which the first layer's projections are kept


@dataclass(frozen=True, kw_only=True)
class FusedLayer:
    """One decoder layer.

    What is wider than it is high lies in memory as the products read it, which for a few tokens takes half the time
    (256 x 1536, one thread: 113 us for 2 tokens instead of 277, 210 for 8 instead of 313); for the others there is
    nothing to gain, and they are the model's own.

    Attributes:
        qkv: projections to queries, keys and values, [D, (H + 2K) * F].
        qkv_bias: their biases [(H + 2K) * F], or None.
        gain: weights of the norms of queries and keys, [H + K, F], or None where there are no such norms.
        out: output projection [H * F, D].
        gate_up: both projections into the MLP, [D, 2I].
        down: projection out of it, [I, D].
    """

    qkv: Tensor
    qkv_bias: Tensor | None
    gain: Tensor | None
    out: Tensor
    gate_up: Tensor
    down: Tensor


class FusedWeights:
    """All layers of a frozen decoder, copied; ask `fresh` before using them again.

    Attributes:
        model: where they come from.
        precision: of the matrix products.
        layers: first to last.
        heads: query heads H.
        key_heads: key heads K.
        head_size: F.
        embedding_norm: mean norm of the token embeddings, scalar.
    """

    def __init__(self, model: nn.Module, *, precision: Precision = "fp32") -> None:
        """Copy and arrange the weights of a model that `why_unknown` has nothing against."""
        config: Any = model.config
        self.model = model
        self.precision = precision
        self.heads: int = config.num_attention_heads
        self.key_heads: int = config.num_key_value_heads
        self.head_size: int = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        sizes = {config.hidden_size, self.head_size}
        self._smallest = {size: torch.tensor(math.sqrt(size * config.rms_norm_eps)) for size in sizes}
        width = math.sqrt(config.hidden_size)
        with torch.no_grad():
            self.layers = [self._layer(layer, width) for layer in trunk(model).layers]
            self.embedding_norm = input_table(model).norm(dim=-1).mean()
        self._final: Tensor = trunk(model).norm.weight.detach() * width
        # What a token contributes to the first layer's queries, keys and values depends on the token alone.
        self._first_VX: Tensor | None = None
        if len(input_table(model)) <= _TABLE_TOKENS:
            self._first_VX = self.project(0, input_table(model).detach())
        self._rotary: Any = trunk(model).rotary_emb
        self._cos_PF, self._sin_PF = self._rotations(256)
        self._stamp = _stamp(model)

    @property
    def fresh(self) -> bool:
        """Whether a frozen model's weights are still the ones that were copied.

        Writing in place raises a tensor's version, replacing its storage changes its address. An optimizer's fused
        kernel does neither, which is why a model that can be trained is not for this path.
        """
        return self._stamp == _stamp(self.model)

    def embed(self, ids_n: Tensor) -> tuple[Tensor, Tensor | None]:
        """Embeddings of tokens [n, D], and what `project` gives for them on the first layer, where that is at hand."""
        return input_table(self.model)[ids_n], None if self._first_VX is None else self._first_VX[ids_n]

    def project(self, layer: int, x_nD: Tensor) -> Tensor:
        """Queries, keys and values of a layer before heads, norms and positions, [n, (H + 2K) * F]."""
        return times(self.scaled(x_nD), self.layers[layer].qkv, self.layers[layer].qkv_bias)

    def scaled(self, x: Tensor) -> Tensor:
        """RMSNorm over the last dimension in three operations; weight and sqrt(size) are left to what follows."""
        # x / sqrt(mean(x^2) + eps) = sqrt(n) * x / sqrt(|x|^2 + n * eps)
        smallest = self._smallest[x.shape[-1]]
        return x / torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), smallest)

    def final_norm(self, x: Tensor) -> Tensor:
        """The norm after the last layer."""
        return self.scaled(x).mul_(self._final)

    def rotations(self, positions_n: Tensor, num_positions: int) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines of positions below `num_positions`, each [n, 1, F]."""
        if num_positions > len(self._cos_PF):
            self._cos_PF, self._sin_PF = self._rotations(2 * num_positions)
        return self._cos_PF[positions_n][:, None], self._sin_PF[positions_n][:, None]

    def _rotations(self, num_positions: int) -> tuple[Tensor, Tensor]:
        table = input_table(self.model)
        positions_1P = torch.arange(num_positions, device=table.device)[None]
        cos_1PF, sin_1PF = self._rotary(table[:1], positions_1P)
        half = self.head_size // 2
        # The halves trade places in a rotation and the first changes its sign: the sign may as well be the sine's.
        return cos_1PF[0], torch.cat([-sin_1PF[0, :, :half], sin_1PF[0, :, half:]], dim=-1)

    def _layer(self, layer: Any, width: float) -> FusedLayer:
        attention, mlp = layer.self_attn, layer.mlp
        scale, head_width = self.head_size**-0.5, math.sqrt(self.head_size)
        projections = [attention.q_proj, attention.k_proj, attention.v_proj]
        weights, biases = [p.weight for p in projections], [p.bias for p in projections]
        gain = None
        if isinstance(getattr(attention, "q_norm", None), nn.Module):
            q_gain = attention.q_norm.weight * (scale * head_width)
            k_gain = attention.k_norm.weight * head_width
            gain = torch.cat([q_gain.expand(self.heads, -1), k_gain.expand(self.key_heads, -1)])
        else:
            weights[0] = weights[0] * scale
            biases[0] = None if biases[0] is None else biases[0] * scale
        before_mlp = layer.post_attention_layernorm.weight * width
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
        return FusedLayer(
            qkv=(torch.cat(weights) * (layer.input_layernorm.weight * width)).T.contiguous().to(dtype),
            qkv_bias=None if biases[0] is None else torch.cat(biases),
            gain=gain,
            out=attention.o_proj.weight.detach().T.to(dtype),
            gate_up=(torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]) * before_mlp)
            .T.contiguous()
            .to(dtype),
            down=mlp.down_proj.weight.detach().T.to(dtype),
        )


def times(x_nD: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
    """Product of tokens with a matrix [D, X] (and a bias), [n, X], in fp32."""
    if matrix.dtype == torch.float32:
        return x_nD @ matrix if bias is None else torch.addmm(bias, x_nD, matrix)
    product = (x_nD.to(matrix.dtype) @ matrix).float()
    return product if bias is None else product + bias


def plus_times(x_nD: Tensor, y_nX: Tensor, matrix: Tensor) -> Tensor:
    """Sum of tokens and a product of others with a matrix [X, D], [n, D], in fp32."""
    if matrix.dtype == torch.float32:
        return torch.addmm(x_nD, y_nX, matrix)
    return x_nD + y_nX.to(matrix.dtype) @ matrix


def why_unknown(model: nn.Module) -> str | None:
    """Why the fused path would not compute what this model computes; None if it would.

    Args:
        model: a Hugging Face causal LM.
    """
    config: Any = model.config
    if model.training:
        return "the model is in training mode"
    table = input_table(model)
    if torch.is_autocast_enabled(table.device.type):
        return "autocast is on"
    if type(model) not in _KNOWN:
        return f"architecture {config.model_type!r} ({type(model).__name__}) is not one it knows"
    if config.hidden_act != "silu":
        return f"activation {config.hidden_act!r} is not 'silu'"
    rotary = config.rope_parameters["rope_type"]
    if rotary not in _ROTARY:
        return f"rotary embedding of type {rotary!r} is not one of {', '.join(_ROTARY)}"
    if any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or ()):
        return "a layer has a sliding window"
    for number, layer in enumerate(trunk(model).layers):
        for part, names in ((layer.self_attn, _ATTENTION), (layer.mlp, _MLP)):
            for name in names:
                linear = getattr(part, name)
                if type(linear) is not nn.Linear:
                    return f"{name} of layer {number} is a {type(linear).__name__}, not a plain linear layer"
                if linear.bias is not None and name not in _BIASED:
                    return f"{name} of layer {number} has a bias"
    if table.device.type not in ("cpu", "cuda") or table.dtype != torch.float32:
        return f"{table.dtype} on {table.device.type}: it computes from float32 weights on CPUs and CUDA"
    if any(parameter.requires_grad for parameter in model.parameters()):
        return "its weights can be trained; freeze them with requires_grad_(False)"
    return None


def _stamp(model: nn.Module) -> list[tuple[int, int]]:
    return [(parameter.data_ptr(), parameter._version) for parameter in model.parameters()]
