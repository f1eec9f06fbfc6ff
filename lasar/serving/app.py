"""The HTTP routes that anyone may use, and the app they belong to."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, FastAPI, Query, Request
from fastapi import Path as PathParameter
from fastapi.routing import APIRoute
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response

from lasar import __version__
from lasar.serving import problems
from lasar.serving.admin import admin
from lasar.serving.events import Event
from lasar.serving.metrics import CONTENT_TYPE, tidy_shared_folder
from lasar.serving.middleware import Envelope
from lasar.serving.problems import ProblemError
from lasar.serving.rendering import item_out, item_ref
from lasar.serving.schemas import (
    MAX_BEAM,
    MAX_K,
    BatchRequest,
    BatchResponse,
    BatchResult,
    EventsRequest,
    EventsResponse,
    FoundItem,
    InfoResponse,
    ItemOut,
    ProblemOut,
    RecommendRequest,
    RecommendResponse,
    SearchResponse,
    SimilarItem,
    SimilarResponse,
    StatusResponse,
    UserHistoryResponse,
    UsersResponse,
)
from lasar.serving.service import Service

T = TypeVar("T")

# The page is files of ours and nothing inline: a script that got into it some other way would not run.
_PAGE_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
        "frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
    ),
    "cache-control": "no-cache",  # after an upgrade, no old script meets a new API
    "referrer-policy": "no-referrer",
}
_PAGE_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
# Read once; a name is looked up among these and never becomes a path.
_PAGE_FILES = {
    file.name: (_PAGE_TYPES[file.suffix], file.read_bytes())
    for file in Path(__file__).with_name("page").iterdir()
    if file.suffix in _PAGE_TYPES
}
Limit = Annotated[int, Query(ge=1, le=100)]
ItemId = Annotated[str, PathParameter(max_length=256, description="An item id; it may contain slashes.")]
UserId = Annotated[str, PathParameter(max_length=256)]

_PROBLEM: dict[str, Any] = {
    "content": {"application/problem+json": {"schema": {"$ref": "#/components/schemas/ProblemOut"}}}
}
_INVALID: dict[int | str, dict[str, Any]] = {
    422: {"description": "A field is wrong; `errors` names it and the fix.", **_PROBLEM}
}
_BODY: dict[int | str, dict[str, Any]] = {
    413: {"description": "The body is too large.", **_PROBLEM},
    **_INVALID,
}
_MISSING: dict[int | str, dict[str, Any]] = {404: {"description": "Unknown.", **_PROBLEM}, **_INVALID}
_BUSY: dict[int | str, dict[str, Any]] = {
    429: {"description": "The queue is full; `Retry-After` says when to come back.", **_PROBLEM},
    503: {"description": "The deadline passed, or the server is shutting down.", **_PROBLEM},
}

public = APIRouter()


def create_app(service: Service) -> FastAPI:
    """The ASGI app of a loaded service."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        tidy_shared_folder()
        await service.start()
        try:
            yield
        finally:
            await service.stop()

    app = FastAPI(
        title="lasar",
        version=__version__,
        summary="Recommendations from semantic IDs and latent reasoning.",
        lifespan=lifespan,
        docs_url=None,  # both would load scripts from elsewhere
        redoc_url=None,
        generate_unique_id_function=_operation_id,
        separate_input_output_schemas=False,
    )
    app.state.service = service
    problems.install(app)
    app.include_router(public)
    app.include_router(admin)
    app.add_middleware(Envelope, metrics=service.metrics, max_body_bytes=service.settings.max_body_bytes)
    return app


@public.post(
    "/v1/recommend",
    response_model=RecommendResponse,
    responses={**_BODY, **_BUSY, 404: {"description": "The user is unknown.", **_PROBLEM}},
)
async def recommend(body: RecommendRequest, request: Request) -> Response:
    """Recommend the next items for a history or a known user."""
    return _json(await _while_connected(request, _service(request).recommend(body)))


