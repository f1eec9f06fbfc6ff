"""Routes that anyone may use, against the Recommender and against what was planted."""

import asyncio
import logging
import re
import threading

import httpx2
import pytest

from lasar.serving.app import create_app

REQUESTS = [
    {"history": []},
    {"history": ["sku1", ["sku2", "sku3"], "sku4"], "k": 7},
    {"history": ["sku1", "sku2"], "k": 40, "beam_width": 5},
    {"history": ["sku1", "sku2"], "exclude_seen": True, "k": 40},
    {"history": ["sku5"], "exclude": ["sku6", "sku/7"], "k": 30},
    {"history": ["sku5"], "allow": ["sku6", "sku/7", "sku8"]},
    {"history": ["sku5"], "allow": []},
    {"history": ["sku9"] * 30, "depth": 0},
    {"history": ["sku9", "sku10"], "depth": 3, "beam_width": 3, "k": 3},
    {"history": ["sku9", "sku10"], "depth": "sampled", "seed": 4},
    {"history": ["sku9", "sku11"], "depth": "sampled", "seed": 9},
    {"user_id": "ann"},
    {"user_id": "bob", "k": 3, "explain": True},
]


def expected(recommender, request):
    wanted = {key: value for key, value in request.items() if key not in ("history", "user_id", "explain")}
    if "user_id" in request:
        return recommender.recommend_user(request["user_id"], **wanted)
    return recommender.recommend(request["history"], **wanted)


def assert_same(response, found):
    assert [item["item_id"] for item in response["items"]] == [item.item_id for item in found]
    assert [item["title"] for item in response["items"]] == [item.title for item in found]
    assert [item["rank"] for item in response["items"]] == list(range(1, len(found) + 1))
    scores = [item["score"] for item in response["items"]]
    assert scores == pytest.approx([item.score for item in found], abs=1e-5)


@pytest.mark.parametrize("request_body", REQUESTS)
def test_answers_equal_the_recommenders(client, recommender, request_body):
    response = client.post("/v1/recommend", json=request_body)
    assert response.status_code == 200
    assert_same(response.json(), expected(recommender, request_body))


def test_answers_computed_together_equal_the_recommenders(client, recommender):
    """One engine, all kinds of requests in its queue at once: batches form, and nobody's answer changes."""
    many = [REQUESTS[n % len(REQUESTS)] for n in range(60)]
    results = client.post("/v1/recommend/batch", json={"requests": many}).json()["results"]
    sizes = []
    for request, result in zip(many, results, strict=True):
        assert result["status"] == 200
        assert_same(result["response"], expected(recommender, request))
        sizes.append(result["response"]["timing_ms"]["batch_size"])
    assert max(sizes) > 4


def test_a_batch_answers_each_request_on_its_own(client):
    requests = [
        {"history": ["sku1"]},
        {"history": ["sku99"]},
        {"user_id": "nobody"},
        {"history": [], "depth": 9},
    ]
    results = client.post("/v1/recommend/batch", json={"requests": requests}).json()["results"]
    assert [result["status"] for result in results] == [200, 422, 404, 422]
    assert results[1]["problem"]["errors"][0]["field"] == "history[0]"


def test_unknown_items_are_named_with_the_nearest(client):
    body = {"history": ["SKU1", ["sku2", "sku3x"]], "deny": ["nothing like it"]}
    response = client.post("/v1/recommend", json=body)
    assert response.status_code == 422
    assert response.headers["content-type"] == "application/problem+json"
    problem = response.json()
    assert problem["type"] == "urn:lasar:problem:unknown-item"
    assert [error["field"] for error in problem["errors"]] == ["history[0]", "history[1][1]"]
    assert "did you mean 'sku1'?" in problem["errors"][0]["message"]
    assert "did you mean 'sku3'?" in problem["errors"][1]["message"]


