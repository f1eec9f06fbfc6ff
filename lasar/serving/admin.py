"""Routes that change the catalogue or delete a user: open only with a token, compared in constant time."""

import secrets
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Request
from fastapi.security import HTTPBearer
from starlette.concurrency import run_in_threadpool

from lasar.serving.catalogue import (
    ItemText,
    KnownItemError,
    NoSuchItemError,
    NoSuchVersionError,
    Snapshot,
)
from lasar.serving.problems import ProblemError
from lasar.serving.rendering import item_out
from lasar.serving.schemas import (
    AdminItemsRequest,
    CatalogueResponse,
    ForgottenResponse,
    RollbackRequest,
    VersionOut,
    VersionsResponse,
)
from lasar.serving.service import Service
from lasar.serving.settings import TOKEN_VARIABLE

_PROBLEM: dict[str, Any] = {
    "content": {"application/problem+json": {"schema": {"$ref": "#/components/schemas/ProblemOut"}}}
}
_RESPONSES: dict[int | str, dict[str, Any]] = {
    401: {"description": "The token is missing or wrong.", **_PROBLEM},
    403: {"description": "The server has no token: admin routes are closed.", **_PROBLEM},
    422: {"description": "A field is wrong; `errors` names it and the fix.", **_PROBLEM},
}
_CONFLICT: dict[int | str, dict[str, Any]] = {
    409: {"description": "The catalogue cannot be changed like that.", **_PROBLEM}
}

_bearer = HTTPBearer(auto_error=False, description=f"The value of {TOKEN_VARIABLE} on the server.")


def _authorize(request: Request, _: Annotated[Any, Depends(_bearer)]) -> None:
    token = _service(request).settings.admin_token
    if token is None:
        raise ProblemError(
            403,
            "closed",
            f"admin routes are closed; start the server with {TOKEN_VARIABLE} in its environment",
        )
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    same = secrets.compare_digest(given.encode("utf-8", "surrogateescape"), token.encode())
    if not (same and scheme.lower() == "bearer"):
        raise ProblemError(
            401, "unauthorized", "the token is missing or wrong; send: Authorization: Bearer TOKEN",
            headers={"www-authenticate": "Bearer"},
        )  # fmt: skip


admin = APIRouter(prefix="/admin", dependencies=[Depends(_authorize)], responses=_RESPONSES)


@admin.post("/items", responses=_CONFLICT)
async def change_items(body: AdminItemsRequest, request: Request) -> CatalogueResponse:
    """Add items from their text, deactivate and reactivate items: all of it, as one version, or nothing."""
    service = _service(request)
    both = set(body.activate) & set(body.deactivate)
    if both:
        raise _wrong("activate", f"{sorted(both)[0]!r} is also in deactivate", "name it in one of them")
    items = [ItemText(i.item_id, i.title, i.text or i.title) for i in body.add]
    try:
        snapshot = await run_in_threadpool(
            service.catalogue.change, add=items, activate=body.activate, deactivate=body.deactivate
        )
    except KnownItemError as error:
        detail = f"{str(error)!r} is in the catalogue already, or twice in the request"
        where = next(f"add[{n}].item_id" for n, item in enumerate(items) if item.item_id == str(error))
        raise ProblemError(
            409, "conflict", f"{where}: {detail}",
            errors=[{"field": where, "message": detail, "fix": "leave it out, or give it another id"}],
        ) from None  # fmt: skip
    except NoSuchItemError as error:
        field = "activate" if str(error) in body.activate else "deactivate"
        nearest = service.catalogue.snapshot.finder.nearest(str(error))
        fix = f"use {nearest!r}" if nearest else "leave it out"
        raise _wrong(field, f"no item {str(error)!r} in the catalogue", fix) from None
    return _catalogue(snapshot, added=[item.item_id for item in items])


@admin.get("/catalogue")
async def versions(request: Request) -> VersionsResponse:
    """All versions of the catalogue."""
    service = _service(request)
    rows = await run_in_threadpool(service.catalogue.versions)
    return VersionsResponse(
        current=service.catalogue.snapshot.version, versions=[VersionOut(**row._asdict()) for row in rows]
    )


@admin.post("/catalogue/rollback", responses=_CONFLICT)
async def rollback(body: RollbackRequest, request: Request) -> CatalogueResponse:
    """Make a new version that equals an old one."""
    try:
        snapshot = await run_in_threadpool(_service(request).catalogue.rollback, body.version)
    except NoSuchVersionError:
        raise _wrong("version", f"there is no version {body.version}", "see GET /admin/catalogue") from None
    return _catalogue(snapshot)


@admin.delete("/users/{user_id:path}")
async def forget_user(user_id: Annotated[str, Path(max_length=256)], request: Request) -> ForgottenResponse:
    """Delete a user's events, and stop using what the run's event log says about them."""
    return ForgottenResponse(deleted_events=await run_in_threadpool(_service(request).forget, user_id))


def _catalogue(snapshot: Snapshot, *, added: list[str] | None = None) -> CatalogueResponse:
    indices = [snapshot.finder.index_of(item_id) for item_id in added or []]
    return CatalogueResponse(
        version=snapshot.version,
        num_items=len(snapshot.items),
        num_active=len(snapshot.items) - len(snapshot.inactive),
        added=[item_out(snapshot, index) for index in indices if index is not None],
    )


def _wrong(field: str, message: str, fix: str) -> ProblemError:
    return ProblemError(
        422,
        "invalid-request",
        f"{field}: {message}",
        errors=[{"field": field, "message": message, "fix": fix}],
    )


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service
