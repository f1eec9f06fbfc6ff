"""The page in a real browser, used as a person would; what it shows is held to the Recommender."""

import contextlib
import re
import shutil
import socket
import string
import threading
import time
import urllib.parse

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

playwright_api = pytest.importorskip(
    "playwright.sync_api", reason="drives the browser; pip install -c constraints.txt -e '.[dev]'"
)
expect = playwright_api.expect

from lasar import Recommender  # noqa: E402
from lasar.serving.app import create_app  # noqa: E402
from lasar.serving.service import Service  # noqa: E402
from lasar.serving.settings import Settings  # noqa: E402

pytestmark = pytest.mark.slow

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
QUIET = ["--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update"]
MARKUP_ID = "<i>1</i>"
MARKUP = '<img src=x onerror="window.pwned=1"><b>BOLD</b> & "QUOTED"'
PHONE, DESK = {"width": 360, "height": 740}, {"width": 1280, "height": 900}


@pytest.fixture(scope="module")
def browser():
    with playwright_api.sync_playwright() as playwright:
        found = next(filter(None, map(shutil.which, BROWSERS)), None)
        try:
            launched = playwright.chromium.launch(executable_path=found, args=QUIET)
        except playwright_api.Error as error:
            pytest.skip(
                f"no Chromium; install one, or run 'playwright install chromium' ({error.message[:80]})"
            )
        yield launched
        launched.close()


class Serving:
    """A server in a thread."""

    def __init__(self, run, folder, **more):
        import uvicorn

        database = f"sqlite:///{folder / 'state.sqlite'}"
        service = Service(Settings(run=run, database=database, timeout_ms=60_000, threads=1, **more))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}/"
        config = uvicorn.Config(create_app(service), port=port, log_level="warning", access_log=False)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run)
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive()
            time.sleep(0.02)

    def close(self):
        self._server.should_exit = True
        self._thread.join(30)


@pytest.fixture(scope="module")
def server(run, shop, tmp_path_factory):
    made = Serving(run, tmp_path_factory.mktemp("server"), show_users=True, admin_token=shop.token)
    yield made
    made.close()


@pytest.fixture
def visit(browser, server):
    """Pages of fresh browsers; an error in a script fails the test."""
    contexts, errors = [], []

    def open_page(hash_="", *, url=None, viewport=DESK, **options):
        contexts.append(browser.new_context(viewport=viewport, **options))
        page = contexts[-1].new_page()
        page.set_default_timeout(15_000)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto((url or server.url) + hash_)
        expect(page.locator("#facts")).not_to_be_empty()
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert errors == []


def choose_item(page, text):
    page.fill("#item", text)
    page.press("#item", "Enter")  # before the suggestions are there: the page waits for them


def answered(page):
    expect(page.locator("#results")).to_be_visible()
    expect(page.locator("#answer")).not_to_have_attribute("aria-busy", "true")


def shown_items(page):
    answered(page)
    return page.locator("#list .title").all_inner_texts()


def force(page, depth):
    """Move the slider by keys, as far as it takes."""
    slider = page.get_by_role("slider", name="Latent steps")
    slider.press("Home")  # automatic
    for _ in range(0 if depth == "auto" else depth + 1):
        slider.press("ArrowRight")
    expect(page.locator("#outcome")).to_contain_text(
        re.compile(rf"forced to {depth} step" if depth != "auto" else "after")
    )
    answered(page)


def titles(found):
    return [item.title for item in found]


def fits(page):
    return page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_search_add_recommend_by_keyboard_alone(visit, recommender, shop):
    page = visit()
    page.focus("#item")
    page.keyboard.type("red tea")
    expect(page.locator("#item-options [role=option]")).to_have_count(1)
    expect(page.locator("#item")).to_have_attribute("aria-expanded", "true")
    assert page.get_attribute("#item", "aria-activedescendant") == "item-options-0"
    page.keyboard.press("Enter")
    expect(page.locator("#history .title")).to_have_text(["RED TEAPOT"])
    expect(page.locator("#item")).to_be_focused()
    page.keyboard.type("mug")
    expect(page.locator("#item-options [role=option]")).to_have_count(5)
    page.keyboard.press("ArrowDown")
    second = page.locator("#item-options [aria-selected=true] span").inner_text()
    assert second == page.locator("#item-options [role=option] span").nth(1).inner_text()
    page.keyboard.press("Enter")
    expect(page.locator("#history .title")).to_have_text([second, "RED TEAPOT"])  # newest first
    history = [[shop.items[shop.titles.index(title)] for title in ("RED TEAPOT", second)]]
    page.locator("#settings button").focus()
    page.keyboard.press("Enter")
    assert shown_items(page) == titles(recommender.recommend(history, 10, beam_width=50))
    scores = [float(text) for text in page.locator("#list .score").all_inner_texts()]
    expected = [item.score for item in recommender.recommend(history, 10, beam_width=50)]
    assert scores == pytest.approx(expected, abs=0.0051)


