"""Around every request: a bounded body, a request id, a metric, and one log line without ids of users or items."""

import asyncio
import logging
import secrets
import time
from collections.abc import MutableMapping
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lasar.serving.metrics import Metrics
from lasar.serving.problems import ProblemError, defect

logger = logging.getLogger("lasar.serving.access")

_BODY_SECONDS = 30.0  # a body that takes longer to arrive is an attack or a broken client
_LOGGED_QUIETLY = {"/healthz", "/readyz", "/metrics"}


class Envelope:
    """ASGI middleware; the outermost of the app."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics, max_body_bytes: int) -> None:
        """Wrap `app`."""
        self._app, self._metrics, self._max_body_bytes = app, metrics, max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request; other kinds of scope pass through."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        request_id = secrets.token_hex(8)
        status, started = 500, False

        async def send_marked(message: Message) -> None:
            nonlocal status, started
            if message["type"] == "http.response.start":
                status, started = message["status"], True
                headers = list(message.get("headers", []))
                headers += [(b"x-request-id", request_id.encode()), (b"x-content-type-options", b"nosniff")]
                message = {**message, "headers": headers}
            await send(message)

        try:
            body = await self._read_body(scope, receive)
            await self._app(scope, _replay(body, receive), send_marked)
        except ProblemError as refused:  # raised while reading the body, before the app has begun
            await refused.response()(scope, receive, send_marked)
        except ConnectionResetError:
            status = 499  # the client left before its body was here
        except Exception as error:  # would otherwise be logged by the server, with its message
            internal = defect(error)
            if not started:
                await internal.response()(scope, receive, send_marked)
        finally:
            self._record(scope, status, time.perf_counter() - began, request_id)

    async def _read_body(self, scope: Scope, receive: Receive) -> bytes:
        limit = self._max_body_bytes
        too_large = ProblemError(
            413, "too-large", f"the body has more than {limit:,} bytes; split the request",
            headers={"connection": "close"},
        )  # fmt: skip
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > limit:
            raise too_large
        pieces, size = [], 0
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ConnectionResetError
                    pieces.append(message.get("body", b""))
                    size += len(pieces[-1])
                    if size > limit:
                        raise too_large
                    if not message.get("more_body", False):
                        return b"".join(pieces)
        except TimeoutError:
            raise ProblemError(
                408, "slow-body", f"the body did not arrive within {_BODY_SECONDS:.0f} s; send it again",
                headers={"connection": "close"},
            ) from None  # fmt: skip

    def _record(self, scope: MutableMapping[str, Any], status: int, seconds: float, request_id: str) -> None:
        # The route's template, never the path: a path can hold a user id.
        route = getattr(scope.get("route"), "path", "unmatched")
        method = scope["method"] if scope["method"] in _METHODS else "OTHER"
        self._metrics.requests.labels(route, method, str(status)).inc()
        self._metrics.request_seconds.labels(route).observe(seconds)
        level = logging.DEBUG if route in _LOGGED_QUIETLY else logging.INFO
        logger.log(level, "%s %s %d %.1f ms %s", method, route, status, seconds * 1000, request_id)


_METHODS = {"GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH"}


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body as one message, then whatever the connection has to say (that the client is gone)."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if not given:
            given = True
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return replay
