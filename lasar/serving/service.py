"""Everything a worker holds, and how a request becomes a query and an answer becomes a response."""

import asyncio
import hashlib
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from starlette.concurrency import run_in_threadpool

from lasar.cot.anchors import AnchorStore
from lasar.decoding.ranker import Ranker
from lasar.errors import ConfigError
from lasar.model.reasoner import LatentReasoner, check_depth
from lasar.recommender import Recommender, last_trained
from lasar.serving.batcher import Answered, DeadlineError, MicroBatcher, QueueFullError, StoppingError
from lasar.serving.catalogue import LiveCatalogue, Snapshot
from lasar.serving.catalogue_store import CatalogueStore
from lasar.serving.database import open_database
from lasar.serving.engine import Answer, Engine, Query, TimedReasoner
from lasar.serving.events import EventStore, Orders, RunUsers
from lasar.serving.item_vectors import TextVectors
from lasar.serving.metrics import Metrics
from lasar.serving.problems import FieldError, ProblemError, problem_of
from lasar.serving.rendering import explanation, item_ref
from lasar.serving.schemas import Recommended, RecommendRequest, RecommendResponse, Skipped, Timing
from lasar.serving.settings import Settings

logger = logging.getLogger(__name__)

_EXPIRE_SECONDS = 3600.0
_MAX_NAMED = 5  # unknown ids that get a suggestion
_STAGES = ("prompt", "think", "search", "explain")


