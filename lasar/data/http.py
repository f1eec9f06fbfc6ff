"""Fetching one file over HTTP: resumed after an interruption, checked, and renamed only when complete."""

import contextlib
import http.client
import time
import urllib.error
import urllib.request
from pathlib import Path

from lasar.artifacts import file_sha256
from lasar.errors import DataError
from lasar.progress import progress

_CHUNK_BYTES = 1 << 16
_ATTEMPTS = 4


def fetch_url(
    url: str,
    path: Path,
    *,
    sha256: str | None = None,
    timeout_seconds: float = 60.0,
    pause_seconds: float = 1.0,
) -> None:
    """Download `url` to `path`.

    What has arrived stays in `path.part` beside the file's identity at the server (ETag or date), so that a
    later call continues; when the server's file changed meanwhile, or it cannot continue, the download starts
    over.

    Args:
        url: address of the file.
        path: where it goes; its folder exists.
        sha256: expected checksum; None accepts any content of the announced length.
        timeout_seconds: longest silence of the server.
        pause_seconds: pause before the second attempt; doubled each time.

    Raises:
        DataError: the server cannot be reached, does not have the file, keeps breaking off, or sends content
            with another checksum (which is then removed).
    """
    part, identity = path.with_name(path.name + ".part"), path.with_name(path.name + ".part.id")
    for attempt in range(_ATTEMPTS):
        if attempt:
            time.sleep(pause_seconds * 2 ** (attempt - 1))
        try:
            if _fetch_rest(url, part, identity, timeout_seconds):
                break
            reason = f"broke off after {_size(part):,} bytes"
        except urllib.error.HTTPError as error:
            if error.code < 500:
                raise DataError(f"{url}: the server answers {error.code} {error.reason}") from None
            reason = f"the server answers {error.code} {error.reason}"
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
            reason = f"cannot be reached: {getattr(error, 'reason', error)}"
    else:
        kept = f"; {_size(part):,} bytes are kept, run the command again to continue" if _size(part) else ""
        raise DataError(f"{url}: {reason}, {_ATTEMPTS} attempts; check the network{kept}")
    if sha256 is not None and (actual := file_sha256(part)) != sha256:
        _forget(part, identity)
        raise DataError(f"{url}: sha256 is {actual}, expected {sha256}; the download was removed, try again")
    part.replace(path)
    _forget(part, identity)


def _fetch_rest(url: str, part: Path, identity: Path, timeout_seconds: float) -> bool:
    """Append what is missing; return whether the file is complete."""
    have = _size(part) if identity.is_file() else 0
    request = urllib.request.Request(url, headers={"User-Agent": "lasar", "Accept-Encoding": "identity"})
    if have:
        request.add_header("Range", f"bytes={have}-")
        request.add_header("If-Range", identity.read_text(encoding="utf-8"))
    try:
        response = urllib.request.urlopen(request, timeout=timeout_seconds)
    except urllib.error.HTTPError as error:
        if error.code != http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise
        total = error.headers.get("Content-Range", "").rpartition("/")[2]
        if total == str(have):
            return True
        _forget(part, identity)
        return False
    with response:
        continued = response.status == http.client.PARTIAL_CONTENT
        if continued and not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            _forget(part, identity)
            return False
        have = have if continued else 0
        length = response.headers.get("Content-Length")
        total_bytes = have + int(length) if length is not None else None
        known = response.headers.get("ETag") or response.headers.get("Last-Modified")
        if known and not known.startswith("W/"):
            identity.write_text(known, encoding="utf-8")
        else:
            identity.unlink(missing_ok=True)
        with (
            part.open("ab" if continued else "wb") as output,
            progress(f"fetch {part.stem}", total=total_bytes or 0, start=have, unit="B") as advance,
        ):
            while chunk := response.read(_CHUNK_BYTES):
                output.write(chunk)
                advance(len(chunk))
    return total_bytes is None or _size(part) == total_bytes


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _forget(*paths: Path) -> None:
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
