"""Quality against latency of a study's arms, as SVG written by hand: equal input gives equal bytes."""

import html
import math

from lasar.evaluation.study_table import StudyResult, StudyRow

_LEFT, _TOP, _WIDTH, _HEIGHT = 70, 50, 560, 300
_FRONT, _BEHIND = "#2f6db3", "#8a8f98"


def plot_name(result: StudyResult) -> str:
    """Name of the study's plot beside the results page."""
    return f"results-latency-{result.name}.svg"


def is_timed(result: StudyResult) -> bool:
    """Whether any arm's latency was measured."""
    return any(row.latency for row in result.rows)


def pareto_front(points: list[tuple[float, float]]) -> list[int]:
    """Numbers of the (cost, quality) points that no other is as good as in both and better than in one."""
    return [
        number
        for number, (cost, quality) in enumerate(points)
        if not any(
            other_cost <= cost and other_quality >= quality and (other_cost, other_quality) != (cost, quality)
            for other_cost, other_quality in points
        )
    ]


def render_pareto(result: StudyResult, *, metric: str = "ndcg@10", batch: int = 1) -> str:
    """The plot: milliseconds a request (logarithmic) across, the metric's mean over seeds up; filled: on the front."""
    rows = [row for row in result.rows if row.latency and batch in row.latency.milliseconds]
    points = [(_milliseconds(row, batch), row.metrics[metric].mean) for row in rows]
    front = set(pareto_front(points))
    low, high = (
        f(math.log10(cost) for cost, _ in points) + margin for f, margin in ((min, -0.15), (max, 0.35))
    )
    bottom, top = min(q for _, q in points) * 0.95, max(q for _, q in points) * 1.05
    title = f"{result.name}: {metric.upper()} and milliseconds a request, one at a time"
    parts = [
        f'<rect x="{_LEFT}" y="{_TOP}" width="{_WIDTH}" height="{_HEIGHT}" fill="none" stroke="#ccc"/>',
        f'<text x="12" y="24" font-size="14" font-weight="bold">{html.escape(title)}</text>',
        '<text x="12" y="42" fill="#555">blue: no other is as good in both and better in one</text>',
    ]
    for exponent in range(math.floor(low), math.ceil(high) + 1):
        for digit in (1, 2, 5):
            at = math.log10(digit) + exponent
            if low <= at <= high:
                x = _LEFT + (at - low) / (high - low) * _WIDTH
                parts.append(f'<path d="M{x:.1f} {_TOP}v{_HEIGHT}" stroke="#eee"/>')
                label = f"{digit * 10.0**exponent:g} ms"
                parts.append(
                    f'<text x="{x:.1f}" y="{_TOP + _HEIGHT + 18}" text-anchor="middle">{label}</text>'
                )
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = _TOP + (1 - share) * _HEIGHT
        value = bottom + share * (top - bottom)
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{value:.4f}</text>')
    for number, (row, (cost, quality)) in enumerate(zip(rows, points, strict=True)):
        x = _LEFT + (math.log10(cost) - low) / (high - low) * _WIDTH
        y = _TOP + (top - quality) / (top - bottom) * _HEIGHT
        colour = _FRONT if number in front else _BEHIND
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{colour}"/>')
        parts.append(f'<text x="{x + 8:.1f}" y="{y + 4:.1f}" fill="{colour}">{html.escape(row.arm)}</text>')
    width, height = _LEFT + _WIDTH + 20, _TOP + _HEIGHT + 34
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'role="img" font-family="sans-serif" font-size="12"><title>{html.escape(title)}</title>'
        f'<rect width="{width}" height="{height}" fill="#fff"/>' + "".join(parts) + "</svg>\n"
    )


def _milliseconds(row: StudyRow, batch: int) -> float:
    assert row.latency is not None
    return row.latency.milliseconds[batch]
