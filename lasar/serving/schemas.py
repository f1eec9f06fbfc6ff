"""Bodies of requests and responses; the OpenAPI document, its bounds and its examples come from here."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

MAX_K = MAX_BEAM = 200
MAX_HISTORY = 1000
MAX_IDS = 10_000
MAX_BATCH = 64
_NO_CONTROL = r"^[^\x00-\x1f\x7f]+$"  # a database or a log line never sees a NUL or a line break
_YEAR_2100 = 4102444800.0

Id = Annotated[str, StringConstraints(min_length=1, max_length=256, pattern=_NO_CONTROL)]
Order = Annotated[list[Id], Field(min_length=1, max_length=MAX_HISTORY)]
History = Annotated[list[Id | Order], Field(max_length=MAX_HISTORY)]
DepthChoice = Literal["auto", "sampled"] | Annotated[int, Field(ge=0, le=64)]


class _Request(BaseModel):
    # Strict: "5" is not a number and true is not 1, so that a mistake is told, not guessed at.
    model_config = ConfigDict(extra="forbid", strict=True)


class RecommendRequest(_Request):
    """A history or a user, and what is wanted."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"history": ["85123A", ["71053", "84406B"]], "k": 5, "exclude_seen": True},
                {"user_id": "12347", "k": 10, "depth": 2, "explain": True},
            ]
        }
    )

    history: History | None = Field(
        None, description="Item ids, oldest first; a nested list is one order. Either this or `user_id`."
    )
    user_id: Id | None = Field(
        None, description="A user of the run's event log, or one whose events were sent to `/v1/events`."
    )
    k: int = Field(10, ge=1, le=MAX_K, description="How many items.")
    exclude: list[Id] = Field([], max_length=MAX_IDS, description="Item ids not to return.")
    deny: list[Id] = Field(
        [], max_length=MAX_IDS, description="As `exclude`; for a standing list beside the request's own."
    )
    allow: list[Id] | None = Field(None, max_length=MAX_IDS, description="The only item ids to choose from.")
    exclude_seen: bool = Field(False, description="Never return an item of the history.")
    depth: DepthChoice = Field(
        "auto", description="Latent steps before answering: `auto`, `sampled`, or a number (0 for none)."
    )
    seed: int = Field(0, ge=0, le=2**63 - 1, description="Of a `sampled` depth.")
    beam_width: int = Field(50, ge=1, le=MAX_BEAM, description="Beams of the search; raised to `k`.")
    unknown: Literal["refuse", "skip"] = Field(
        "refuse", description="What to do with ids that are not known: refuse the request, or leave them out."
    )
    explain: bool = Field(False, description="Also return what the model thought.")
    timeout_ms: int | None = Field(
        None,
        ge=100,
        le=600_000,
        description="Shortest useful time to answer; the server's limit is an upper bound.",
    )


class BatchRequest(_Request):
    """Many requests at once; each is answered, or refused, on its own."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"requests": [{"history": ["85123A"]}, {"user_id": "12347", "k": 3}]}]
        }
    )

    requests: list[RecommendRequest] = Field(min_length=1, max_length=MAX_BATCH)


class EventIn(_Request):
    """Items that a user took together."""

    user_id: Id
    items: list[Id] = Field(min_length=1, max_length=MAX_HISTORY, description="One order.")
    time: float | None = Field(
        None, ge=0, le=_YEAR_2100, allow_inf_nan=False, description="Seconds since 1970; now by default."
    )
    event_id: Annotated[str, StringConstraints(min_length=1, max_length=128, pattern=_NO_CONTROL)] | None = (
        Field(None, description="Your name for it: sent twice, it is stored once.")
    )


class EventsRequest(_Request):
    """Events to append."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"events": [{"user_id": "12347", "items": ["85123A"], "event_id": "order-536365"}]}]
        }
    )

    events: list[EventIn] = Field(min_length=1, max_length=1000)
    unknown: Literal["refuse", "skip"] = Field("refuse", description="What to do with unknown item ids.")


class ItemIn(_Request):
    """An item to add."""

    item_id: Id
    title: Annotated[str, StringConstraints(min_length=1, max_length=1000)]
    text: Annotated[str, StringConstraints(max_length=10_000)] | None = Field(
        None,
        description="What it is embedded by, as the run's items were: title, brand, categories; the title by default.",
    )


class AdminItemsRequest(_Request):
    """Changes of the catalogue; all of a request together are one version, or none if one of them is refused."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"add": [{"item_id": "NEW-1", "title": "RED RETROSPOT TEAPOT"}]}]}
    )

    add: list[ItemIn] = Field([], max_length=500)
    deactivate: list[Id] = Field([], max_length=MAX_IDS)
    activate: list[Id] = Field([], max_length=MAX_IDS)


class RollbackRequest(_Request):
    """A version to go back to."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"version": 0}]})

    version: int = Field(ge=0, le=2**31 - 1)


