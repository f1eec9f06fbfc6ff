"""LASAR: latent adaptive semantic aligned reasoning for generative recommendation.

An open implementation of arXiv 2605.10207: an event log and item texts become a recommender that generates the next
item's semantic ID. `Recommender` is the way in from Python, `lasar --help` from the shell.
"""

from typing import TYPE_CHECKING, Any

from lasar.errors import (
    ArtifactError,
    ConfigError,
    DataError,
    LasarError,
    MissingExtraError,
    UnknownItemError,
)

if TYPE_CHECKING:
    from lasar.recommender import Recommendation, Recommender

__version__ = "0.1.0"

__all__ = [
    "ArtifactError",
    "ConfigError",
    "DataError",
    "LasarError",
    "MissingExtraError",
    "Recommendation",
    "Recommender",
    "UnknownItemError",
]


def __getattr__(name: str) -> Any:
    # PyTorch takes seconds to import; `lasar --help` should not wait for it.
    if name in ("Recommendation", "Recommender"):
        from lasar import recommender

        return getattr(recommender, name)
    raise AttributeError(f"module 'lasar' has no attribute {name!r}")
