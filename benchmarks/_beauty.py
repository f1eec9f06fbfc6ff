"""History lengths of Amazon Beauty (2014, 5-core, leave-one-out): training events per user, cut at 50."""

import numpy as np

# length: users; from 3 events on, as `lasar prepare` counts them. The last entry holds all longer ones.
LENGTHS = (
    7162, 4221, 2680, 1811, 1366, 881, 695, 558, 439, 361, 262, 207, 213, 141, 118, 112, 117, 84, 66, 73, 74, 61, 54,
    44, 44, 38, 30, 38, 20, 19, 21, 19, 23, 24, 22, 15, 17, 7, 10, 10, 15, 7, 11, 8, 4, 8, 9, 144,
)  # fmt: skip


def beauty_lengths(users: int) -> np.ndarray:
    """Lengths of `users` histories whose distribution is Beauty's: evenly spaced quantiles of it, [users]."""
    quantiles = (np.arange(users) + 0.5) / users
    return 3 + np.searchsorted(np.cumsum(LENGTHS) / sum(LENGTHS), quantiles)