@public.post("/v1/recommend/batch", response_model=BatchResponse, responses=_BODY)
async def recommend_batch(body: BatchRequest, request: Request) -> Response:
    """Answer many requests; each has its own status."""
    service = _service(request)

    async def one(single: RecommendRequest) -> BatchResult:
        try:
            return BatchResult(status=200, response=await service.recommend(single))
        except ProblemError as problem:
            return BatchResult(status=problem.status, problem=ProblemOut(**problem.as_dict()))

    answers = await _while_connected(request, _all([one(single) for single in body.requests]))
    return _json(BatchResponse(results=answers))


@public.post("/v1/events", responses=_BODY)
async def append_events(body: EventsRequest, request: Request) -> EventsResponse:
    """Append events to users' histories; they are on disk when this answers."""
    service, now = _service(request), time.time()
    named = [
        (f"events[{n}].items[{i}]", item_id)
        for n, event in enumerate(body.events)
        for i, item_id in enumerate(event.items)
    ]
    found, skipped = service.resolve(service.catalogue.snapshot, named, skip=body.unknown == "skip")
    known = {item_id for (_, item_id), index in zip(named, found, strict=True) if index is not None}
    events = [
        Event(
            user_id=event.user_id,
            items=[item_id for item_id in event.items if item_id in known],
            time=now if event.time is None else event.time,
            event_id=event.event_id,
        )
        for event in body.events
    ]
    stored = await run_in_threadpool(service.events.append, [event for event in events if event.items])
    service.metrics.events.inc(stored)
    return EventsResponse(stored=stored, skipped=skipped)


@public.get("/v1/items/{item_id:path}", responses=_MISSING)
async def item(item_id: ItemId, request: Request) -> ItemOut:
    """An item's title, text, semantic ID and state."""
    snapshot = _service(request).catalogue.snapshot
    return item_out(snapshot, _index(request, item_id))


@public.get(
    "/v1/similar/{item_id:path}",
    responses={**_MISSING, 409: {"description": "This run has no item vectors.", **_PROBLEM}},
)
async def similar(item_id: ItemId, request: Request, limit: Limit = 10) -> SimilarResponse:
    """Items whose vectors point most nearly the same way."""
    snapshot, index = _service(request).catalogue.snapshot, _index(request, item_id)
    if snapshot.vectors_IE is None:
        raise ProblemError(409, "conflict", "this run has no artifact 'embed'; export it with the run")
    near = await run_in_threadpool(snapshot.similar, index, limit=limit)
    return SimilarResponse(
        items=[SimilarItem(**item_ref(snapshot, i).model_dump(), similarity=cosine) for i, cosine in near]
    )


@public.get("/v1/search", responses=_INVALID)
async def search(
    request: Request, q: Annotated[str, Query(max_length=200)] = "", limit: Limit = 20
) -> SearchResponse:
    """Search titles and ids; an empty text gives the best known items."""
    snapshot = _service(request).catalogue.snapshot
    found = (await run_in_threadpool(snapshot.finder.search, q, limit=limit)).tolist()
    return SearchResponse(
        items=[FoundItem(**item_ref(snapshot, i).model_dump(), active=snapshot.is_active(i)) for i in found]
    )


@public.get(
    "/v1/users", responses={403: {"description": "Not shown by this server.", **_PROBLEM}, **_INVALID}
)
async def users(
    request: Request, prefix: Annotated[str, Query(max_length=256)] = "", limit: Limit = 20
) -> UsersResponse:
    """Some users of the run's event log; only where the server was started with --show-users."""
    service = _service(request)
    _refuse_hidden_users(service)
    found = (user_id for user_id in service.users.user_ids if user_id.startswith(prefix))
    return UsersResponse(user_ids=[user_id for user_id, _ in zip(found, range(limit), strict=False)])


@public.get(
    "/v1/users/{user_id:path}/history",
    responses={403: {"description": "Not shown by this server.", **_PROBLEM}, **_MISSING},
)
async def user_history(user_id: UserId, request: Request) -> UserHistoryResponse:
    """A user's orders; only where the server was started with --show-users."""
    service = _service(request)
    _refuse_hidden_users(service)
    orders = await service.user_orders(user_id)
    if orders is None:
        raise ProblemError(404, "unknown-user", "no events of this user are known")
    snapshot = service.catalogue.snapshot
    indices = [[snapshot.finder.index_of(item_id) for item_id in order] for order in orders]
    return UserHistoryResponse(
        orders=[[item_ref(snapshot, i) for i in order if i is not None] for order in indices]
    )


