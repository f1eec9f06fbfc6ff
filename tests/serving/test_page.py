"""The page's files as they are served: complete, nothing inline, nothing from elsewhere, readable colours."""

import re
from pathlib import Path

import pytest

import lasar.serving

FOLDER = Path(lasar.serving.__file__).parent / "page"
FILES = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.iterdir()}
SCRIPTS = {name: text for name, text in FILES.items() if name.endswith(".js")}
HTML, CSS = FILES["index.html"], FILES["page.css"]


def test_the_page_and_all_it_refers_to_are_served(client):
    page = client.get("/")
    assert page.status_code == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    wanted = set(re.findall(r'(?:src|href)="(page/[^"]+)"', page.text))
    assert wanted == {"page/page.css", "page/page.js"}
    types = {"css": "text/css; charset=utf-8", "js": "text/javascript; charset=utf-8"}
    seen = set()
    while wanted:
        path = wanted.pop()
        seen.add(path)
        response = client.get(f"/{path}")
        assert (response.status_code, response.text) == (200, FILES[path.removeprefix("page/")])
        assert response.headers["content-type"] == types[path.rpartition(".")[2]]
        wanted |= {f"page/{name}" for name in re.findall(r'from "\./([^"]+)"', response.text)} - seen
    assert {path.removeprefix("page/") for path in seen} == set(FILES) - {"index.html"}, (
        "no file is left over"
    )


def test_a_script_that_got_in_would_not_run(client):
    """The policy allows files of this server only, and the page has nothing inline that would need more."""
    headers = client.get("/").headers
    policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
    assert headers["x-content-type-options"] == "nosniff"
    assert not re.search(r"<style|<script(?![^>]* src=)|\sstyle=|\son[a-z]+=|javascript:", HTML)


@pytest.mark.parametrize("name", sorted(SCRIPTS))
def test_no_script_parses_text_as_markup_or_code(name):
    forbidden = r"(inner|outer)HTML|insertAdjacentHTML|document\.write|DOMParser|srcdoc|\beval\(|new Function"
    assert not re.search(forbidden, SCRIPTS[name])


@pytest.mark.parametrize("name", sorted(FILES))
def test_nothing_comes_from_elsewhere(name):
    assert not re.search(r"(https?:)?//[a-z]", re.sub(r"^\s*//.*$", "", FILES[name], flags=re.MULTILINE))
    assert FILES[name].isascii()
    assert len(FILES[name].splitlines()) <= 400


@pytest.mark.parametrize(
    "name", ["app.py", "../app.py", "..%2fapp.py", "page.html", "%2e%2e%2fsettings.py", "", "INDEX.HTML"]
)
def test_only_files_of_the_page_are_served(client, name):
    response = client.get(f"/page/{name}")
    assert response.status_code == 404
    assert response.headers["content-type"] == "application/problem+json"


def test_names_in_the_scripts_exist():
    ids = re.findall(r'\sid="([^"]+)"', HTML)
    assert len(ids) == len(set(ids))
    made = {name for text in SCRIPTS.values() for name in re.findall(r'\bid: "([^"]+)"', text)}
    for name, text in SCRIPTS.items():
        assert set(re.findall(r'\$\("([^"]+)"\)', text)) <= set(ids) | made, name
        for module, imported in re.findall(r'import \{([^}]+)\} from "\./([^"]+)"', text):
            exported = set(
                re.findall(r"export (?:async )?(?:function|const|class) (\w+|\$)", SCRIPTS[imported])
            )
            assert {word.strip() for word in module.split(",")} <= exported, (name, imported)
    references = re.findall(r'(?:aria-controls|aria-labelledby|aria-describedby|for)="([^"]+)"', HTML)
    assert len(references) > 10
    assert set(references) <= set(ids)


def test_routes_in_the_scripts_exist(client):
    routes = {re.sub(r"\{[^}]+\}", "*", path) for path in client.get("/openapi.json").json()["paths"]}
    asked = set(re.findall(r'[`"](v1/[^`"?]+)', "\n".join(SCRIPTS.values())))
    assert len(asked) >= 5
    assert {"/" + re.sub(r"\$\{[^}]+\}", "*", path) for path in asked} <= routes


# Contrast as WCAG 2.2 defines it. 4.5 for text, 3 for what must be told apart without being read.

TEXT = [(ink, ground) for ink in ("ink", "soft", "accent", "up", "down") for ground in ("ground", "wash")] + [
    ("on-accent", "accent"),
    ("alarm", "alarm-ground"),
]
SHAPES = [(name, "ground") for name in ("edge", "accent", "prompt", "think", "search", "rest")]


def palette(scheme):
    light, dark = (
        dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", block)) for block in CSS.split(":root")[1:3]
    )
    assert len(light) == len(dark) > 10
    return {"light": light, "dark": dark}[scheme]


def luminance(colour):
    channels = [int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    bright, dim = sorted((luminance(one), luminance(other)), reverse=True)
    return (bright + 0.05) / (dim + 0.05)


def test_contrast_is_that_of_the_standard():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)  # the standard's own near miss


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("ink", "ground"), TEXT)
def test_text_can_be_read(scheme, ink, ground):
    colours = palette(scheme)
    assert contrast(colours[ink], colours[ground]) >= 4.5


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("shape", "ground"), SHAPES)
def test_shapes_can_be_seen(scheme, shape, ground):
    colours = palette(scheme)
    assert contrast(colours[shape], colours[ground]) >= 3


def test_the_page_learns_whether_orders_are_read(client):
    assert client.get("/v1/info").json()["has_orders"] is True
