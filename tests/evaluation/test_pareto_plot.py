"""The front of quality against cost, and a plot that shows every timed arm."""

from hypothesis import given
from hypothesis import strategies as st

from lasar.evaluation.pareto_plot import pareto_front

points = st.lists(st.tuples(st.integers(1, 6), st.integers(0, 6)), min_size=1, max_size=8)


@given(points)
def test_a_point_is_on_the_front_unless_another_beats_it(found):
    front = pareto_front([(float(cost), float(quality)) for cost, quality in found])
    for number, (cost, quality) in enumerate(found):
        beaten = any(c <= cost and q >= quality and (c < cost or q > quality) for c, q in found)
        assert (number in front) != beaten
    assert front, "somebody is always on it"