def test_an_empty_history_is_answered_when_asked(visit, recommender):
    page = visit()
    expect(page.locator("#starters button")).to_have_count(4)
    page.get_by_role("button", name="Recommend").click()
    assert shown_items(page) == titles(recommender.recommend([], 10))
    page.fill("#k", "3")
    page.press("#k", "Enter")
    expect(page.locator("#list li")).to_have_count(3)
    page.locator("#starters button").first.click()
    name = page.locator("#history .title").inner_text()
    expect(page.locator("#list .tag")).to_have_count(shown_items(page).count(name))


def test_escape_closes_and_typing_ahead_of_the_server_is_safe(visit):
    page = visit()
    held = []
    page.route(re.compile(r"v1/search.*q=red$"), lambda route: held.append(route))
    page.focus("#item")
    page.keyboard.type("red")
    page.wait_for_timeout(400)
    assert len(held) == 1
    page.fill("#item", "blue mug")
    option = page.locator("#item-options [role=option] span")
    expect(option).to_have_text(["BLUE MUG"])
    with contextlib.suppress(playwright_api.Error):  # the page has given that request up
        held[0].continue_()
    page.wait_for_timeout(400)
    expect(option).to_have_text(["BLUE MUG"])
    page.keyboard.press("Escape")
    expect(page.locator("#item-options")).to_be_hidden()
    assert page.input_value("#item") == "blue mug"
    page.keyboard.press("Escape")
    assert page.input_value("#item") == ""
    page.keyboard.type("no such thing")
    expect(page.locator("#item-options")).to_have_text("Nothing found")
    page.keyboard.press("Enter")
    expect(page.locator("#history .title")).to_have_count(0)


def test_items_are_removed_and_orders_begun(visit, recommender):
    page = visit("#items=sku1,sku2;sku3")
    expect(page.locator("#history summary")).to_have_count(2)
    expect(page.locator("#history .title")).to_have_count(3)
    page.get_by_role("button", name="Remove GREEN TEAPOT").press("Enter")
    expect(page).to_have_url(re.compile("#items=sku1;sku3$"))
    assert page.evaluate("document.activeElement.getAttribute('aria-label')").startswith("Remove")
    page.get_by_role("button", name="Start a new order").click()
    expect(page.locator("#item")).to_be_focused()
    choose_item(page, "sku12")
    expect(page).to_have_url(re.compile("#items=sku1;sku3;sku12$"))
    assert shown_items(page) == titles(recommender.recommend([["sku1"], ["sku3"], ["sku12"]], 10))
    first = page.locator("#list li").first
    name = first.locator(".title").inner_text()
    first.get_by_role("button").click()
    expect(page.locator("#history .title").first).to_have_text(name)
    page.get_by_role("button", name="Clear").click()
    expect(page.locator("#results")).to_be_hidden()
    assert urllib.parse.urlsplit(page.url).fragment == ""


def test_a_user_is_picked_edited_and_shared(visit, recommender):
    page = visit()
    page.fill("#user", "b")
    page.get_by_role("option", name="bob").click()
    expect(page.locator("#history")).to_contain_text("User bob")
    assert shown_items(page) == titles(recommender.recommend_user("bob", 10))
    assert page.locator("#list .tag").count() > 0  # untrained, so it repeats the history
    page.check("#seen")
    expect(page.locator("#list .tag")).to_have_count(0)
    page.fill("#k", "4")
    page.press("#k", "Enter")
    expect(page.locator("#list li")).to_have_count(4)
    force(page, 2)
    expected = titles(recommender.recommend_user("bob", 4, depth=2, exclude_seen=True))
    assert shown_items(page) == expected
    assert urllib.parse.urlsplit(page.url).fragment == "user=bob&k=4&seen=out&depth=2"
    shared = visit("#" + urllib.parse.urlsplit(page.url).fragment)
    assert shown_items(shared) == expected
    assert shared.input_value("#slider") == "2"
    assert shared.is_checked("#seen")
    # Edited, it is nobody's history any more; an address pasted over it brings the user back.
    choose_item(shared, "black clock")
    expect(shared).to_have_url(re.compile(r"#items=sku6;sku%2F7;sku24&"))
    shared.evaluate("location.hash = '#user=ann'")
    expect(shared.locator("#history")).to_contain_text("User ann")
    expect(shared.locator("#list li")).to_have_count(10)
    assert shown_items(shared) == titles(recommender.recommend_user("ann", 10))