def test_unknown_items_are_skipped_and_listed_where_asked(client, recommender):
    body = {"history": ["sku1", "nope", ["sku2", "SKU3"]], "exclude": ["zzz", "sku4"], "unknown": "skip"}
    answer = client.post("/v1/recommend", json=body).json()
    assert_same(answer, recommender.recommend(["sku1", ["sku2"]], exclude=["sku4"]))
    assert [(s["field"], s["item_id"]) for s in answer["skipped"]] == [
        ("history[1]", "nope"), ("history[2][1]", "SKU3"), ("exclude[0]", "zzz"),
    ]  # fmt: skip
    assert answer["skipped"][1]["nearest"] == "sku3"


def test_an_unknown_user_is_refused_without_naming_another(client, recommender):
    response = client.post("/v1/recommend", json={"user_id": "an"})
    assert response.status_code == 404
    assert "ann" not in response.text
    skipped = client.post("/v1/recommend", json={"user_id": "an", "unknown": "skip"})
    assert_same(skipped.json(), recommender.recommend([]))


@pytest.mark.parametrize(
    ("body", "field", "fix"),
    [
        ({}, "history", "give one of them"),
        ({"history": [], "user_id": "ann"}, "history", "give one of them"),
        ({"history": [], "body": 1}, "body", "leave the field out"),
        ({"histroy": []}, "histroy", "did you mean 'history'?"),
        ({"history": [], "k": 0}, "k", ""),
        ({"history": [], "k": "5"}, "k", ""),
        ({"history": [], "k": True}, "k", ""),
        ({"history": [], "depth": 4}, "depth", "a number from 0 to 3"),
        ({"history": [], "depth": "deep"}, "depth", ""),
        ({"history": ["a\x00b"]}, "history[0]", ""),
        ({"history": [["sku1", 7]]}, "history[0][1]", ""),
        ({"history": [], "allow": ["sku1"] * 10_001}, "allow", ""),
    ],
)
def test_errors_name_the_field_and_the_fix(client, body, field, fix):
    response = client.post("/v1/recommend", json=body)
    assert response.status_code == 422
    errors = response.json()["errors"]
    assert field in [error["field"] for error in errors]
    assert fix in " ".join(error["fix"] for error in errors)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"\xff\xfe", b'{"history": [NaN]}', b'"\\ud800"', b"[" * 100_000]
)
def test_bodies_that_are_no_requests(client, content):
    response = client.post("/v1/recommend", content=content, headers={"content-type": "application/json"})
    assert 400 <= response.status_code < 500
    assert response.headers["content-type"] == "application/problem+json"


