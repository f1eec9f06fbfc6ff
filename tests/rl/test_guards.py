import math
import re

import pytest

from lasar.rl.guards import Bounds, broken_bound, verdict

BOUNDS = Bounds(max_kl=0.5, min_entropy=0.5, window=3)


def test_a_run_shorter_than_the_window_is_guarded_too():
    wide = Bounds(max_kl=0.5, min_entropy=0.5, window=10)
    assert broken_bound(records([0, 9], [4, 4]), wide) is None
    assert "step 4: 6.75 nats" in broken_bound(records([0, 9, 9, 9], [4, 4, 4, 4]), wide)


def records(kl, entropy):
    return [{"step": n + 1, "kl": k, "entropy": e} for n, (k, e) in enumerate(zip(kl, entropy, strict=True))]


@pytest.mark.parametrize(
    ("kl", "entropy", "message"),
    [
        ([0, 0, 0, 0], [4, 4, 4, 4], None),
        ([9, 9], [0, 0], None),  # too early to say
        ([9, 9, 9], [4, 4, 4], "step 3: 9 nats"),
        ([0, 0, 1.4, 0], [4, 4, 4, 4], None),  # one bad step is noise
        ([0, 1, 1, 1], [4, 4, 4, 4], r"step 4: 1 nats .*max_kl=0.5; lower rl.learning_rate"),
        ([0, 0, 0, math.nan], [4, 4, 4, 4], "nan nats"),
        ([0] * 6, [4, 4, 4, 1, 1, 1], "step 6: .*25% .*min_entropy=0.5"),
    ],
)
def test_bounds(kl, entropy, message):
    found = broken_bound(records(kl, entropy), BOUNDS)
    if message is None:
        assert found is None
    else:
        assert re.search(message, found)


def test_a_verdict_is_plain():
    start, end = {"ndcg@10": 0.1, "mean_depth": 4.5}, {"ndcg@10": 0.11, "mean_depth": 2.0}
    assert verdict(improved=False, start=start, end=start) == (
        "RL did not improve validation: keeping the Stage-2 policy"
    )
    assert (
        verdict(improved=True, start=start, end=end)
        == "RL: validation N@10 0.1000 to 0.1100, mean depth 4.50 to 2.00"
    )
    assert verdict(improved=True, start=start, end=end, target=2.0).endswith("4.50 to 2.00")
    missed = verdict(improved=False, start=start, end=start, target=2.0)
    assert missed.endswith("; what is kept takes 4.50 steps, more than rl.depth.target=2: raise "
                           "rl.guards.step_worth to pay more for fewer steps")  # fmt: skip
    plain = {"ndcg@10": 0.1}
    assert verdict(improved=True, start=plain, end=plain).endswith("0.1000")
