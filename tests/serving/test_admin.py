"""The catalogue changed over HTTP while the server runs, and who may do it."""

import pytest

from lasar.serving import admin as admin_module

NEW = {"item_id": "new1", "title": "RED TEAPOT LARGE"}


def recommended(client, **body):
    response = client.post("/v1/recommend", json={"history": ["sku1"], "k": 60, "beam_width": 200} | body)
    return [item["item_id"] for item in response.json()["items"]]


ROUTES = [
    ("POST", "/admin/items", {"add": [NEW]}),
    ("GET", "/admin/catalogue", None),
    ("POST", "/admin/catalogue/rollback", {"version": 0}),
    ("DELETE", "/admin/users/ann", None),
]


@pytest.mark.parametrize(("method", "path", "body"), ROUTES)
def test_routes_are_closed_without_the_token(make_client, shop, method, path, body):
    client, tokenless = make_client(), make_client(admin_token=None)
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": shop.token},
                    {"authorization": f"Basic {shop.token}"}, {"authorization": f"Bearer {shop.token} "[:-2]},
                    {"authorization": "Bearer \xff".encode("latin-1")}):  # fmt: skip
        response = client.request(method, path, json=body, headers=headers)
        assert response.status_code == 401
        assert response.headers["www-authenticate"] == "Bearer"
    for token in (shop.token, "", "None"):
        response = tokenless.request(method, path, json=body, headers={"authorization": f"Bearer {token}"})
        assert response.status_code == 403
        assert "LASAR_ADMIN_TOKEN" in response.json()["detail"]


def test_every_admin_route_is_in_the_list_above(client):
    described = client.get("/openapi.json").json()["paths"]
    found = {
        (method.upper(), path.replace("{user_id}", "ann"))
        for path, operations in described.items()
        for method in operations
        if path.startswith("/admin")
    }
    assert found == {(method, path) for method, path, _ in ROUTES}


def test_tokens_are_compared_in_constant_time(admin, monkeypatch):
    compared = []

    def compare(given, wanted):
        compared.append((given, wanted))
        return False

    monkeypatch.setattr(admin_module.secrets, "compare_digest", compare)
    assert admin.get("/admin/catalogue").status_code == 401
    assert len(compared) == 1


def test_an_added_item_is_recommended_at_once(admin, shop):
    assert "new1" not in recommended(admin)
    answer = admin.post(
        "/admin/items", json={"add": [NEW, {"item_id": "new/2", "title": "x", "text": "BLUE MUG"}]}
    )
    assert answer.status_code == 200
    assert (answer.json()["version"], answer.json()["num_items"]) == (1, 42)
    codes = {tuple(item["codes"]) for item in answer.json()["added"]}
    taken = {tuple(admin.get(f"/v1/items/{item}").json()["codes"]) for item in shop.items}
    assert len(codes) == 2
    assert not codes & taken
    assert {"new1", "new/2"} <= set(recommended(admin))
    assert admin.get("/v1/items/new/2").json()["added"]
    assert admin.get("/v1/search", params={"q": "teapot large"}).json()["items"][0]["item_id"] == "new1"
    near = admin.get("/v1/similar/new1").json()["items"]
    assert near[0]["item_id"] == "sku0"  # RED TEAPOT: same words, and its text decides
    events = {"events": [{"user_id": "dan", "items": ["new1"]}]}
    assert admin.post("/v1/events", json=events).json()["stored"] == 1
    assert admin.post("/v1/recommend", json={"user_id": "dan"}).json()["skipped"] == []


def test_deactivated_items_are_never_returned_and_move_no_score(admin, recommender):
    before = recommender.recommend(["sku1"], 40, beam_width=200)
    gone = before[0].item_id
    answer = admin.post("/admin/items", json={"deactivate": [gone, gone]}).json()
    assert (answer["version"], answer["num_active"]) == (1, 39)
    body = {"history": ["sku1"], "k": 40, "beam_width": 200, "explain": True}
    after = admin.post("/v1/recommend", json=body).json()
    assert [item["item_id"] for item in after["items"]] == [item.item_id for item in before[1:]]
    assert [i["score"] for i in after["items"]] == pytest.approx([i.score for i in before[1:]], abs=1e-5)
    assert recommended(admin, allow=[gone, "sku2"]) == ["sku2"]
    assert gone not in [
        item["item_id"] for item in admin.get("/v1/similar/sku2", params={"limit": 100}).json()["items"]
    ]
    assert not admin.get(f"/v1/items/{gone}").json()["active"]
    named = [i["item_id"] for s in after["explanation"]["steps"] for d in s["directions"] for i in d["items"]]
    assert gone not in named
    # It stays in histories, and nothing to change makes no version.
    assert admin.post("/v1/recommend", json={"history": [gone]}).status_code == 200
    assert admin.post("/admin/items", json={"deactivate": [gone]}).json()["version"] == 1
    assert admin.post("/admin/items", json={"activate": [gone]}).json()["version"] == 2
    assert recommended(admin, k=40) == [item.item_id for item in before]