class Service:
    """One worker's model, catalogue, histories and queue.

    Attributes:
        settings: as started.
        model: name of the training stage that is served.
        catalogue: its present version.
        events: histories in the database.
        users: of the run's event log.
        metrics: for Prometheus.
        has_rationales: whether thoughts can be put into words.
    """

    def __init__(self, settings: Settings, *, metrics: Metrics | None = None) -> None:
        """Load everything.

        Raises:
            LasarError: an artifact, the database or a setting cannot be used.
        """
        self.settings, self.metrics = settings, metrics or Metrics()
        share = max(1, (os.cpu_count() or 1) // settings.workers)
        torch.set_num_threads(settings.threads or min(share, torch.get_num_threads()))
        loaded = Recommender.load(
            settings.run, model=settings.model, device=settings.device, precision=settings.precision,
            prompt_memory_mb=settings.prompt_memory_mb,
        )  # fmt: skip
        self.model = settings.model or last_trained(settings.run)
        loaded.ranker.reasoner = reasoner = TimedReasoner(loaded.ranker.reasoner)
        database = open_database(settings.database_url)
        self.catalogue = LiveCatalogue(
            settings.run,
            ranker=loaded.ranker,
            store=CatalogueStore(database, catalogue=_identity(loaded.ranker)),
            texts=TextVectors(settings.run, text_model=settings.text_model),
        )
        self.events = EventStore(database)
        self.users = RunUsers(settings.run / "prepare", loaded.items.item_ids)
        anchors = _anchors(settings.run, reasoner)
        self.has_rationales = anchors is not None
        self._database = database
        self._engine = Engine(reasoner, anchors=anchors)
        self._batcher: MicroBatcher[Query, Answer] | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._show_version()

    @property
    def reasoning(self) -> LatentReasoner:
        """The model."""
        return self.catalogue.snapshot.recommender.ranker.reasoner

    async def start(self) -> None:
        """Start the engine thread and the housekeeping."""
        self._batcher = MicroBatcher(
            self._engine.answer,
            group=lambda query: query.group,
            max_queue=self.settings.max_queue,
            max_batch=self.settings.max_batch,
            linger_seconds=self.settings.linger_ms / 1000,
            on_batch=self._on_batch,
        )
        self._batcher.start()
        self._tasks = [asyncio.create_task(self._follow_catalogue())]
        if self.settings.retention_days is not None:
            self._tasks.append(asyncio.create_task(self._expire_events(self.settings.retention_days)))

    async def stop(self) -> None:
        """Answer what waits, then stop."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._batcher is not None:
            await self._batcher.close()
        self.close()

    def close(self) -> None:
        """Let go of the database."""
        self._database.dispose()

    async def not_ready(self) -> str:
        """Why requests should go elsewhere; empty if they are welcome, to the newest version of the catalogue."""
        if self._batcher is None or self._batcher.stopping:
            return "starting or stopping"
        try:
            await run_in_threadpool(self.events.count)
            if await run_in_threadpool(self.catalogue.refresh):
                self._show_version()
        except Exception as error:
            logger.error("the database does not answer: %s", type(error).__name__)
            return "the database does not answer"
        return ""

    async def recommend(self, request: RecommendRequest) -> RecommendResponse:
        """Answer one request.

        Raises:
            ProblemError: it cannot be answered; says why.
        """
        began = time.perf_counter()
        assert self._batcher is not None
        limit = self.settings.timeout_ms / 1000
        timeout = limit if request.timeout_ms is None else min(limit, request.timeout_ms / 1000)
        try:
            self._batcher.check_room(timeout)
            query, skipped = await self._query(request)
            left = max(0.001, timeout - (time.perf_counter() - began))
            answered = await self._batcher.submit(query, timeout_seconds=left)
        except QueueFullError as error:
            self.metrics.refused.labels("queue_full").inc()
            raise ProblemError(
                429, "queue-full", f"the queue is full; try again in {error.retry_after} s",
                headers={"retry-after": str(error.retry_after)},
            ) from None  # fmt: skip
        except DeadlineError as error:
            self.metrics.refused.labels("deadline").inc()
            what = "while it was being computed" if error.started else "in the queue"
            raise ProblemError(
                503, "deadline", f"no answer within {timeout * 1000:.0f} ms ({what}); try again, or raise timeout_ms",
                headers={"retry-after": "1"},
            ) from None  # fmt: skip
        except StoppingError:
            self.metrics.refused.labels("stopping").inc()
            raise ProblemError(
                503, "stopping", "this server is shutting down; ask another", headers={"retry-after": "1"}
            ) from None
        except asyncio.CancelledError:
            self.metrics.refused.labels("gone").inc()
            raise
        except ConfigError as error:
            raise problem_of(error) from None
        return self._response(query, answered, skipped, began)

    def resolve(
        self, snapshot: Snapshot, ids: Sequence[tuple[str, str]], *, skip: bool
    ) -> tuple[list[int | None], list[Skipped]]:
        """Item indices of (field, id) pairs.

        Raises:
            ProblemError: an id is unknown, and unknown ids are not to be skipped; names every one of them.
        """
        found = [snapshot.finder.index_of(item_id) for _, item_id in ids]
        unknown = [pair for pair, index in zip(ids, found, strict=True) if index is None]
        skipped = [
            Skipped(
                field=field,
                item_id=item_id,
                nearest=snapshot.finder.nearest(item_id) if number < _MAX_NAMED else None,
            )
            for number, (field, item_id) in enumerate(unknown)
        ]
        if skipped and not skip:
            errors = [_unknown(entry) for entry in skipped[:100]]
            more = f" (and {len(skipped) - 1} more)" if len(skipped) > 1 else ""
            detail = f"{errors[0]['field']}: {errors[0]['message']}{more}"
            raise ProblemError(422, "unknown-item", detail, errors=errors)
        return found, skipped

    async def user_orders(self, user_id: str) -> Orders | None:
        """What a user did: the run's event log, then the events stored here; None for an unknown user."""
        known, stored = self.users.history(user_id), await run_in_threadpool(self.events.history, user_id)
        if known is not None and await run_in_threadpool(self.events.is_forgotten, user_id):
            known = None
        return None if known is None and not stored else [*(known or []), *stored]

    async def _query(self, request: RecommendRequest) -> tuple[Query, list[Skipped]]:
        if (request.history is None) == (request.user_id is None):
            wrong: FieldError = {
                "field": "history",
                "message": "exactly one of history and user_id is needed",
                "fix": "give one of them; [] is an empty history",
            }
            raise ProblemError(422, "invalid-request", f"history: {wrong['message']}", errors=[wrong])
        self._check_depth(request)
        snapshot, skip = self.catalogue.snapshot, request.unknown == "skip"
        skipped: list[Skipped] = []
        if request.user_id is not None:
            orders = await self.user_orders(request.user_id)
            if orders is None and not skip:
                # No suggestion: it would tell one user's id to another.
                missing: FieldError = {
                    "field": "user_id", "message": "no events of this user are known",
                    "fix": "send events to /v1/events, give a history, or set unknown to 'skip' for an empty one",
                }  # fmt: skip
                raise ProblemError(404, "unknown-user", f"user_id: {missing['message']}", errors=[missing])
            ids = [
                ("user_id", item_id, order) for order, taken in enumerate(orders or []) for item_id in taken
            ]
            skip_history = True  # stored events may name items of a version that was rolled back
        else:
            ids = _flatten(request.history or [])
            skip_history = skip
        found, left_out = self.resolve(snapshot, [(field, i) for field, i, _ in ids], skip=skip_history)
        skipped += left_out
        kept = [(index, order) for index, (_, _, order) in zip(found, ids, strict=True) if index is not None]
        items = np.array([index for index, _ in kept], dtype=np.int32)
        lists: dict[str, NDArray[np.int32]] = {}
        for field, values in (
            ("exclude", request.exclude),
            ("deny", request.deny),
            ("allow", request.allow or []),
        ):
            listed, left_out = self.resolve(
                snapshot, [(f"{field}[{n}]", value) for n, value in enumerate(values)], skip=skip
            )
            skipped += left_out
            lists[field] = np.array([index for index in listed if index is not None], dtype=np.int32)
        seen = items if request.exclude_seen else items[:0]
        exclude = np.unique(np.concatenate([lists["exclude"], lists["deny"], seen, snapshot.inactive]))
        query = Query(
            snapshot=snapshot,
            items=items,
            baskets=np.array([order for _, order in kept], dtype=np.int32),
            exclude=exclude.astype(np.int32),
            allow=None if request.allow is None else lists["allow"],
            k=request.k,
            beam_width=request.beam_width,
            depth=request.depth,
            seed=request.seed,
            explain=request.explain,
        )
        return query, skipped

    def _check_depth(self, request: RecommendRequest) -> None:
        settings = self.reasoning.settings
        try:
            if isinstance(request.depth, int):
                check_depth(request.depth, settings.max_depth)
            elif request.depth == "sampled" and settings.fixed_depth is not None:
                raise ConfigError(
                    f"this model always takes {settings.fixed_depth} latent steps; use 'auto' or a number"
                )
        except ConfigError as error:
            fix = f"use 'auto' or a number from 0 to {settings.max_depth}"
            wrong: FieldError = {"field": "depth", "message": str(error), "fix": fix}
            raise ProblemError(422, "unknown-depth", str(error), errors=[wrong]) from None

    def _response(
        self, query: Query, answered: Answered[Answer], skipped: list[Skipped], began: float
    ) -> RecommendResponse:
        answer, snapshot = answered.result, query.snapshot
        seconds = {"queue": answered.queue_seconds} | answer.stage_seconds
        for stage, spent in seconds.items():
            self.metrics.stage_seconds.labels(stage).observe(spent)
        self.metrics.depth.observe(answer.depth)
        spent_ms = {stage: round(seconds.get(stage, 0.0) * 1000, 3) for stage in ("queue", *_STAGES)}
        total = round((time.perf_counter() - began) * 1000, 3)
        insight = answer.insight
        return RecommendResponse(
            items=[
                Recommended(rank=rank, score=score, **item_ref(snapshot, item).model_dump())
                for rank, (item, score) in enumerate(zip(answer.items, answer.scores, strict=True), start=1)
            ],
            depth=answer.depth,
            model=self.model,
            catalogue_version=snapshot.version,
            skipped=skipped,
            timing_ms=Timing(total=total, batch_size=answered.batch_size, **spent_ms),
            explanation=None if insight is None else explanation(snapshot, insight, answer.items),
        )

    def forget(self, user_id: str) -> int:
        """Delete a user's events, and what is in memory of anybody's history; how many events there were."""
        memory = self.catalogue.snapshot.recommender.ranker.memory
        if memory is not None:
            memory.clear()
        return self.events.forget(user_id)

    def _on_batch(self, size: int, seconds: float) -> None:
        memory = self.catalogue.snapshot.recommender.ranker.memory
        if memory is not None:
            self.metrics.prompt_tokens.labels("memory").inc(memory.last.known)
            self.metrics.prompt_tokens.labels("computed").inc(memory.last.tokens - memory.last.known)
        self.metrics.batch_size.observe(size)
        self.metrics.batch_seconds.observe(seconds)
        self.measure_queue()

    def measure_queue(self) -> None:
        """Tell the metrics how long the queue is."""
        self.metrics.queue.set(self._batcher.waiting if self._batcher is not None else 0)

    def _show_version(self) -> None:
        snapshot = self.catalogue.snapshot
        self.metrics.catalogue_version.set(snapshot.version)
        self.metrics.items.set(len(snapshot.items))

    async def _follow_catalogue(self) -> None:
        while True:
            await asyncio.sleep(self.settings.poll_seconds)
            try:
                if await run_in_threadpool(self.catalogue.refresh):
                    logger.info("catalogue version %d", self.catalogue.snapshot.version)
                self._show_version()
            except Exception as error:  # a database that is away for a while must not end the polling
                logger.error("cannot look for a new catalogue version: %s", type(error).__name__)

    async def _expire_events(self, days: float) -> None:
        while True:
            try:
                removed = await run_in_threadpool(self.events.expire, days)
                logger.info("%d events were older than %g days and are deleted", removed, days)
            except Exception as error:
                logger.error("cannot delete old events: %s", type(error).__name__)
            await asyncio.sleep(_EXPIRE_SECONDS)


def _identity(ranker: Ranker) -> str:
    """Hash of the trained semantic IDs: changes of the catalogue are made against them."""
    codes_IL = ranker.codes_IL
    return hashlib.sha256(f"{codes_IL.shape}".encode() + codes_IL.tobytes()).hexdigest()


def _anchors(run: Path, reasoner: LatentReasoner) -> AnchorStore | None:
    if not (run / "anchor" / "summary.json").is_file():
        return None
    store = AnchorStore.load(run / "anchor")
    width = reasoner.backbone.config.get_text_config().hidden_size
    return store if store.vectors_AD.shape[1] == width else None


def _flatten(history: Sequence[str | list[str]]) -> list[tuple[str, str, int]]:
    """Field, id and order number of every entry."""
    flat: list[tuple[str, str, int]] = []
    for position, entry in enumerate(history):
        if isinstance(entry, str):
            flat.append((f"history[{position}]", entry, position))
        else:
            flat += [(f"history[{position}][{n}]", item_id, position) for n, item_id in enumerate(entry)]
    return flat


def _unknown(entry: Skipped) -> FieldError:
    hint = f"; did you mean {entry.nearest!r}?" if entry.nearest else ""
    return {
        "field": entry.field,
        "message": f"no item {entry.item_id!r} in the catalogue{hint}",
        "fix": f"use {entry.nearest!r}, or set unknown to 'skip'"
        if entry.nearest
        else "set unknown to 'skip'",
    }