def test_a_forced_depth_moves_the_list(visit, recommender):
    history = [["sku9", "sku10"], ["sku33"]]
    automatic = {item.title: rank for rank, item in enumerate(recommender.recommend(history, 10), start=1)}
    page = visit("#items=sku9,sku10;sku33")
    answered(page)
    assert page.locator("#list .moved").count() == 0
    moved = 0
    for depth in range(4):
        force(page, depth)
        expected = titles(recommender.recommend(history, 10, depth=depth))
        assert shown_items(page) == expected
        slider = page.get_by_role("slider")
        assert slider.get_attribute("aria-valuetext") == ("1 step" if depth == 1 else f"{depth} steps")
        spoken = page.locator("#list .moved .unseen").all_text_contents()
        for rank, (title, text) in enumerate(zip(expected, spoken, strict=True), start=1):
            was = automatic.get(title)
            way = "up" if was and rank < was else "down"
            how = f"{way} {abs(rank - was)}, was {was}" if was and was != rank else "same rank"
            assert text == (how if was else "not in the automatic list")
            moved += text != "same rank"
        gone = [title for title in automatic if title not in expected]
        text = page.locator("#gone").text_content() if gone else ""
        assert [title for title in automatic if f"{title} (was {automatic[title]})" in text] == gone
        assert page.locator("#thoughts details").count() == depth + 1
        assert page.locator("#latency tbody tr").count() == 2
    assert moved > 4
    force(page, "auto")
    assert shown_items(page) == list(automatic)


def test_depths_and_times_are_those_of_the_answer(visit, recommender):
    page = visit()
    with page.expect_response(re.compile("v1/recommend")) as caught:
        page.evaluate("location.hash = '#items=sku1;sku2&k=5'")
    answered(page)
    answer = caught.value.json()
    distribution = answer["explanation"]["distribution"]
    labels = page.locator("#depth-panel .column small").all_inner_texts()
    assert labels == [f"{entry['probability'] * 100:.0f}" for entry in distribution]
    expect(page.locator("#depth-panel .column.chosen")).to_have_attribute("data-depth", str(answer["depth"]))
    heights = page.locator("#depth-panel .fill").evaluate_all("bars => bars.map((bar) => bar.offsetHeight)")
    shares = [entry["probability"] for entry in distribution]
    wanted = [max(heights) * share / max(shares) for share in shares]
    assert heights == pytest.approx(wanted, abs=1.5)  # bars begin at zero; a pixel of rounding
    timing = answer["timing_ms"]
    rest = timing["total"] - sum(timing[part] for part in ("prompt", "think", "search", "explain"))
    spent = [float(text) for text in page.locator("#latency tbody td").all_inner_texts()]
    total = timing["total"] - timing["explain"]
    wanted = [timing["prompt"], timing["think"], timing["search"], rest, total]
    assert spent == pytest.approx(wanted, abs=0.51)
    widths = page.locator("#latency .part").evaluate_all(
        "parts => parts.map((part) => parseFloat(part.style.width))"
    )
    assert widths == pytest.approx([100 * part / total for part in wanted[:4]], abs=0.1)
    page.click("#measure")
    expect(page.locator("#depth-note")).to_contain_text("median of 3")
    automatic = {item.item_id for item in recommender.recommend(["sku1", "sku2"], 5)}
    same = [
        str(
            len(
                automatic & {item.item_id for item in recommender.recommend(["sku1", "sku2"], 5, depth=depth)}
            )
        )
        for depth in ("auto", 0, 1, 2, 3)
    ]
    assert page.locator("td[data-row=same]").all_inner_texts() == same
    assert all(float(text) > 0 for text in page.locator("td[data-row=time]").all_inner_texts())