class ItemRef(BaseModel):
    """An item by name."""

    item_id: str
    title: str


class Recommended(ItemRef):
    """A recommended item; `score` is the summed log-probability of its codes, at most 0."""

    rank: int
    score: float


class Skipped(BaseModel):
    """An id that was left out, where it stood, and the closest known one."""

    field: str
    item_id: str
    nearest: str | None = None


class SegmentOut(BaseModel):
    """A rationale segment near a thought."""

    text: str
    similarity: float


class DirectionOut(BaseModel):
    """A first code the model favours at a step, and the best known items beneath it."""

    code: int
    probability: float
    num_items: int
    items: list[ItemRef]


class StepOut(BaseModel):
    """A latent step; 0 is before any thinking."""

    number: int
    segments: list[SegmentOut]
    directions: list[DirectionOut]


class BeamNode(BaseModel):
    """A prefix of a semantic ID in the beam; leaves name an item and its rank."""

    level: int
    code: int | None
    probability: float
    score: float
    num_items: int
    item: ItemRef | None = None
    rank: int | None = None
    children: list["BeamNode"] = []


class DepthProbability(BaseModel):
    """How probable the Policy Head finds a depth."""

    depth: int
    probability: float


class Explanation(BaseModel):
    """What the model thought."""

    distribution: list[DepthProbability] | None = Field(
        description="None where depth was not the model's choice."
    )
    steps: list[StepOut]
    beam: BeamNode


class Timing(BaseModel):
    """Milliseconds of this request; prompt, think and search are those of its whole batch."""

    queue: float
    prompt: float
    think: float
    search: float
    explain: float
    total: float
    batch_size: int


class RecommendResponse(BaseModel):
    """A list, and how it came about."""

    items: list[Recommended]
    depth: int
    model: str
    catalogue_version: int
    skipped: list[Skipped]
    timing_ms: Timing
    explanation: Explanation | None = None


class ProblemOut(BaseModel):
    """`application/problem+json` (RFC 9457)."""

    type: str
    title: str
    status: int
    detail: str
    errors: list[dict[str, str]] = []


class BatchResult(BaseModel):
    """One answer of a batch: `response` if `status` is 200, else `problem`."""

    status: int
    response: RecommendResponse | None = None
    problem: ProblemOut | None = None


class BatchResponse(BaseModel):
    """Answers in the order of the requests."""

    results: list[BatchResult]


class EventsResponse(BaseModel):
    """How many events were new; they are on disk."""

    stored: int
    skipped: list[Skipped]


class ItemOut(ItemRef):
    """An item."""

    text: str
    codes: list[int] = Field(description="Its semantic ID.")
    active: bool
    added: bool = Field(description="Whether it came after training.")


class SimilarItem(ItemRef):
    """An item with a similar vector."""

    similarity: float


class SimilarResponse(BaseModel):
    """Nearest first."""

    items: list[SimilarItem]


class FoundItem(ItemRef):
    """A search result."""

    active: bool


class SearchResponse(BaseModel):
    """Titles that hold every word; those that begin with the text, then the best known, first."""

    items: list[FoundItem]


class UsersResponse(BaseModel):
    """Ids of users of the run's event log."""

    user_ids: list[str]


class UserHistoryResponse(BaseModel):
    """A user's orders, oldest first."""

    orders: list[list[ItemRef]]


class InfoResponse(BaseModel):
    """What a page needs to know about the server."""

    version: str
    model: str
    engine: str = Field(description="Which path computes, in which precision.")
    max_depth: int
    fixed_depth: int | None
    num_levels: int
    codebook_size: int
    num_items: int
    num_active: int
    catalogue_version: int
    has_orders: bool = Field(description="Whether the model reads which items of a history were one order.")
    has_rationales: bool
    show_users: bool
    has_users: bool
    max_k: int
    max_beam_width: int


class CatalogueResponse(BaseModel):
    """The catalogue version that answers are made from, from now on, by this worker."""

    version: int
    num_items: int
    num_active: int
    added: list[ItemOut] = []


class VersionOut(BaseModel):
    """A line of the catalogue's history; `created` in seconds since 1970."""

    version: int
    parent: int
    action: str
    created: float


class VersionsResponse(BaseModel):
    """All versions, oldest first; 0 is the catalogue as trained and not listed."""

    current: int
    versions: list[VersionOut]


class ForgottenResponse(BaseModel):
    """How many events were deleted."""

    deleted_events: int


class StatusResponse(BaseModel):
    """Health."""

    status: str
    reason: str = ""


def _field_names() -> frozenset[str]:
    models: tuple[Any, ...] = (
        RecommendRequest, BatchRequest, EventIn, EventsRequest, ItemIn, AdminItemsRequest, RollbackRequest,
    )  # fmt: skip
    return frozenset(name for model in models for name in model.model_fields)


FIELD_NAMES = _field_names()
