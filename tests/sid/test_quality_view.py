import io

from rich.console import Console

from lasar.sid.quality_view import plot_quality, quality_table


def test_the_plot_has_the_same_bytes_twice_and_other_bytes_for_other_numbers(tmp_path):
    numbers = {
        "entropy_bits": [3.0, 2.0],
        "conditional_bits": [3.0, 1.0],
        "utilisation": [1.0, 0.5],
        "prefix_sharing": [0.4, 0.1],
    }
    longer = {key: [*values, 0.1] for key, values in numbers.items()}
    images = []
    for number, series in enumerate([{"a": numbers}, {"a": numbers}, {"a": numbers, "b": longer}]):
        plot_quality(series, tmp_path / f"{number}.png")
        images.append((tmp_path / f"{number}.png").read_bytes())
    assert images[0].startswith(b"\x89PNG")
    assert images[0] == images[1] != images[2]


def test_the_table_has_a_column_for_each_and_says_what_moved():
    codes = {
        "utilisation": [1.0],
        "entropy_bits": [3.0],
        "conditional_bits": [3.0],
        "prefix_sharing": [0.25],
        "collision_rate": 0.0,
    }
    ours = {
        "kind": "rq_vae", "num_items": 1234, "fitted_items": 1234, "num_levels": 1, "codebook_size": 8,
        "num_neighbours": 10,
        "collision_rate_before": 0.125, "moved_items": [17], "relative_error_before": 0.5,
        "relative_error_after": 0.75, "codes": codes,
    }  # fmt: skip
    theirs = {
        "name": "letter",
        "num_items": 99,
        "fitted_items": 99,
        "codes": codes | {"collision_rate": 0.07},
    }
    for quality, there in ((ours, False), (ours | {"compared": theirs}, True)):
        console = Console(width=120, file=io.StringIO())
        console.print(quality_table(quality))
        text = console.file.getvalue()
        assert all(part in text for part in ("rq_vae", "1,234", "25.0%", "12.50%", "17", "0.7500", "3.00"))
        assert ("letter" in text and "7.00%" in text and "99" in text) == there