def test_rollback_brings_back_a_version(admin):
    admin.post("/admin/items", json={"add": [NEW], "deactivate": ["sku3"]})
    admin.post("/admin/items", json={"add": [{"item_id": "new2", "title": "GREEN CLOCK"}]})
    assert admin.post("/admin/catalogue/rollback", json={"version": 1}).json()["version"] == 3
    items = recommended(admin)
    assert "new1" in items
    assert not {"new2", "sku3"} & set(items)
    assert admin.post("/admin/catalogue/rollback", json={"version": 0}).json()["num_items"] == 40
    assert admin.get("/v1/items/new1").status_code == 404
    listed = admin.get("/admin/catalogue").json()
    assert listed["current"] == 4
    assert [(v["version"], v["parent"], v["action"]) for v in listed["versions"]] == [
        (1, 0, "add 1, deactivate 1"), (2, 1, "add 1"), (3, 1, "rollback to 1"), (4, 0, "rollback to 0"),
    ]  # fmt: skip
    missing = admin.post("/admin/catalogue/rollback", json={"version": 9})
    assert (missing.status_code, missing.json()["errors"][0]["field"]) == (422, "version")


@pytest.mark.parametrize(
    ("body", "status", "field"),
    [
        ({"add": [NEW, NEW]}, 409, "add[0].item_id"),
        ({"add": [NEW, {"item_id": "sku1", "title": "AGAIN"}]}, 409, "add[1].item_id"),
        ({"add": [NEW], "deactivate": ["sku99"]}, 422, "deactivate"),
        ({"add": [NEW], "activate": ["sku1"], "deactivate": ["sku1"]}, 422, "activate"),
        ({"add": [NEW, {"item_id": "new2", "title": "<br> "}]}, 409, None),
        ({"add": [{"item_id": "new3", "title": ""}]}, 422, "add[0].title"),
    ],
)
def test_a_refused_change_changes_nothing(admin, body, status, field):
    response = admin.post("/admin/items", json=body)
    assert response.status_code == status
    if field is not None:
        assert response.json()["errors"][0]["field"] == field
    assert admin.get("/v1/info").json()["catalogue_version"] == 0
    assert admin.get("/v1/items/new1").status_code == 404


def test_a_deleted_user_is_unknown_until_new_events_come(admin):
    admin.post("/v1/events", json={"events": [{"user_id": "ann", "items": ["sku9"]}] * 2})
    assert admin.request("DELETE", "/admin/users/ann").json() == {"deleted_events": 2}
    assert admin.post("/v1/recommend", json={"user_id": "ann"}).status_code == 404
    assert admin.request("DELETE", "/admin/users/ann").json() == {"deleted_events": 0}
    admin.post("/v1/events", json={"events": [{"user_id": "ann", "items": ["sku2"]}]})
    orders = admin.get("/v1/users/ann/history").json()["orders"]
    assert [[item["item_id"] for item in order] for order in orders] == [["sku2"]]


def test_what_was_computed_for_histories_is_used_again_and_goes_with_a_user(admin):
    memory = admin.app.state.service.catalogue.snapshot.recommender.ranker.memory
    body = {"history": [f"sku{n}" for n in range(9, 18)]}
    first = admin.post("/v1/recommend", json=body).json()
    assert len(memory) == 1
    again = admin.post("/v1/recommend", json=body).json()
    assert [item["item_id"] for item in again["items"]] == [item["item_id"] for item in first["items"]]
    assert memory.last.known == memory.last.tokens - 1
    page = admin.get("/metrics").text
    known, computed = (
        float(line.split()[-1])
        for source in ("memory", "computed")
        for line in page.splitlines()
        if line.startswith(f'lasar_prompt_tokens_total{{source="{source}"}}')
    )
    assert known == memory.last.known
    assert computed == memory.last.tokens + 1
    admin.request("DELETE", "/admin/users/ann")
    assert len(memory) == 0
