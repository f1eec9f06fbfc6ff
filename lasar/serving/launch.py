"""Starting a server: one process, or a parent that keeps several workers alive."""

import logging
import os
import sys
import tempfile
from dataclasses import replace

import uvicorn
from fastapi import FastAPI

from lasar.errors import LasarError
from lasar.serving.app import create_app
from lasar.serving.metrics import SHARED_FOLDER_VARIABLE
from lasar.serving.service import Service
from lasar.serving.settings import TOKEN_VARIABLE, Settings, token_from_environment

logger = logging.getLogger(__name__)

_GRACE_SECONDS = 5
_START_SECONDS = 120  # a worker that is silent for so long is replaced; importing and loading must fit in


def serve(settings: Settings, *, host: str, port: int) -> None:
    """Serve until SIGTERM or SIGINT; requests that were accepted are answered first.

    Raises:
        LasarError: the run, the database or a setting cannot be used.
    """
    _plain_access_log()
    settings = replace(settings, admin_token=token_from_environment())
    # Once here, whatever the number of workers: a mistake is one line, and the tables exist before workers race.
    service = Service(settings)
    if settings.admin_token is None:
        logger.info("admin routes are closed; %s is not set", TOKEN_VARIABLE)
    options = {
        "host": host,
        "port": port,
        "access_log": False,  # ours names routes, not paths: a path can hold a user id
        "server_header": False,
        "timeout_graceful_shutdown": settings.timeout_ms // 1000 + _GRACE_SECONDS,
        "timeout_keep_alive": 30,
        "timeout_worker_healthcheck": _START_SECONDS,
        "log_level": "warning",
    }
    logger.info("serving %s (%s) on http://%s:%d", settings.run, service.model, host, port)
    if settings.workers == 1:
        uvicorn.run(create_app(service), **options)  # type: ignore[arg-type]
        return
    service.close()
    settings.to_environment()
    with tempfile.TemporaryDirectory(prefix="lasar-metrics-") as shared:
        os.environ[SHARED_FOLDER_VARIABLE] = shared
        uvicorn.run(
            "lasar.serving.launch:app_of_worker",
            factory=True,
            workers=settings.workers,
            **options,  # type: ignore[arg-type]
        )


def _plain_access_log() -> None:
    # A line per request: what makes a terminal pretty costs as much as a small model's answer.
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(process)d %(message)s"))
    access = logging.getLogger("lasar.serving.access")
    access.addHandler(handler)
    access.setLevel(logging.INFO)
    access.propagate = False


def app_of_worker() -> FastAPI:
    """The app of a worker process; its settings come through the environment."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(process)d %(name)s %(message)s")
    logging.getLogger("lasar").setLevel(logging.INFO)
    _plain_access_log()
    try:
        return create_app(Service(Settings.from_environment()))
    except LasarError as error:
        logger.error("%s", error)
        sys.exit(2)
