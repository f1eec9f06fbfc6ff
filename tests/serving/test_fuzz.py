"""Bodies, paths and parameters that nobody would send: never a 5xx, never a hang, always a problem that says why."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from lasar.serving.app import create_app
from lasar.serving.service import Service
from lasar.serving.settings import Settings

TOKEN = "a-token-that-is-long-enough"
ids = st.sampled_from(["sku1", "sku2", "sku/7", "SKU3", "sku40", "new1", "ann", ""]) | st.text(max_size=12)
junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
history = st.lists(ids | st.lists(ids, max_size=3), max_size=12)
FIELDS = {
    "history": history,
    "user_id": ids,
    "k": st.integers(-1, 201),
    "exclude": st.lists(ids, max_size=5),
    "deny": st.lists(ids, max_size=5),
    "allow": st.none() | st.lists(ids, max_size=5),
    "exclude_seen": st.booleans(),
    "depth": st.sampled_from(["auto", "sampled", "deep"]) | st.integers(-1, 5),
    "seed": st.integers(-1, 2**70),
    "beam_width": st.integers(0, 201),
    "unknown": st.sampled_from(["skip", "skip", "refuse", "ask"]),
    "explain": st.booleans(),
}


def mutated(fields):
    """Objects with some of the fields, a few of them junk."""
    return st.fixed_dictionaries({}, optional={name: values | junk for name, values in fields.items()})


def plausible(fields):
    return st.fixed_dictionaries({}, optional=fields)


requests = plausible(FIELDS | {"unknown": st.just("skip")}) | mutated(FIELDS)
event = (
    plausible({"user_id": ids, "items": st.lists(ids, max_size=3), "time": st.floats(), "event_id": ids})
    | junk
)
item = plausible({"item_id": ids, "title": st.text(max_size=30), "text": st.text(max_size=30)}) | junk
BODIES = st.one_of(
    st.tuples(st.just("/v1/recommend"), requests),
    st.tuples(st.just("/v1/recommend"), junk),
    st.tuples(st.just("/v1/recommend/batch"), plausible({"requests": st.lists(requests, max_size=3)}) | junk),
    st.tuples(
        st.just("/v1/events"),
        plausible({"events": st.lists(event, max_size=3), "unknown": st.just("skip")}) | junk,
    ),
    st.tuples(
        st.just("/admin/items"),
        plausible({"add": st.lists(item, max_size=1), "activate": st.lists(ids, max_size=2),
                   "deactivate": st.lists(ids, max_size=2)}) | junk,
    ),
    st.tuples(st.just("/admin/catalogue/rollback"), plausible({"version": st.integers(-1, 3)}) | junk),
)  # fmt: skip


@pytest.fixture(scope="module")
def fuzzed(run, tmp_path_factory):
    """One server for the whole file: what it has been through only makes it a better target."""
    database = f"sqlite:///{tmp_path_factory.mktemp('fuzz') / 'state.sqlite'}"
    service = Service(
        Settings(
            run=run, database=database, admin_token=TOKEN, timeout_ms=600_000, linger_ms=0, show_users=True
        )
    )
    with TestClient(create_app(service), raise_server_exceptions=False) as client:
        client.headers["authorization"] = f"Bearer {TOKEN}"
        yield client


def check(response):
    assert response.status_code < 500, response.text
    if response.status_code >= 400:
        assert response.headers["content-type"] == "application/problem+json"
        problem = response.json()
        assert problem["status"] == response.status_code
        assert problem["detail"]


def fuzz(fuzzed, path, body):
    content = json.dumps(body, ensure_ascii=True).encode()
    check(fuzzed.post(path, content=content, headers={"content-type": "application/json"}))


@settings(max_examples=200, suppress_health_check=list(HealthCheck))
@given(sent=BODIES)
def test_bodies(fuzzed, sent):
    fuzz(fuzzed, *sent)


@pytest.mark.slow
@settings(max_examples=10_000, suppress_health_check=list(HealthCheck))
@given(sent=BODIES)
def test_ten_thousand_bodies(fuzzed, sent):
    fuzz(fuzzed, *sent)


@settings(max_examples=100, suppress_health_check=list(HealthCheck))
@given(content=st.binary(max_size=200))
def test_bytes(fuzzed, content):
    check(fuzzed.post("/v1/recommend", content=content, headers={"content-type": "application/json"}))


@settings(max_examples=100, suppress_health_check=list(HealthCheck))
@given(name=st.text(min_size=1, max_size=20), limit=st.integers(-5, 200) | st.text(max_size=3))
def test_paths_and_parameters(fuzzed, name, limit):
    from urllib.parse import quote

    path = quote(name, safe="", errors="replace")
    for url in (f"/v1/items/{path}", f"/v1/similar/{path}", f"/v1/users/{path}/history", f"/{path}"):
        check(fuzzed.get(url, params={"limit": str(limit).encode("utf-8", "replace").decode()}))
    check(fuzzed.get("/v1/search", params={"q": path, "limit": 5}))


@pytest.mark.parametrize("route", ["/v1/items/", "/v1/similar/", "/v1/users/", "/"])
@pytest.mark.parametrize(
    "path",
    ["..%2f..%2f..%2fetc%2fpasswd", "../../etc/passwd", "%2e%2e/%2e%2e/recipe.json", "/etc/passwd", "..%5c..%5cx",
     "file:///etc/passwd", "page.html", "%00", "..%c0%af"],
)  # fmt: skip
def test_no_path_reaches_a_file(fuzzed, route, path):
    """By construction: an id is looked up in a dictionary, and no route opens a file that a request names."""
    response = fuzzed.get(route + path)
    assert response.status_code in (404, 403, 405, 422)
    assert "root:" not in response.text


@pytest.mark.slow
def test_schemathesis_finds_no_server_error(fuzzed):
    schemathesis = pytest.importorskip("schemathesis")

    schema = schemathesis.openapi.from_dict(fuzzed.get("/openapi.json").json())
    probed = 0
    for operation in schema.get_all_operations():

        @settings(max_examples=60, suppress_health_check=list(HealthCheck), deadline=None)
        @given(case=operation.ok().as_strategy())
        def probe(case):
            sent = case.as_transport_kwargs(base_url="http://testserver")
            sent.pop("cookies", None)
            sent["headers"] = dict(sent["headers"]) | {"authorization": f"Bearer {TOKEN}"}
            response = fuzzed.request(**sent)
            assert response.status_code < 500, (case.method, case.path, response.text)

        probe()
        probed += 1
    assert probed >= 15