def test_thoughts_and_the_beam_unfold(visit):
    page = visit()
    with page.expect_response(re.compile("v1/recommend")) as caught:
        page.evaluate("location.hash = '#items=sku1;sku12&beam=7&k=4'")
    answered(page)
    explanation = caught.value.json()["explanation"]
    steps = page.locator("#thoughts details")
    for number, step in enumerate(explanation["steps"]):
        said = steps.nth(number).locator(".segments q").all_inner_texts()
        assert said == [segment["text"] for segment in step["segments"]]
        codes = steps.nth(number).locator(".directions code").all_inner_texts()
        assert codes == [f"code {direction['code']}" for direction in step["directions"]]
        lines = steps.nth(number).locator(".directions li > small").all_inner_texts()
        for direction, line in zip(step["directions"], lines, strict=True):
            assert line.endswith("; ".join(item["title"] for item in direction["items"]))
    # Unfolded to the first item; the rest opens by keyboard, then all at once.
    expect(page.locator("#tree .leaf", has_text="#1")).to_be_visible()
    closed = page.locator("#tree > li > details:not([open]) > summary").first
    closed.focus()
    before = page.locator("#tree .leaf:visible").count()
    page.keyboard.press("Enter")
    assert page.locator("#tree details[open]").count() >= 2
    page.get_by_role("button", name="Unfold all").click()
    leaves = page.locator("#tree .leaf:visible")
    expect(leaves).to_have_count(7)
    assert before < 7

    def below(node):
        return [leaf for child in node["children"] for leaf in below(child)] if node["children"] else [node]

    wanted = below(explanation["beam"])
    assert page.locator("#tree .leaf .title").all_inner_texts() == [leaf["item"]["title"] for leaf in wanted]
    badges = page.locator("#tree .leaf .badge").all_inner_texts()
    assert badges == [f"#{leaf['rank']}" if leaf["rank"] else "\u2013" for leaf in wanted]
    page.get_by_role("button", name="Fold all").click()
    expect(leaves).to_have_count(0)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_needs_no_sideways_scrolling(visit, scheme):
    page = visit(viewport=PHONE, color_scheme=scheme, has_touch=True)
    assert fits(page)
    page.tap("#item")
    expect(page.locator("#item-options")).to_be_visible()
    assert fits(page)
    page.locator("#item-options [role=option]").nth(2).tap()
    answered(page)
    assert fits(page)
    force(page, 3)
    page.get_by_role("button", name="Unfold all").tap()
    closed = page.locator("#thoughts details:not([open]) > summary")
    while closed.count():
        closed.first.tap()
    assert page.locator("#thoughts details[open]").count() == 4
    assert fits(page)
    small = page.locator("button:visible, summary:visible, input:visible").evaluate_all(
        "all => all.map((e) => e.closest('label') ?? e).map((e) => e.getBoundingClientRect())"
        ".filter((box) => box.width < 24 || box.height < 24).length"
    )
    assert small == 0, "WCAG 2.2: targets of at least 24 by 24 pixels"
    expected = "rgb(255, 255, 255)" if scheme == "light" else "rgb(16, 22, 29)"
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == expected


def test_the_focus_can_be_seen_all_the_way(visit):
    page = visit("#items=sku1")
    answered(page)
    visited = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        name, style, width = page.evaluate(
            "() => { const at = document.activeElement, style = getComputedStyle(at);"
            " return [at.id || at.textContent.slice(0, 20), style.outlineStyle, parseFloat(style.outlineWidth)] }"
        )
        assert (style, width) == ("solid", 3), name
        visited.add(name)
    assert {"user", "item", "k", "beam", "seen", "slider", "measure"} <= visited


def test_problems_are_told_with_their_fix(visit):
    page = visit("#items=sku1;sku2x&k=10")
    problem = page.get_by_role("alert")
    expect(problem).to_contain_text("no item 'sku2x' in the catalogue; did you mean 'sku2'?")
    expect(problem.locator("li")).to_contain_text("use 'sku2'")
    expect(page.locator("#history .tag")).to_have_text("unknown")
    page.get_by_role("button", name="Remove sku2x").click()
    expect(problem).to_be_hidden()
    answered(page)
    page.fill("#k", "500")
    page.press("#k", "Enter")
    expect(problem).to_contain_text("k: Input should be less than or equal to 200")
    expect(page.locator("#results")).to_be_hidden()
    page.fill("#k", "5")
    page.press("#k", "Enter")
    expect(page.locator("#list li")).to_have_count(5)
    page.evaluate("location.hash = '#items=sku1&depth=9'")
    expect(problem).to_contain_text("use 'auto' or a number from 0 to 3")
    assert len(shown_items(page)) == 10  # the automatic list still stands
    page.fill("#user", "nobody")
    page.press("#user", "Enter")
    expect(problem).to_contain_text("no events of this user are known")
    page.route("**/v1/recommend", lambda route: route.abort())
    page.evaluate("location.hash = '#items=sku4'")
    expect(problem).to_contain_text("The server does not answer.")


