"""Errors as `application/problem+json` (RFC 9457): every one names the field and the fix."""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from sqlalchemy.exc import OperationalError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from lasar.errors import ConfigError, LasarError, nearest

logger = logging.getLogger(__name__)

TITLES = {
    "invalid-request": "The request is not valid",
    "unknown-item": "An item is not in the catalogue",
    "unknown-user": "The user is not known",
    "unknown-depth": "The model was not trained for this depth",
    "queue-full": "Too many requests",
    "deadline": "The answer took too long",
    "stopping": "The server is shutting down",
    "too-large": "The body is too large",
    "slow-body": "The body did not arrive",
    "closed": "This route is closed",
    "unauthorized": "The token is missing or wrong",
    "conflict": "The request does not fit the present state",
    "not-found": "There is nothing here",
    "not-allowed": "Not with this method",
    "database": "The database does not answer",
    "internal": "The server failed; the defect is ours",
}
_KIND_OF_STATUS = {404: "not-found", 405: "not-allowed", 413: "too-large"}
_UNION_TAG = re.compile(r"^(str|int|bool|float|none|nullable|list\[|literal\[|constrained|function-)")


class FieldError(TypedDict):
    """One thing that is wrong, where, and what to do about it."""

    field: str
    message: str
    fix: str


class ProblemError(Exception):
    """An answer that says what went wrong."""

    def __init__(
        self,
        status: int,
        kind: str,
        detail: str,
        *,
        errors: Sequence[FieldError] = (),
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Take the HTTP status, a key of `TITLES`, one sentence, the fields at fault, and extra headers."""
        super().__init__(detail)
        self.status, self.kind, self.detail = status, kind, detail
        self.errors, self.headers = list(errors), dict(headers or {})

    def as_dict(self) -> dict[str, Any]:
        """The body."""
        return {
            "type": f"urn:lasar:problem:{self.kind}",
            "title": TITLES[self.kind],
            "status": self.status,
            "detail": self.detail,
            "errors": self.errors,
        }

    def response(self) -> Response:
        """The HTTP response."""
        # Escaped to ASCII: what a client sent is quoted, and may be half a character.
        body = json.dumps(self.as_dict(), ensure_ascii=True)
        return Response(body, self.status, headers=self.headers, media_type="application/problem+json")


def problem_of(error: LasarError, *, field: str = "") -> ProblemError:
    """A LasarError as a problem: a wrong value of the request, or something this server cannot do."""
    if isinstance(error, ConfigError):
        detail: FieldError = {"field": field, "message": str(error), "fix": "change the value"}
        return ProblemError(422, "invalid-request", str(error), errors=[detail])
    return ProblemError(409, "conflict", str(error))


def install(app: FastAPI) -> None:
    """Render every error of the app as a problem."""
    app.add_exception_handler(ProblemError, _on_problem)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http)
    app.add_exception_handler(LasarError, _on_lasar)
    app.add_exception_handler(OperationalError, _on_database)


async def _on_problem(_: Request, error: Exception) -> Response:
    assert isinstance(error, ProblemError)
    return error.response()


async def _on_lasar(_: Request, error: Exception) -> Response:
    assert isinstance(error, LasarError)
    return problem_of(error).response()


async def _on_http(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    kind = _KIND_OF_STATUS.get(error.status_code, "invalid-request")
    return ProblemError(error.status_code, kind, str(error.detail), headers=error.headers).response()


async def _on_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    found = [_field_error(entry) for entry in error.errors()[:20]]
    named = found[0]["field"] or "the request"
    return ProblemError(422, "invalid-request", f"{named}: {found[0]['message']}", errors=found).response()


async def _on_database(_: Request, error: Exception) -> Response:
    logger.error("the database does not answer: %s", type(error).__name__)
    return ProblemError(
        503, "database", "the database does not answer; try again", headers={"retry-after": "1"}
    ).response()


def defect(error: Exception) -> ProblemError:
    """An unforeseen error as a problem; its type and place go to the log, its message may quote a history."""
    frames = error.__traceback__
    while frames is not None and frames.tb_next is not None:
        frames = frames.tb_next
    place = f"{frames.tb_frame.f_code.co_filename}:{frames.tb_lineno}" if frames else "?"
    logger.error("%s at %s", type(error).__name__, place)
    return ProblemError(500, "internal", "unexpected error; the server's log says where")


def _field_error(entry: dict[str, Any]) -> FieldError:
    parts = entry["loc"][1:]  # the first says body, query or path
    field = ""
    for position, part in enumerate(parts):
        if isinstance(part, int):
            field += f"[{part}]"
        elif position == 0 or not _UNION_TAG.match(part):
            field += f".{part}" if field else str(part)
    if entry["type"] == "json_invalid":
        return {"field": "", "message": "the body is not JSON", "fix": "send one JSON object, UTF-8"}
    fix = {"missing": "add the field", "extra_forbidden": "leave the field out"}.get(
        entry["type"], "change the value as the message says"
    )
    if entry["type"] == "extra_forbidden":
        from lasar.serving.schemas import FIELD_NAMES

        fix += nearest(str(parts[-1])[:64], FIELD_NAMES)
    return {"field": field, "message": str(entry["msg"]), "fix": fix}
