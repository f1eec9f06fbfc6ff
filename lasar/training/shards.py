"""Decoder layers divided among processes (FSDP2), and what differs for weights that are.

Between steps every process holds its part of each layer's weights, and of what there is for each of them: the
optimizer's state, the running average, the best so far. For a step the layers are put together and stay whole until
its gradients are added up: a latent loop passes through each layer as often as its batch thinks, so processes differ
in how often they would otherwise have to ask each other. Embeddings, norms and heads are whole in every process.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lasar.model.attention import causal_mask
from lasar.model.backbone import trunk
from lasar.ranks import add_up, others_alive, ranks

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule

_LARGE = 1 << 18  # numbers


@contextmanager
def divided(model: nn.Module, shard: bool) -> Iterator[None]:
    """Inside, every process holds its part of each decoder layer, if there are several and `shard` says so.

    Afterwards the layers are the objects they were, with what was trained.

    Args:
        model: a Hugging Face causal LM, or a module with one inside.
        shard: whether.
    """
    if not shard or ranks().size == 1:
        yield
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    layers = trunk(_backbone(model)).layers
    own = list(layers)
    mesh = init_device_mesh(next(model.parameters()).device.type, (ranks().size,))
    for number, layer in enumerate(own):
        layers[number] = fully_shard(copy.deepcopy(layer), mesh=mesh, reshard_after_forward=False)
        for parameter in layer.parameters():
            parameter.data = torch.empty(0, device=parameter.device)
    yield
    for number, layer in enumerate(own):
        values = {name: whole(parameter.detach()) for name, parameter in layers[number].named_parameters()}
        for name, parameter in layer.named_parameters():
            parameter.data = values[name]
        layers[number] = layer


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Inside, divided layers are whole, for passes without gradients; processes may differ in how many."""
    gather(model)
    yield
    for layer in _shards(model):
        layer.reshard()


def gather(model: nn.Module) -> None:
    """Make divided layers whole, until `add_up_gradients`."""
    for layer in _shards(model):
        layer.set_requires_gradient_sync(False)
        layer.set_reshard_after_backward(False)
        with others_alive():
            layer.unshard()


def add_up_gradients(model: nn.Module) -> None:
    """The sum over processes of every gradient that any of them has; divided layers are then in parts again."""
    if ranks().size == 1:
        return
    shards = _shards(model)
    if shards:
        with others_alive():
            _pass_once(model, shards)
    parameters = [parameter for _, parameter in trained(model)]
    whole_P = [parameter for parameter in parameters if not _is_part(parameter)]
    has_P = torch.tensor(
        [p.grad is not None for p in whole_P], dtype=torch.int64, device=parameters[0].device
    )
    for parameter, has in zip(whole_P, add_up(has_P).tolist(), strict=True):
        if has:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    gradients = [p.grad for p in whole_P if p.grad is not None]
    small = [gradient for gradient in gradients if not _alone(gradient)]
    for gradient in filter(_alone, gradients):
        add_up(gradient)
    if small:
        flat = torch.cat([gradient.flatten() for gradient in small])
        for gradient, total in zip(small, add_up(flat).split([g.numel() for g in small]), strict=True):
            gradient.copy_(total.view_as(gradient))
    for parameter in parameters:
        if _is_part(parameter) and parameter.grad is not None:
            local(parameter.grad).mul_(ranks().size)  # FSDP makes means


def _alone(gradient: Tensor) -> bool:
    # Many small ones travel together; of a large one a copy there and back would cost a third of its way.
    return gradient.numel() >= _LARGE and gradient.is_contiguous()


def _pass_once(model: nn.Module, shards: "Sequence[FSDPModule]") -> None:
    # FSDP adds up what has gathered when a gradient reaches a layer. This one is zero, and reaches each layer once in
    # every process, however many batches and latent steps there were.
    for layer in shards:
        layer.set_requires_gradient_sync(True)
        layer.set_reshard_after_backward(True)
    backbone = _backbone(model)
    ids_11 = torch.zeros((1, 1), dtype=torch.long, device=backbone.device)
    hidden_11D = trunk(backbone)(
        input_ids=ids_11, attention_mask=causal_mask(backbone, ids_11), use_cache=False
    ).last_hidden_state
    if hidden_11D.requires_grad:
        hidden_11D.backward(torch.zeros_like(hidden_11D))
    for layer in shards:
        layer.reshard()


def clip_gradients(parameters: Sequence[nn.Parameter], max_norm: float) -> None:
    """Scale gradients so that their norm over all weights, in whatever process, is at most `max_norm`."""
    parts = [local(p.grad) for p in parameters if p.grad is not None and _is_part(p)]
    if not parts:
        nn.utils.clip_grad_norm_(parameters, max_norm)
        return
    others = [p.grad for p in parameters if p.grad is not None and not _is_part(p)]
    squared = add_up(torch.nn.utils.get_total_norm(parts).square())
    if others:
        squared += torch.nn.utils.get_total_norm(others).square()
    share = (max_norm / (squared.sqrt() + 1e-6)).clamp(max=1.0)
    for gradient in (*parts, *others):
        gradient.mul_(share)


def trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Weights that are trained, by name."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def copies_of(model: nn.Module) -> dict[str, Tensor]:
    """What the trained weights are now, in parts where they are."""
    return {name: parameter.detach().clone() for name, parameter in trained(model)}


def copy_into(model: nn.Module, values: dict[str, Tensor]) -> None:
    """Give trained weights the values of that name, which may be whole or in parts."""
    for name, parameter in trained(model):
        put(parameter, values[name])


def put(target: Tensor, value: Tensor) -> None:
    """Copy a value, whole or in parts, into a tensor."""
    with torch.no_grad():
        local(target).copy_(local(part_of(value, like=target)))


def part_of(value: Tensor, *, like: Tensor) -> Tensor:
    """A whole value as its parts, if the other tensor is in parts."""
    if not _is_part(like) or _is_part(value) or not value.dim():
        return value.to(like.device)
    from torch.distributed.tensor import distribute_tensor

    there = cast(Any, like)
    return distribute_tensor(value.to(like.device), there.device_mesh, there.placements, src_data_rank=None)


def whole(tensor: Tensor) -> Tensor:
    """A tensor of which processes hold parts, all of it; every process has to call it."""
    if not _is_part(tensor):
        return tensor
    with others_alive():
        full: Tensor = cast(Any, tensor).full_tensor()
    return full


def local(tensor: Tensor) -> Tensor:
    """This process's part, in the same memory; the tensor itself where it is whole."""
    here: Tensor = cast(Any, tensor).to_local() if _is_part(tensor) else tensor
    return here


def is_divided(model: nn.Module) -> bool:
    """Whether processes hold parts of a model's layers."""
    return bool(_shards(model))


def _is_part(tensor: Tensor) -> bool:
    return type(tensor) is not Tensor and hasattr(tensor, "to_local")


def _shards(model: nn.Module) -> "list[FSDPModule]":
    if ranks().size == 1:
        return []
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def _backbone(model: nn.Module) -> PreTrainedModel:
    return next(module for module in model.modules() if isinstance(module, PreTrainedModel))