@public.get("/v1/info")
async def info(request: Request) -> InfoResponse:
    """What this server recommends with, and its limits."""
    service = _service(request)
    snapshot, settings = service.catalogue.snapshot, service.reasoning.settings
    return InfoResponse(
        version=__version__,
        model=service.model,
        engine=snapshot.recommender.ranker.engine,
        max_depth=settings.max_depth,
        fixed_depth=settings.fixed_depth,
        num_levels=snapshot.catalog.num_levels,
        codebook_size=snapshot.catalog.codebook_size,
        num_items=len(snapshot.items),
        num_active=len(snapshot.items) - len(snapshot.inactive),
        catalogue_version=snapshot.version,
        has_orders=service.reasoning.vocabulary.orders,
        has_rationales=service.has_rationales,
        show_users=service.settings.show_users,
        has_users=bool(service.users.user_ids),
        max_k=MAX_K,
        max_beam_width=MAX_BEAM,
    )


@public.get("/healthz")
async def healthz() -> StatusResponse:
    """Whether the process lives."""
    return StatusResponse(status="ok")


@public.get("/readyz", response_model=StatusResponse, responses={503: {"model": StatusResponse}})
async def readyz(request: Request) -> Response:
    """Whether requests are welcome."""
    reason = await _service(request).not_ready()
    answer = StatusResponse(status="not ready" if reason else "ready", reason=reason)
    return JSONResponse(answer.model_dump(), 503 if reason else 200)


@public.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def metrics(request: Request) -> Response:
    """Prometheus exposition."""
    service = _service(request)
    service.measure_queue()
    page = await run_in_threadpool(service.metrics.page)
    return Response(page, headers={"content-type": CONTENT_TYPE})


@public.get("/", include_in_schema=False)
async def page() -> Response:
    """The page to look through."""
    return _page_file("index.html")


@public.get("/page/{name}", include_in_schema=False)
async def page_file(name: str) -> Response:
    """A script or the style sheet of the page."""
    return _page_file(name)


def _page_file(name: str) -> Response:
    if name not in _PAGE_FILES:
        raise ProblemError(404, "not-found", "the page has no such file; it is at /")
    media_type, content = _PAGE_FILES[name]
    return Response(content, media_type=media_type, headers=_PAGE_HEADERS)


async def _while_connected(request: Request, answer: Awaitable[T]) -> T:
    """Await an answer, unless the client leaves first: then nobody computes it."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, watching = asyncio.ensure_future(answer), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ProblemError(499, "invalid-request", "the client closed the connection")
        return working.result()
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _all(parts: list[Awaitable[T]]) -> list[T]:
    return list(await asyncio.gather(*parts))


def _json(answer: RecommendResponse | BatchResponse) -> Response:
    # Built from our own models: checking them a second time would cost more than making them.
    return Response(answer.model_dump_json(), media_type="application/json")


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


def _index(request: Request, item_id: str) -> int:
    snapshot = _service(request).catalogue.snapshot
    index = snapshot.finder.index_of(item_id)
    if index is None:
        nearest = snapshot.finder.nearest(item_id)
        hint = f"; did you mean {nearest!r}?" if nearest else ""
        detail = f"no item {item_id!r} in the catalogue{hint}"
        fix = f"use {nearest!r}" if nearest else "search with /v1/search"
        raise ProblemError(
            404, "unknown-item", detail, errors=[{"field": "item_id", "message": detail, "fix": fix}]
        )
    return index


def _refuse_hidden_users(service: Service) -> None:
    if not service.settings.show_users:
        raise ProblemError(403, "closed", "users are not shown; start the server with --show-users")


def _operation_id(route: APIRoute) -> str:
    return route.name
