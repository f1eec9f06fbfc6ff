"""Rewards: a group of items and the true items in, one number for each item out.

A prompt may have several true items (an order): any of them is a hit. A reward is a plain function; recipes combine
several by weights and may name one of the user's own as `module:function`.

Legend: G items of a group, best first, -1 where there is none; I items, L levels.
"""

import importlib
import importlib.util
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lasar.errors import ConfigError, nearest

Int32Array = NDArray[np.int32]
Values = NDArray[np.float64]
Reward = Callable[[Int32Array, Int32Array, Int32Array], Values]


def exact(items_G: Int32Array, targets: Int32Array, codes_IL: Int32Array) -> Values:
    """1 for every true item.

    >>> exact(np.array([5, 3, 0]), np.array([3, 7]), np.zeros((8, 2)))
    array([0., 1., 0.])
    """
    return np.isin(items_G, targets).astype(np.float64)


def ndcg(items_G: Int32Array, targets: Int32Array, codes_IL: Int32Array) -> Values:
    """What every true item adds to the group's NDCG at its rank; the sum over the group is the NDCG.

    >>> ndcg(np.array([3, 5, 7]), np.array([3, 7]), np.zeros((8, 2))).round(3)
    array([0.613, 0.   , 0.307])
    """
    discount_G = _discount(len(items_G))
    ideal = discount_G[: min(len(targets), len(items_G))].sum()
    return np.asarray(exact(items_G, targets, codes_IL) * discount_G / ideal)


def rank_penalty(items_G: Int32Array, targets: Int32Array, codes_IL: Int32Array) -> Values:
    """Minus a share of 1 for every wrong item of a group with a hit, the more the higher it stands (MiniOneRec).

    >>> rank_penalty(np.array([5, 3]), np.array([3]), np.zeros((8, 2))).round(3)
    array([-0.613,  0.   ])
    >>> rank_penalty(np.array([5, 6]), np.array([3]), np.zeros((8, 2)))
    array([0., 0.])
    """
    hit_G = np.isin(items_G, targets)
    if not hit_G.any():
        return np.zeros(len(items_G))
    discount_G = _discount(len(items_G))
    return np.where(hit_G | (items_G < 0), 0.0, -discount_G / discount_G.sum())


def shared_prefix(items_G: Int32Array, targets: Int32Array, codes_IL: Int32Array) -> Values:
    """Share of an item's codes, from the first on, that it has in common with the nearest true item.

    Denser than `exact`: a group without a hit can still tell near from far.

    >>> codes = np.array([[0, 0, 1], [0, 0, 2], [0, 1, 0], [1, 0, 1]])
    >>> shared_prefix(np.array([1, 2, 3, 0]), np.array([0]), codes).round(3)
    array([0.667, 0.333, 0.   , 1.   ])
    """
    same_GNL = codes_IL[items_G][:, None] == codes_IL[targets][None]
    share_G = np.cumprod(same_GNL, axis=2).sum(axis=2).max(axis=1) / codes_IL.shape[1]
    return np.where(items_G < 0, 0.0, share_G)


REWARDS: dict[str, Reward] = {
    "exact": exact,
    "ndcg": ndcg,
    "rank_penalty": rank_penalty,
    "shared_prefix": shared_prefix,
}


class Mixture:
    """Rewards combined by weights."""

    def __init__(self, weights: Mapping[str, float], *, codes_IL: Int32Array) -> None:
        """Find the rewards.

        Args:
            weights: name of a reward, or `module:function`, to its weight.
            codes_IL: codes of every item.

        Raises:
            ConfigError: there is no such reward, module or function.
        """
        self._parts = [(name, find_reward(name), weight) for name, weight in weights.items()]
        self._codes_IL = codes_IL

    def __call__(self, items_BG: Int32Array, targets: Sequence[Int32Array]) -> Values:
        """Rewards of groups, [B, G]; 0 where there is no item.

        Raises:
            ConfigError: a reward gave something else than one finite number for each item.
        """
        total_BG = np.zeros(items_BG.shape)
        for name, reward, weight in self._parts:
            for row, (items_G, wanted) in enumerate(zip(items_BG, targets, strict=True)):
                values = _asked(name, reward, items_G, wanted, self._codes_IL)
                if (
                    values.shape != items_G.shape
                    or values.dtype.kind not in "biuf"
                    or not np.isfinite(values).all()
                ):
                    raise ConfigError(
                        f"rl.grpo.rewards: {name!r} gave {values!r} for {len(items_G)} items; "
                        f"it must give one finite number for each"
                    )
                total_BG[row] += weight * values
        return np.where(items_BG >= 0, total_BG, 0.0)


def find_reward(name: str) -> Reward:
    """A reward by its name, or by `module:function`.

    Raises:
        ConfigError: there is no such reward, module or function.
    """
    if ":" not in name:
        if name not in REWARDS:
            raise ConfigError(
                f"rl.grpo.rewards: unknown reward {name!r}; there are {', '.join(REWARDS)}, or your own as "
                f"module:function{nearest(name, REWARDS)}"
            )
        return REWARDS[name]
    module_name, _, function = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever somebody else's module does when it is imported
        raise _not_importable(name, module_name, error) from None
    found = getattr(module, function, None)
    if found is None:
        hint = nearest(function, dir(module))
        raise ConfigError(f"rl.grpo.rewards: {name!r}: {module_name} has no function {function!r}{hint}")
    if not callable(found):
        raise ConfigError(f"rl.grpo.rewards: {name!r} is no function but a {type(found).__name__}")
    reward: Reward = found
    return reward


def reward_files(names: Iterable[str]) -> tuple[Path, ...]:
    """Source files of the user's own rewards: what they say decides what is trained.

    Raises:
        ConfigError: there is no such reward, module or function.
    """
    files = []
    for name in sorted(names):
        find_reward(name)
        module_name = name.partition(":")[0]
        if ":" not in name:
            continue
        try:
            spec = importlib.util.find_spec(module_name)
        except (ImportError, ValueError) as error:
            raise _not_importable(name, module_name, error) from None
        if spec is None:
            raise _not_importable(name, module_name, ModuleNotFoundError("not found"))
        if spec.origin is not None and Path(spec.origin).is_file():
            files.append(Path(spec.origin))
    return tuple(dict.fromkeys(files))


def _asked(
    name: str, reward: Reward, items_G: Int32Array, targets: Int32Array, codes_IL: Int32Array
) -> NDArray[Any]:
    """What a reward says; an error in somebody else's is not ours, and says where it is."""
    try:
        return np.asarray(reward(items_G, targets, codes_IL))
    except Exception as error:
        if ":" not in name:
            raise
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise ConfigError(
            f"rl.grpo.rewards: {name!r} failed with {type(error).__name__}: {error} ({place.filename}:{place.lineno}); "
            "it is called as reward(items, targets, codes)"
        ) from error


def _not_importable(name: str, module: str, error: Exception) -> ConfigError:
    mend = "install it, or put its folder on PYTHONPATH" if isinstance(error, ImportError) else "mend it"
    return ConfigError(
        f"rl.grpo.rewards: {name!r}: cannot import {module!r} ({type(error).__name__}: {error}); {mend}"
    )


def _discount(count: int) -> Values:
    return np.asarray(1.0 / np.log2(np.arange(count) + 2.0))
