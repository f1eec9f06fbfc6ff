"""The one database behind a server: histories and catalogue changes, SQLite by default, any SQLAlchemy URL.

SQLite runs with a write-ahead log and a full sync at every commit: what was acknowledged is on disk, whatever is
killed. All workers of a server open the same database, and that is all they share.
"""

from pathlib import Path
from typing import Any

from sqlalchemy import (
    Boolean,
    Column,
    Engine,
    Float,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    create_engine,
    event,
    insert,
    make_url,
    select,
)
from sqlalchemy.exc import ArgumentError, IntegrityError, NoSuchModuleError, SQLAlchemyError

from lasar.errors import ArtifactError, ConfigError, MissingExtraError

FORMAT = 1

metadata = MetaData()

format_table = Table("lasar_format", metadata, Column("format", Integer, primary_key=True))

events_table = Table(
    "lasar_events",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column(
        "event_id", String(128), unique=True, nullable=True
    ),  # the sender's, so that a retry is no second event
    Column("user_id", String(256), nullable=False),
    Column("items", Text, nullable=False),  # JSON list of item ids: one order
    Column("time", Float, nullable=False),  # seconds since 1970
    Index("lasar_events_user", "user_id", "time"),
    Index("lasar_events_time", "time"),
)

# Users of the run's own event log who asked to be forgotten, by hash: the log itself is not the server's to change.
forgotten_table = Table("lasar_forgotten", metadata, Column("user_hash", String(64), primary_key=True))

versions_table = Table(
    "lasar_versions",
    metadata,
    Column("catalogue", String(64), primary_key=True),  # content hash of the trained catalogue
    Column("version", Integer, primary_key=True, autoincrement=False),
    Column("parent", Integer, nullable=False),
    Column("action", String(32), nullable=False),
    Column("created", Float, nullable=False),
)

added_table = Table(
    "lasar_added_items",
    metadata,
    Column("catalogue", String(64), primary_key=True),
    Column("version", Integer, primary_key=True),
    Column("position", Integer, primary_key=True),
    Column("item_id", String(256), nullable=False),
    Column("title", Text, nullable=False),
    Column("text", Text, nullable=False),
    Column("codes", String(256), nullable=False),  # JSON list
    Column("vector", LargeBinary, nullable=False),  # float32, little endian
)

switched_table = Table(
    "lasar_switched_items",
    metadata,
    Column("catalogue", String(64), primary_key=True),
    Column("version", Integer, primary_key=True),
    Column("item_id", String(256), primary_key=True),
    Column("active", Boolean, nullable=False),
)


def open_database(url: str) -> Engine:
    """Open a database, and make its tables if they are not there.

    Raises:
        ConfigError: the URL is not one.
        ArtifactError: the database cannot be opened, or is of another format.
        MissingExtraError: the driver that the URL asks for is not installed.
    """
    try:
        parsed = make_url(url)
        if parsed.get_backend_name() == "sqlite" and parsed.database:
            Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
        # What a failing statement was given may be someone's history; it stays out of messages and logs.
        engine = create_engine(parsed, hide_parameters=True, pool_pre_ping=True)
    except (ArgumentError, NoSuchModuleError) as error:
        raise ConfigError(
            f"--database: {error}; give a SQLAlchemy URL such as sqlite:///state.sqlite or "
            "postgresql+psycopg://user@host/name"
        ) from None
    except ModuleNotFoundError as error:
        raise MissingExtraError(f"--database {parsed.drivername}: needs the package {error.name!r}") from None
    except OSError as error:
        raise ArtifactError(
            f"{parsed.database}: cannot be written: {error.strerror}; give --database sqlite:///PATH"
        ) from None
    if parsed.get_backend_name() == "sqlite":
        event.listen(engine, "connect", _prepare_sqlite)
    try:
        metadata.create_all(engine)
        _check_format(engine)
    except SQLAlchemyError as error:
        raise ArtifactError(
            f"--database {parsed.render_as_string()}: cannot be used ({str(error).splitlines()[0]})"
        ) from None
    return engine


def _check_format(engine: Engine) -> None:
    with engine.connect() as connection:
        found = connection.scalar(select(format_table.c.format))
    if found is None:
        try:
            with engine.begin() as connection:
                connection.execute(insert(format_table).values(format=FORMAT))
        except IntegrityError:
            pass  # another worker was faster
    elif found != FORMAT:
        raise ArtifactError(
            f"{engine.url.render_as_string()}: tables of format {found}, this is format {FORMAT}; "
            "give another --database"
        )


def _prepare_sqlite(connection: Any, _: Any) -> None:
    cursor = connection.cursor()
    for pragma in ("busy_timeout=10000", "journal_mode=WAL", "synchronous=FULL", "secure_delete=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()
