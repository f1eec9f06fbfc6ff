"""Two processes, started by torchrun, hold parts of a model's layers; a whole copy says what must come out."""

import sys
from pathlib import Path

import torch

from lasar.model.backbone import build_backbone, trunk
from lasar.ranks import add_up, join, ranks
from lasar.training.checkpoints import load_training, save_training
from lasar.training.fit import FitPlan, build_optimizer
from lasar.training.shards import (
    add_up_gradients,
    clip_gradients,
    copies_of,
    divided,
    gather,
    gathered,
    is_divided,
    trained,
    whole,
)


def model(layers):
    """`all` are trained, none (`frozen`), or of each only the MLP, computed twice to save memory (`some`)."""
    built = build_backbone(
        "tiny", num_levels=2, codebook_size=16, orders=False, max_history=20, normalise="trie", dropout=0.0,
        lora_rank=0, seed=0,
    ).model.train()  # fmt: skip
    for layer in trunk(built).layers:
        layer.requires_grad_(layers == "all")
        layer.mlp.requires_grad_(layers != "frozen")
    if layers == "some":
        built.activation_checkpointing_enable({"use_reentrant": False})
    return built


def passes(model, seed, depth):
    """A loss whose layers are used once more than `depth` says."""
    ids = torch.randint(0, 20, (3, 12), generator=torch.Generator().manual_seed(seed))
    hidden = trunk(model)(input_ids=ids, use_cache=False).last_hidden_state
    for _ in range(depth):
        hidden = trunk(model)(inputs_embeds=hidden, use_cache=False).last_hidden_state
    return model.lm_head(hidden).logsumexp(-1).sum()


def main(folder, which):
    rank = ranks().rank
    parts, reference = model(which), model(which)
    own = list(trunk(parts).layers)
    plan = FitPlan(epochs=1, learning_rate=0.01)
    other = build_optimizer(reference, plan)
    with divided(parts, True):
        assert is_divided(parts)
        optimizer = build_optimizer(parts, plan)
        for step in range(3):
            gather(parts)
            for number in range(rank + step):  # one process may have nothing to do
                passes(parts, number, rank + number).backward()
            add_up_gradients(parts)
            for _, parameter in trained(reference):
                parameter.grad = torch.zeros_like(parameter)
            for number in range(rank + step):
                passes(reference, number, rank + number).backward()
            gradients = {name: add_up(p.grad) for name, p in trained(reference)}
            for name, parameter in trained(parts):
                torch.testing.assert_close(
                    whole(parameter.grad), gradients[name], msg=lambda m, n=name: f"{n}: {m}"
                )
            clip_gradients([p for _, p in trained(parts)], 1.0)
            torch.nn.utils.clip_grad_norm_([p for _, p in trained(reference)], 1.0)
            for name, parameter in trained(parts):
                torch.testing.assert_close(whole(parameter.grad), gradients[name], rtol=1e-5, atol=1e-7)
            for either in (optimizer, other):
                either.step()
                either.zero_grad()
        best = copies_of(parts)
        save_training(folder, {"step": 3}, parts, optimizer, best=best)
        with torch.no_grad(), gathered(parts):
            if rank:  # the other does not look
                torch.testing.assert_close(passes(parts, 9, 1), passes(reference, 9, 1))
    assert all(one is two for one, two in zip(own, trunk(parts).layers, strict=True))
    same(parts, reference)
    alone = model(which)
    fresh, kept = build_optimizer(alone, plan), copies_of(alone)
    assert load_training(folder, alone, fresh, best=kept) == {"step": 3}
    same(alone, reference)
    for name, parameter in trained(alone):
        torch.testing.assert_close(kept[name], parameter.detach())
        slots, expected = fresh.state[parameter], other.state[dict(trained(reference))[name]]
        assert slots.keys() == expected.keys()
        for slot, value in slots.items():
            torch.testing.assert_close(value, expected[slot], rtol=1e-4, atol=1e-7)
    again = model(which)
    with divided(again, True):
        load_training(folder, again, build_optimizer(again, plan))
    same(again, reference)
    again.save_pretrained(folder.parent / "model", is_main_process=rank == 0)


def same(one, two):
    for (name, first), (_, second) in zip(one.named_parameters(), two.named_parameters(), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


if __name__ == "__main__":
    with join(["run"], shared=("run",)):
        main(Path(sys.argv[1]) / "checkpoint", sys.argv[2])
