"""Reading table files of any common kind, with every failure turned into one clear line.

CSV, TSV, Parquet and JSON lines, each also gzipped. Text formats are scanned lazily when they are UTF-8;
another encoding is decoded in memory first. CSV values stay text until a column's role is known, so that an
id like `007` survives.
"""

import codecs
import contextlib
import encodings.aliases
import gzip
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TextIO

import polars as pl

from lasar.errors import ConfigError, DataError, nearest

_JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
_PARQUET_SUFFIXES = (".parquet", ".pq")
_SEPARATORS = {".csv": ",", ".tsv": "\t", ".tab": "\t", ".inter": "\t", ".item": "\t", ".txt": "\t"}

# A number at least this large is not seconds (year 5138) but milliseconds (1973), and so on.
_MILLISECONDS_FROM = 1e11
_MICROSECONDS_FROM = 1e14
_HINTS = {
    "utf-8": "; set format.encoding, for example latin-1 or cp1252",
    "more fields": "; a row has more fields than the header: is format.separator right, are texts quoted?",
}
_ISO_FORMATS = (
    "%Y-%m-%dT%H:%M:%S%.f%#z", "%Y-%m-%d %H:%M:%S%.f%#z", "%Y-%m-%dT%H:%M:%S%.f", "%Y-%m-%d %H:%M:%S%.f",
    "%Y-%m-%d %H:%M", "%Y-%m-%d",
)  # fmt: skip


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn every failure of reading `path` into a `DataError`.

    Raises:
        DataError: the file is missing, damaged, empty, or not in the expected format or encoding.
    """
    try:
        yield
    except FileNotFoundError:
        if path.is_dir():
            raise DataError(f"{path}: is a folder; this reader needs a file") from None
        siblings = [str(p) for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"{path}: no such file{nearest(str(path), siblings)}") from None
    except pl.exceptions.NoDataError:
        raise DataError(f"{path}: the file is empty") from None
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: not {error.encoding} text (byte {error.start}); set format.encoding, "
            "for example latin-1 or cp1252"
        ) from None
    except (pl.exceptions.PolarsError, OSError, EOFError, zlib.error) as error:
        reason = str(error).strip().split("\n")[0]
        hint = next((hint for sign, hint in _HINTS.items() if sign in reason), "")
        raise DataError(f"{path}: cannot be read: {reason}{hint}") from None


def scan_table(
    path: Path, *, encoding: str = "utf-8", separator: str | None = None, quote: str | None = '"'
) -> pl.LazyFrame:
    """Scan a table, choosing the format by the file's suffix (`.gz` is looked through).

    Args:
        path: a CSV, TSV, Parquet or JSON-lines file, or a folder of Parquet files, read in the order of their names.
        encoding: encoding of a CSV or TSV file.
        separator: CSV column separator; None chooses by the suffix.
        quote: CSV quote character; None takes quotes as text.

    Raises:
        ConfigError: the encoding is not known.
        DataError: the file is missing, damaged, empty, or of an unknown kind.
    """
    suffix = plain_suffix(path)
    with reading(path):
        if path.is_dir() and (parts := sorted(path.glob("*.parquet"))):
            frame = pl.scan_parquet(parts)
            frame.collect_schema()
            return frame
        if not path.is_file():
            raise FileNotFoundError
        if suffix in _PARQUET_SUFFIXES:
            frame = pl.scan_parquet(path)
        elif suffix in _JSON_SUFFIXES:
            frame = pl.scan_ndjson(path, infer_schema_length=None)
        elif suffix in _SEPARATORS:
            frame = _scan_csv(path, encoding, separator or _SEPARATORS[suffix], quote)
        else:
            kinds = [*_SEPARATORS, *_JSON_SUFFIXES, *_PARQUET_SUFFIXES]
            raise DataError(f"{path}: unknown kind {suffix!r}; expected one of {', '.join(kinds)} (or .gz)")
        frame.collect_schema()
    return frame


def plain_suffix(path: Path) -> str:
    """Suffix of a file in lower case, `.gz` removed: `x.JSON.gz` gives `.json`."""
    name = path.with_suffix("") if path.suffix.lower() == ".gz" else path
    return name.suffix.lower()


def read_text(path: Path, *, encoding: str = "utf-8") -> str:
    """Read a text file, gunzipping a `.gz`.

    Raises:
        ConfigError: the encoding is not known.
        DataError: the file is missing, damaged or in another encoding.
    """
    check_encoding(encoding)
    with reading(path):
        content = path.read_bytes()
        if path.suffix.lower() == ".gz":
            content = gzip.decompress(content)
        return content.decode(encoding)


def read_lines(path: Path) -> Iterator[str]:
    """Yield the lines of a UTF-8 text file of any size, gunzipping a `.gz`.

    Raises:
        DataError: the file is missing, damaged or in another encoding.
    """
    with reading(path), _open_text(path) as stream:
        yield from stream


def _open_text(path: Path) -> TextIO:
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")
    return path.open(encoding="utf-8")


def check_encoding(encoding: str) -> None:
    """Refuse an encoding that Python does not know.

    Raises:
        ConfigError: unknown encoding; the message names the nearest.
    """
    try:
        codecs.lookup(encoding)
    except LookupError:
        known = {name.replace("_", "-") for name in encodings.aliases.aliases.values()}
        raise ConfigError(
            f"format.encoding: unknown encoding {encoding!r}{nearest(encoding, known)}"
        ) from None


def _scan_csv(path: Path, encoding: str, separator: str, quote: str | None) -> pl.LazyFrame:
    check_encoding(encoding)
    if len(separator.encode()) != 1:
        raise ConfigError(f"format.separator: expected one character, got {separator!r}")
    if codecs.lookup(encoding).name == "utf-8":
        return pl.scan_csv(path, infer_schema=False, separator=separator, quote_char=quote)
    text = read_text(path, encoding=encoding)
    return pl.read_csv(text.encode(), infer_schema=False, separator=separator, quote_char=quote).lazy()


def require_column(frame: pl.LazyFrame, column: str, *, path: Path, role: str) -> None:
    """Refuse a table without `column`.

    Raises:
        DataError: the column is missing; the message names the nearest one and the field to set.
    """
    columns = frame.collect_schema().names()
    if column in columns:
        return
    if len(columns) == 1:
        hint = f"; the only column is {columns[0]!r}: is format.separator right?"
    else:
        hint = nearest(column, columns) or f"; it has {', '.join(map(repr, columns[:12]))}"
    raise DataError(f"{path}: no column {column!r} (columns.{role}){hint}")


def with_event_columns(
    frame: pl.LazyFrame, columns: Mapping[str, str], *, path: Path, time_format: str | None = None
) -> pl.LazyFrame:
    """Add the columns every reader must return, keeping the source's own.

    Args:
        frame: the events as read.
        columns: source column of each role: `user` and `item`, optionally `timestamp`, `event_type`,
            `weight`.
        path: the source, for messages.
        time_format: see `epoch_seconds`.

    Returns:
        The frame with `user_id` and `item_id` (String, stripped, empty is null), `timestamp` (Int64 seconds,
        null where absent or unparsable), `timestamp_source` (String; only when there is a time column) and,
        where asked for, `event_type` (String) and `weight` (Float64).

    Raises:
        DataError: a named column is missing.
    """
    for role, column in columns.items():
        require_column(frame, column, path=path, role=role)
    added = [id_text(columns["user"]).alias("user_id"), id_text(columns["item"]).alias("item_id")]
    if "timestamp" in columns:
        kind = frame.collect_schema()[columns["timestamp"]]
        added += [
            epoch_seconds(columns["timestamp"], kind, time_format).alias("timestamp"),
            id_text(columns["timestamp"]).alias("timestamp_source"),
        ]
    else:
        added.append(pl.lit(None, dtype=pl.Int64).alias("timestamp"))
    if "event_type" in columns:
        added.append(pl.col(columns["event_type"]).cast(pl.String).alias("event_type"))
    if "weight" in columns:
        added.append(pl.col(columns["weight"]).cast(pl.Float64, strict=False).alias("weight"))
    return frame.with_columns(added)


def id_text(column: str) -> pl.Expr:
    """A column as stripped text; empty text is null."""
    text = pl.col(column).cast(pl.String).str.strip_chars()
    return pl.when(text != "").then(text)


def epoch_seconds(column: str, kind: pl.DataType, time_format: str | None) -> pl.Expr:
    """A column as Unix seconds, Int64; null where it cannot be parsed. Times without a zone are taken as UTC.

    Args:
        column: the column's name.
        kind: its type.
        time_format: `seconds`, `milliseconds`, or a strptime pattern; None takes date types as they are,
            numbers as seconds, milliseconds or microseconds by their size, and other text as ISO 8601.
    """
    if kind == pl.Date or isinstance(kind, pl.Datetime):
        return pl.col(column).cast(pl.Datetime("us")).dt.epoch("s")
    text = pl.col(column).cast(pl.String).str.strip_chars()
    number = text.cast(pl.Float64, strict=False)
    if time_format == "seconds":
        return number.floor().cast(pl.Int64, strict=False)
    if time_format == "milliseconds":
        return (number / 1e3).floor().cast(pl.Int64, strict=False)
    if time_format is not None:
        return text.str.to_datetime(time_format, strict=False).dt.epoch("s")
    scaled = (
        pl.when(number >= _MICROSECONDS_FROM).then(number / 1e6)
        .when(number >= _MILLISECONDS_FROM).then(number / 1e3)
        .otherwise(number)
    )  # fmt: skip
    parsed = [text.str.to_datetime(pattern, strict=False).dt.epoch("s") for pattern in _ISO_FORMATS]
    return pl.coalesce(scaled.floor().cast(pl.Int64, strict=False), *parsed)


def as_text_columns(frame: pl.LazyFrame, keep: Sequence[str]) -> pl.LazyFrame:
    """The columns `keep` as String; lists are joined (` > ` for `categories`, a path; `, ` elsewhere)."""
    schema = frame.collect_schema()
    expressions = []
    for name in keep:
        kind, column = schema[name], pl.col(name)
        if isinstance(kind, pl.Struct):
            column = column.struct.json_encode()
        elif isinstance(kind, pl.List):
            column = column.cast(pl.List(pl.String)).list.join(" > " if name == "categories" else ", ")
        expressions.append(column.cast(pl.String))
    return frame.select(expressions)
