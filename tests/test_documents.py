"""What the README says must be in the results file, and what it links to must exist."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
ROWS = [
    json.loads(line) for line in (ROOT / "results" / "results.jsonl").read_text(encoding="utf-8").splitlines()
]


def test_every_metric_of_the_readme_is_a_result():
    known = {(row["method"], f"{value:.4f}") for row in ROWS for value in row["metrics"].values()}
    quoted = 0
    for line in README.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        method = next((cell for cell in cells if cell in {row["method"] for row in ROWS}), None)
        for cell in cells:
            if method and re.fullmatch(r"0\.\d{4}", cell):
                assert (method, cell) in known, line
                quoted += 1
    assert quoted >= 16


@pytest.mark.parametrize("page", [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")], ids=lambda p: p.name)
def test_local_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://", "mailto:")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_recipes_of_results_exist():
    for row in ROWS:
        assert (ROOT / row["recipe"]).is_file()


def test_nothing_of_the_readme_is_left_to_fill_in():
    assert not re.search(r"^[A-Z]+_[A-Z]+$", README, flags=re.MULTILINE)
