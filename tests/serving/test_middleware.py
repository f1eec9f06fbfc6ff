"""What surrounds every request."""

import asyncio

import pytest

from lasar.serving import middleware
from lasar.serving.metrics import Metrics
from lasar.serving.middleware import Envelope


def test_oversized_bodies_are_refused(make_client):
    client = make_client(max_body_bytes=1000)
    small = client.post("/v1/recommend", json={"history": ["sku1"]})
    assert small.status_code == 200
    assert len(small.headers["x-request-id"]) == 16
    large = client.post("/v1/recommend", json={"history": ["sku1"] * 500})
    assert large.status_code == 413
    assert "1,000 bytes" in large.json()["detail"]

    def pieces():
        for _ in range(100):
            yield b" " * 100

    streamed = client.post("/v1/recommend", content=pieces())  # no Content-Length to trust
    assert streamed.status_code == 413


def call(messages, *, length=None, limit=100):
    """Status of a request whose body arrives in these messages."""
    sent, reached = [], []

    async def app(scope, receive, send):
        reached.append((await receive())["body"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def receive():
        if not messages:
            await asyncio.sleep(60)
        return messages.pop(0)

    async def send(message):
        sent.append(message)

    headers = [] if length is None else [(b"content-length", str(length).encode())]
    scope = {"type": "http", "method": "POST", "path": "/", "headers": headers}
    asyncio.run(Envelope(app, metrics=Metrics(), max_body_bytes=limit)(scope, receive, send))
    return [m["status"] for m in sent if m["type"] == "http.response.start"], reached


def piece(body, more):
    return {"type": "http.request", "body": body, "more_body": more}


def test_a_body_arrives_whole():
    assert call([piece(b"ab", True), piece(b"cd", False)]) == ([200], [b"abcd"])


@pytest.mark.parametrize("length", [None, 5])
def test_a_lying_length_does_not_help(length):
    assert call([piece(b"x" * 60, True), piece(b"x" * 60, True)], length=length) == ([413], [])


def test_a_declared_length_is_refused_before_anything_is_read():
    messages = [piece(b"x", False)]
    assert call(messages, length=101) == ([413], [])
    assert len(messages) == 1


def test_a_body_that_never_ends_is_given_up(monkeypatch):
    monkeypatch.setattr(middleware, "_BODY_SECONDS", 0.05)
    assert call([piece(b"x", True)]) == ([408], [])


def test_a_client_that_leaves_early_gets_nothing():
    assert call([piece(b"x", True), {"type": "http.disconnect"}]) == ([], [])