def test_half_a_character_is_quoted_safely(client):
    body = rb'{"history": [], "\ud800": 1, "exclude": ["\udfff"]}'
    response = client.post("/v1/recommend", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 422


def test_items_similar_and_search(client, shop):
    item = client.get("/v1/items/sku/7").json()
    assert (item["item_id"], item["title"], item["active"]) == ("sku/7", shop.titles[7], True)
    assert len(item["codes"]) == 3
    response = client.get("/v1/items/sku77")
    assert response.status_code == 404
    assert "did you mean" in response.json()["detail"]
    similar = client.get("/v1/similar/sku0", params={"limit": 5}).json()["items"]
    assert "sku0" not in [found["item_id"] for found in similar]
    assert [found["similarity"] for found in similar] == sorted(
        (s["similarity"] for s in similar), reverse=True
    )
    found = client.get("/v1/search", params={"q": "lunch RED"}).json()["items"]
    assert [item["title"] for item in found] == ["RED LUNCH BAG"]
    # ann and bob took these; without words, the best known come first
    best = client.get("/v1/search", params={"q": "", "limit": 8}).json()["items"]
    assert {item["item_id"] for item in best} == {
        "sku3",
        "sku4",
        "sku5",
        "sku6",
        "sku/7",
        "sku8",
        "sku9",
        "sku10",
    }


def test_users_are_hidden_unless_shown(client, make_client):
    assert client.get("/v1/users", params={"prefix": "b"}).json() == {"user_ids": ["bob"]}
    orders = client.get("/v1/users/ann/history").json()["orders"]
    assert [[item["item_id"] for item in order] for order in orders] == [["sku3", "sku4"], ["sku5"]]
    closed = make_client()
    for path in ("/v1/users", "/v1/users/ann/history"):
        assert closed.get(path).status_code == 403


def test_events_make_a_user_known(client, recommender):
    events = [
        {"user_id": "dan", "items": ["sku1", "sku2"], "time": 2.0, "event_id": "b"},
        {"user_id": "dan", "items": ["sku3"], "time": 1.0, "event_id": "a"},
        {"user_id": "ann", "items": ["sku9"]},
    ]
    assert client.post("/v1/events", json={"events": events}).json()["stored"] == 3
    assert client.post("/v1/events", json={"events": events[:2]}).json()["stored"] == 0  # a retry
    answer = client.post("/v1/recommend", json={"user_id": "dan"}).json()
    assert_same(answer, recommender.recommend(["sku3", ["sku1", "sku2"]]))
    answer = client.post("/v1/recommend", json={"user_id": "ann"}).json()
    assert_same(answer, recommender.recommend([["sku3", "sku4"], ["sku5"], ["sku9"]]))


def test_events_with_unknown_items(client):
    body = {"events": [{"user_id": "dan", "items": ["sku1", "sku2x"]}]}
    refused = client.post("/v1/events", json=body)
    assert refused.status_code == 422
    assert refused.json()["errors"][0]["field"] == "events[0].items[1]"
    assert client.get("/v1/users/dan/history").status_code == 404  # nothing of it was stored
    stored = client.post("/v1/events", json=body | {"unknown": "skip"}).json()
    assert (stored["stored"], stored["skipped"][0]["nearest"]) == (1, "sku2")


def test_an_answer_tells_how_it_came_about(client):
    answer = client.post("/v1/recommend", json={"history": ["sku1"], "depth": 2}).json()
    assert (answer["depth"], answer["model"], answer["catalogue_version"]) == (2, "latent_sft", 0)
    timing = answer["timing_ms"]
    assert 0 < timing["prompt"] + timing["think"] + timing["search"] <= timing["total"]


def test_health_info_page_and_openapi(client):
    assert client.get("/healthz").json()["status"] == "ok"
    assert client.get("/readyz").json()["status"] == "ready"
    info = client.get("/v1/info").json()
    assert (info["num_items"], info["max_depth"], info["has_rationales"]) == (40, 3, True)
    assert info["engine"] == "fused"  # a model this narrow gains nothing from bf16
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert not re.search(r'(src|href)="(https?:)?//', page.text), "the page loads nothing from elsewhere"
    described = client.get("/openapi.json").json()
    for route in described["paths"].values():
        for operation in route.values():
            assert operation["description"] if "description" in operation else operation["summary"]
    assert described["components"]["schemas"]["RecommendRequest"]["examples"]


def test_ready_means_the_newest_catalogue(make_client, make_service):
    client, other = make_client(poll_seconds=3600), make_service()
    other.catalogue.change(deactivate=["sku3"])
    assert client.get("/v1/info").json()["catalogue_version"] == 0
    assert client.get("/readyz").json()["status"] == "ready"
    assert client.get("/v1/info").json()["catalogue_version"] == 1


def test_metrics_count_by_stage_and_never_name_anyone(client):
    client.post("/v1/recommend", json={"user_id": "ann", "explain": True})
    client.get("/v1/items/sku1")
    page = client.get("/metrics").text
    for line in (
        'lasar_requests_total{method="POST",route="/v1/recommend",status="200"} 1.0',
        'lasar_stage_seconds_count{stage="queue"} 1.0',
        'lasar_stage_seconds_count{stage="think"} 1.0',
        'lasar_stage_seconds_count{stage="explain"} 1.0',
        "lasar_batch_size_count 1.0",
        "lasar_depth_count 1.0",
        "lasar_queue_length 0.0",
        "lasar_items 40.0",
    ):
        assert line in page
    assert "ann" not in page
    assert "sku1" not in page


def test_logs_hold_no_history(client, caplog):
    with caplog.at_level(logging.DEBUG):
        client.post("/v1/recommend", json={"history": ["sku1", "sku2x"]})
        client.post("/v1/recommend", json={"user_id": "ann"})
        client.post("/v1/events", json={"events": [{"user_id": "ann", "items": ["sku3"]}]})
        client.get("/v1/users/ann/history")
        client.get("/v1/items/sku1")
    text = "\n".join(record.getMessage() for record in caplog.records if record.name.startswith("lasar"))
    assert "POST /v1/recommend 422" in text
    assert not re.search(r"sku\d|\bann\b", text)


def test_a_defect_is_a_problem_and_keeps_its_message_to_itself(client, monkeypatch, caplog):
    def broken(*_, **__):
        raise RuntimeError("sku1 of ann")

    monkeypatch.setattr("lasar.serving.catalogue.Snapshot.similar", broken)
    response = client.get("/v1/similar/sku1")
    assert response.status_code == 500
    assert response.json()["type"] == "urn:lasar:problem:internal"
    assert "of ann" not in response.text + caplog.text
    assert "RuntimeError at" in caplog.text


def test_a_full_queue_and_a_late_answer(make_service):
    """A held engine: the queue fills (429, Retry-After), then the deadline strikes (503), then all goes on."""
    service = make_service(max_queue=2, max_batch=1, linger_ms=0)
    release, answer = threading.Event(), service._engine.answer

    def held(queries):
        release.wait(20)
        return answer(queries)

    service._engine.answer = held

    async def scenario():
        app = create_app(service)
        transport = httpx2.ASGITransport(app=app)
        async with (
            app.router.lifespan_context(app),
            httpx2.AsyncClient(transport=transport, base_url="http://test") as http,
        ):
            late = {"history": ["sku1"], "timeout_ms": 200}
            running = asyncio.create_task(http.post("/v1/recommend", json=late))
            await asyncio.sleep(0.1)
            patient = [
                asyncio.create_task(http.post("/v1/recommend", json={"history": []})) for _ in range(2)
            ]
            await asyncio.sleep(0.05)
            refused = await http.post("/v1/recommend", json={"history": []})
            first = await running
            release.set()
            return refused, first, await asyncio.gather(*patient)

    refused, late, patient = asyncio.run(scenario())
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) >= 1
    assert (late.status_code, late.json()["type"]) == (503, "urn:lasar:problem:deadline")
    assert [response.status_code for response in patient] == [200, 200]


