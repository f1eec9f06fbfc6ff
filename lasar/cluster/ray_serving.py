"""The server as a Ray Serve application: `serve run lasar.cluster.ray_serving:app run=RUN`.

Every replica is the same app as `lasar serve` with one worker: its own model, its own batches, its own queue. What
they share is the database: users' events, and the versions of the catalogue, which each replica follows. How many there
are is Ray's business (`autoscaling_config` of the deployment `lasar`).
"""

from collections.abc import Callable
from dataclasses import fields
from typing import Any

from fastapi import FastAPI
from pydantic import TypeAdapter, ValidationError

from lasar.errors import ConfigError, nearest, require
from lasar.serving.app import create_app
from lasar.serving.service import Service
from lasar.serving.settings import Settings, token_from_environment

_OURS = ("workers", "admin_token")  # replicas are Ray's; the token comes from the environment
# Requests of a replica at a time from which Ray adds another: two batches, one at work and one that fills up.
_BUSY_BATCHES = 2


def app(arguments: dict[str, Any]) -> Any:
    """Build the application.

    Args:
        arguments: fields of `lasar.serving.settings.Settings`, `run` among them, as text or values; `replicas` (how
            many there are always, 1) and `max_replicas` (how many there may be; as many as `replicas`).

    Raises:
        ConfigError: an argument is unknown or wrong.
        MissingExtraError: Ray is not installed.
    """
    serve = require("ray.serve", extra="ray")
    least = _number(arguments, "replicas", 1)
    most = _number(arguments, "max_replicas", least)
    if most < least:
        raise ConfigError(f"max_replicas={most}: must be at least replicas={least}")
    settings = settings_from(
        {name: value for name, value in arguments.items() if name not in ("replicas", "max_replicas")}
    )
    deployment = serve.deployment(
        serve.ingress(builder(settings))(),
        name="lasar",
        max_ongoing_requests=settings.max_queue + settings.max_batch,
        autoscaling_config={
            "min_replicas": least, "max_replicas": most, "target_ongoing_requests": _BUSY_BATCHES * settings.max_batch,
        },
        ray_actor_options={
            "num_cpus": settings.threads or 1, "num_gpus": 1 if settings.device == "cuda" else 0,
        },
        graceful_shutdown_timeout_s=settings.timeout_ms / 1000 + 5,
    )  # fmt: skip
    return deployment.bind()


def settings_from(arguments: dict[str, Any]) -> Settings:
    """Settings of every replica; without `threads`, one.

    Raises:
        ConfigError: an argument is unknown or wrong, or `run` is missing.
    """
    known = [field.name for field in fields(Settings) if field.name not in _OURS]
    for name in arguments:
        if name not in known:
            raise ConfigError(
                f"{name}: no such argument{nearest(name, [*known, 'replicas', 'max_replicas'])}"
            )
    if "run" not in arguments:
        raise ConfigError("run: missing; give run=FOLDER, a run folder or an exported one")
    try:
        settings = TypeAdapter(Settings).validate_python({"threads": 1, **arguments})
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"{first['loc'][0]}={first['input']}: {first['msg']}") from None
    if not settings.run.is_dir():
        raise ConfigError(f"run={settings.run}: no such folder; every machine needs it at this path")
    return settings


def builder(settings: Settings) -> Callable[[], FastAPI]:
    """What a replica calls to make its app; the admin token travels in it, not in what Ray shows of a deployment."""
    values = {field.name: getattr(settings, field.name) for field in fields(Settings)}
    values |= {"run": settings.run.absolute(), "admin_token": token_from_environment()}

    def build() -> FastAPI:
        return create_app(Service(Settings(**values)))

    return build


def _number(arguments: dict[str, Any], name: str, default: int) -> int:
    try:
        value = int(arguments.get(name, default))
    except ValueError:
        raise ConfigError(f"{name}={arguments[name]}: must be a whole number") from None
    if value < 1:
        raise ConfigError(f"{name}={value}: must be at least 1")
    return value