@pytest.fixture(scope="module")
def plain(shop, tmp_path_factory):
    """A run of Stage 1 alone: no latent steps, no rationales, no titles but one; its users are not shown."""
    folder = tmp_path_factory.mktemp("plain")
    run = shop.write_run(folder / "run")
    shutil.rmtree(run / "anchor")
    for path in ("reasoning.json", "policy_head.safetensors"):
        (run / "latent_sft" / path).unlink()
    items = pl.read_parquet(run / "prepare" / "items.parquet")
    last = pl.col("item_index") == len(items) - 1
    items.with_columns(
        title=pl.when(last).then(pl.lit(MARKUP)).otherwise(pl.lit("")),
        item_id=pl.when(last).then(pl.lit(MARKUP_ID)).otherwise("item_id"),
    ).write_parquet(run / "prepare" / "items.parquet")
    made = Serving(run, folder)
    yield made.url, Recommender.load(run)
    made.close()


def test_a_run_without_latents_anchors_titles_or_users(visit, plain):
    url, recommender = plain
    page = visit(url=url)
    expect(page.locator("#facts")).to_contain_text("no latent steps")
    expect(page.locator("#user-hint")).to_contain_text("does not show its users")
    choose_item(page, "sku12")
    expect(page.locator("#history .title")).to_have_text(["sku12"])
    expected = [item.item_id for item in recommender.recommend(["sku12"], 10)]
    assert shown_items(page) == expected
    assert page.get_by_role("slider").count() == 0
    expect(page.locator("#thoughts details")).to_have_count(1)
    expect(page.locator("#thoughts .segments")).to_have_count(0)
    page.fill("#user", "ann")
    page.press("#user", "Enter")
    expect(page.locator("#history")).to_contain_text("the server keeps the history to itself")
    expect(page).to_have_url(re.compile("#user=ann$"))
    answered(page)
    assert shown_items(page) == [item.item_id for item in recommender.recommend_user("ann", 10)]


def test_markup_in_a_title_is_text(visit, plain):
    page = visit(url=plain[0])
    page.fill("#item", "onerror")
    option = page.locator("#item-options [role=option]")
    expect(option.locator("span")).to_have_text(MARKUP)
    expect(option.locator("small")).to_have_text(MARKUP_ID)
    page.press("#item", "Enter")
    expect(page.locator("#history .title")).to_have_text(MARKUP)
    page.fill("#k", "40")
    page.fill("#beam", "40")
    page.press("#beam", "Enter")
    expect(page.locator("#list li")).to_have_count(40)
    assert MARKUP in shown_items(page)
    page.get_by_role("button", name="Unfold all").click()
    assert MARKUP in page.locator("#tree .title").all_inner_texts()
    page.reload()
    expect(page.locator("#history .title")).to_have_text(MARKUP)
    page.evaluate("location.hash = '#user=%3Cimg src=x onerror=window.pwned=1%3E'")
    expect(page.get_by_role("alert")).to_contain_text("no events")
    assert page.locator("main :is(img, b, i)").count() == 0
    # Even if markup did get in, the policy would keep its script from running.
    page.evaluate("html => { document.querySelector('main').innerHTML = html }", MARKUP)
    page.wait_for_timeout(200)
    assert page.locator("main img").count() == 1
    assert page.evaluate("() => window.pwned === undefined")


def test_addresses_hold_any_view(visit):
    page = visit()
    ids = st.text(st.sampled_from(string.printable[:-5] + "\u00e9\u4e16\U0001f600"), min_size=1, max_size=8)
    views = st.fixed_dictionaries(
        {
            "user": st.just("") | ids,
            "orders": st.lists(st.lists(ids, min_size=1, max_size=3), max_size=3),
            "k": st.integers(1, 200),
            "beam": st.integers(1, 200),
            "seen": st.booleans(),
            "depth": st.just("auto") | st.integers(0, 64),
        }
    )
    page.evaluate("async () => { window.views = await import('./page/view.js') }")
    there_and_back = """view => {
        const orders = view.orders.map((ids) => ({items: ids.map((item_id) => ({item_id, title: ""}))}));
        const back = window.views.fromHash(new URL(window.views.toHash({...view, orders}), location).hash);
        return {...back, orders: back.orders.map((order) => order.items.map((item) => item.item_id))};
    }"""

    @settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
    @given(view=views)
    def holds(view):
        expected = view | {"orders": []} if view["user"] else view
        assert page.evaluate(there_and_back, view) == expected

    holds()
    for broken in (
        "#",
        "#&&=",
        "#items=%",
        "#user=%zz&k=x&depth=-1",
        "#items=,;,",
        "#=1&items",
        "#depth=2e9",
    ):
        view = page.evaluate("hash => window.views.fromHash(hash)", broken)
        assert view == page.evaluate("() => window.views.emptyView()")
