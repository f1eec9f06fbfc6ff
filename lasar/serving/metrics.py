"""What Prometheus is told. Labels are routes, stages and outcomes: never a user, an item or a history."""

import os
from pathlib import Path

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
    multiprocess,
)

CONTENT_TYPE = CONTENT_TYPE_LATEST
SHARED_FOLDER_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """All metrics of one worker; with several workers, /metrics adds them up."""

    def __init__(self) -> None:
        """Register everything in a registry of our own, so that a process can hold several apps."""
        own = CollectorRegistry()
        self._registry = own
        self.requests = Counter(
            "lasar_requests", "HTTP requests.", ["route", "method", "status"], registry=own
        )
        self.request_seconds = Histogram(
            "lasar_request_seconds",
            "From the first byte to the last.",
            ["route"],
            buckets=_SECONDS,
            registry=own,
        )
        self.stage_seconds = Histogram(
            "lasar_stage_seconds",
            "Per request: queue, prompt, think, search, explain.",
            ["stage"],
            buckets=_SECONDS,
            registry=own,
        )
        self.batch_size = Histogram(
            "lasar_batch_size", "Requests decoded together.", buckets=_SIZES, registry=own
        )
        self.batch_seconds = Histogram(
            "lasar_batch_seconds", "Duration of a batch.", buckets=_SECONDS, registry=own
        )
        self.prompt_tokens = Counter(
            "lasar_prompt_tokens", "Tokens of histories.", ["source"], registry=own
        )  # memory, computed
        self.depth = Histogram(
            "lasar_depth", "Latent steps taken.", buckets=(0, 1, 2, 3, 4, 5, 6, 7, 8), registry=own
        )
        self.queue = Gauge(
            "lasar_queue_length", "Requests waiting.", registry=own, multiprocess_mode="livesum"
        )
        self.refused = Counter(
            "lasar_refused", "Recommendations not made.", ["reason"], registry=own
        )  # queue_full, deadline, gone, stopping
        self.events = Counter("lasar_events", "Events stored.", registry=own)
        self.catalogue_version = Gauge(
            "lasar_catalogue_version", "Newest version in use.", registry=own, multiprocess_mode="livemax"
        )
        self.items = Gauge("lasar_items", "Items, active or not.", registry=own, multiprocess_mode="livemax")

    def page(self) -> bytes:
        """The exposition text."""
        if os.environ.get(SHARED_FOLDER_VARIABLE):
            shared = CollectorRegistry()
            multiprocess.MultiProcessCollector(shared)  # type: ignore[no-untyped-call]
            return generate_latest(shared)
        return generate_latest(self._registry)


def tidy_shared_folder() -> None:
    """Drop the gauges of workers that are gone; a killed one could not do it itself."""
    folder = os.environ.get(SHARED_FOLDER_VARIABLE)
    if not folder:
        return
    for path in Path(folder).glob("gauge_live*_*.db"):
        pid = int(path.stem.rpartition("_")[2])
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            path.unlink(missing_ok=True)
        except PermissionError:
            pass