def test_a_client_that_leaves_is_not_computed(make_service):
    service = make_service(max_batch=1, linger_ms=0)
    release, answer, computed = threading.Event(), service._engine.answer, []

    def held(queries):
        release.wait(20)
        computed.extend(query.items.tolist() for query in queries)
        return answer(queries)

    service._engine.answer = held
    left = asyncio.Event()

    async def scenario():
        app = create_app(service)

        async def post(body, leaves):
            sent = False

            async def receive():
                nonlocal sent
                if not sent:
                    sent = True
                    return {"type": "http.request", "body": body, "more_body": False}
                await (left.wait() if leaves else asyncio.Event().wait())
                return {"type": "http.disconnect"}

            messages = []

            async def send(message):
                messages.append(message)

            headers = [(b"content-type", b"application/json")]
            scope = {
                "type": "http", "method": "POST", "path": "/v1/recommend", "raw_path": b"/v1/recommend",
                "query_string": b"", "headers": headers, "http_version": "1.1", "scheme": "http",
                "server": ("test", 80), "client": ("test", 1), "root_path": "", "asgi": {"version": "3.0"},
            }  # fmt: skip
            await app(scope, receive, send)
            return messages[0]["status"]

        async with app.router.lifespan_context(app):
            first = asyncio.create_task(post(b'{"history": ["sku1"]}', leaves=False))
            await asyncio.sleep(0.1)
            gone = asyncio.create_task(post(b'{"history": ["sku2"]}', leaves=True))
            last = asyncio.create_task(post(b'{"history": ["sku3"]}', leaves=False))
            await asyncio.sleep(0.1)
            left.set()
            assert await gone == 499
            release.set()
            return await first, await last

    assert asyncio.run(scenario()) == (200, 200)
    assert computed == [[1], [3]]
