"""What a server is started with, and how it reaches worker processes."""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import get_args

from lasar.errors import ConfigError
from lasar.model.precision import PrecisionChoice

TOKEN_VARIABLE = "LASAR_ADMIN_TOKEN"
_SETTINGS_VARIABLE = "LASAR_SERVE_SETTINGS"
_MIN_TOKEN_LENGTH = 16


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of one server; all workers share them.

    Attributes:
        run: run folder, or a folder that `lasar export` made.
        model: training stage to serve; the last one that has an artifact by default.
        device: `auto`, `cpu` or `cuda`.
        precision: of matrix products on CPUs: `fp32`, `bf16`, or `auto`, bf16 where that is faster.
        database: SQLAlchemy URL of histories and catalogue changes; a SQLite file in the run folder by default.
        text_model: folder or hub id of the text encoder for new items; the run's own by default.
        max_queue: requests that may wait; the next one is refused with 429.
        max_batch: requests decoded together.
        linger_ms: how long an idle engine waits for company after the first request.
        timeout_ms: longest time any request may take.
        max_body_bytes: larger bodies are refused with 413.
        poll_seconds: how often a worker looks for a catalogue version that another one made.
        retention_days: events older than this are deleted; kept for ever by default.
        show_users: let anyone list users and read their histories (for a demonstration).
        prompt_memory_mb: megabytes of each worker for histories seen lately; 0 is off. See `Recommender.load`.
        threads: PyTorch threads of each worker; by default PyTorch's own choice (it reads OMP_NUM_THREADS), at most the
            worker's share of the cores.
        workers: worker processes.
        admin_token: bearer token of the admin routes; they are closed without one.
    """

    run: Path
    model: str | None = None
    device: str = "auto"
    precision: PrecisionChoice = "auto"
    database: str | None = None
    text_model: str | None = None
    max_queue: int = 256
    max_batch: int = 32
    linger_ms: float = 2.0
    timeout_ms: int = 5000
    max_body_bytes: int = 1 << 20
    poll_seconds: float = 2.0
    retention_days: float | None = None
    show_users: bool = False
    prompt_memory_mb: int = 128
    threads: int | None = None
    workers: int = 1
    admin_token: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        """Refuse values that no server can run with."""
        for name in ("max_queue", "max_batch", "timeout_ms", "max_body_bytes", "poll_seconds", "workers"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name}={getattr(self, name)}: must be positive")
        for name in ("retention_days", "threads"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ConfigError(f"{name}={getattr(self, name)}: must be positive, or leave it out")
        if self.precision not in get_args(PrecisionChoice):
            raise ConfigError(f"precision={self.precision!r}: one of {', '.join(get_args(PrecisionChoice))}")
        for name in ("linger_ms", "prompt_memory_mb"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)}: must not be negative")
        if self.admin_token is not None and len(self.admin_token) < _MIN_TOKEN_LENGTH:
            raise ConfigError(
                f"{TOKEN_VARIABLE}: has {len(self.admin_token)} characters, at least {_MIN_TOKEN_LENGTH} are needed; "
                'make one with: python -c "import secrets; print(secrets.token_urlsafe(32))"'
            )

    @property
    def database_url(self) -> str:
        """The URL given, or that of a SQLite file in the run folder."""
        return self.database or f"sqlite:///{(self.run / 'serving' / 'state.sqlite').absolute()}"

    def to_environment(self) -> None:
        """Leave the settings where worker processes find them; the token stays in its own variable."""
        values = {name: value for name, value in asdict(self).items() if name != "admin_token"}
        os.environ[_SETTINGS_VARIABLE] = json.dumps(values | {"run": str(self.run.absolute())})

    @classmethod
    def from_environment(cls) -> "Settings":
        """What `to_environment` left."""
        values = json.loads(os.environ[_SETTINGS_VARIABLE])
        return cls(**(values | {"run": Path(values["run"])}), admin_token=token_from_environment())


def token_from_environment() -> str | None:
    """The admin token; None where the variable is unset or empty."""
    return os.environ.get(TOKEN_VARIABLE) or None
