import hashlib
import http.server
import threading

import pytest

from lasar.data.http import fetch_url
from lasar.errors import DataError

CONTENT = bytes(range(256)) * 4000


class Server(http.server.ThreadingHTTPServer):
    """A file server with ranges, which can break off, change its file or fail."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.etag = CONTENT, '"v1"'
        self.break_after: list[int] = []
        self.statuses: list[int] = []
        self.ranges = True
        self.requests: list[str | None] = []

    def handle_error(self, request, client_address):
        pass


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *arguments):
        pass

    def do_GET(self):
        server = self.server
        wanted = self.headers.get("Range")
        server.requests.append(wanted)
        if server.statuses:
            self.send_error(server.statuses.pop(0))
            return
        start = 0
        if wanted and server.ranges and self.headers.get("If-Range") == server.etag:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if start >= len(server.content):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(server.content)}")
                self.end_headers()
                return
            self.send_response(206)
            last = len(server.content) - 1
            self.send_header("Content-Range", f"bytes {start}-{last}/{len(server.content)}")
        else:
            self.send_response(200)
        body = server.content[start:]
        if server.etag:
            self.send_header("ETag", server.etag)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: server.break_after.pop(0)] if server.break_after else body)


@pytest.fixture
def server():
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
def url(server):
    return f"http://127.0.0.1:{server.server_port}/data.gz"


def fetch(url, path, **options):
    fetch_url(url, path, timeout_seconds=5, pause_seconds=0.01, **options)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_arrives_whole_and_checked(server, url, tmp_path):
    fetch(url, tmp_path / "d", sha256=hashlib.sha256(CONTENT).hexdigest())
    assert (tmp_path / "d").read_bytes() == CONTENT
    assert names(tmp_path) == ["d"]
    assert server.requests == [None]


def test_an_interruption_is_continued(server, url, tmp_path):
    server.break_after = [100_000, 200_000]
    fetch(url, tmp_path / "d", sha256=hashlib.sha256(CONTENT).hexdigest())
    assert (tmp_path / "d").read_bytes() == CONTENT
    assert server.requests == [None, "bytes=100000-", "bytes=300000-"]
    assert names(tmp_path) == ["d"]


def test_a_later_call_continues_what_an_earlier_one_left(server, url, tmp_path):
    server.break_after = [1000] * 4
    with pytest.raises(DataError, match=r"broke off after 4,000 bytes, 4 attempts.*4,000 bytes are kept"):
        fetch(url, tmp_path / "d")
    assert names(tmp_path) == ["d.part", "d.part.id"]
    fetch(url, tmp_path / "d")
    assert (tmp_path / "d").read_bytes() == CONTENT
    assert server.requests[-1] == "bytes=4000-"
    assert names(tmp_path) == ["d"]


def test_a_file_that_changed_meanwhile_is_fetched_anew(server, url, tmp_path):
    server.break_after = [1000] * 4
    with pytest.raises(DataError):
        fetch(url, tmp_path / "d")
    server.content, server.etag = CONTENT[::-1], '"v2"'
    fetch(url, tmp_path / "d")
    assert (tmp_path / "d").read_bytes() == CONTENT[::-1]


@pytest.mark.parametrize("etag", ['"v1"', "", 'W/"weak"'])
def test_a_server_without_ranges_or_identity_starts_over(server, url, tmp_path, etag):
    server.ranges, server.etag, server.break_after = False, etag, [1000, 2000]
    fetch(url, tmp_path / "d")
    assert (tmp_path / "d").read_bytes() == CONTENT


def test_a_complete_part_is_only_renamed(server, url, tmp_path):
    (tmp_path / "d.part").write_bytes(CONTENT)
    (tmp_path / "d.part.id").write_text('"v1"')
    fetch(url, tmp_path / "d")
    assert (tmp_path / "d").read_bytes() == CONTENT
    assert server.requests == [f"bytes={len(CONTENT)}-"]


def test_a_part_that_is_too_long_is_thrown_away(server, url, tmp_path):
    (tmp_path / "d.part").write_bytes(CONTENT + b"x")
    (tmp_path / "d.part.id").write_text('"v1"')
    fetch(url, tmp_path / "d")
    assert (tmp_path / "d").read_bytes() == CONTENT


def test_a_wrong_checksum_leaves_nothing(server, url, tmp_path):
    with pytest.raises(DataError, match=rf"sha256 is {hashlib.sha256(CONTENT).hexdigest()}, expected 00"):
        fetch(url, tmp_path / "d", sha256="00")
    assert names(tmp_path) == []


def test_a_busy_server_is_asked_again_and_a_missing_file_is_not(server, url, tmp_path):
    server.statuses = [503, 500]
    fetch(url, tmp_path / "d")
    assert len(server.requests) == 3
    server.statuses = [404, 404]
    with pytest.raises(DataError, match=r"data\.gz: the server answers 404"):
        fetch(url, tmp_path / "e")
    assert len(server.requests) == 4
    server.statuses = [503] * 4
    with pytest.raises(DataError, match=r"the server answers 503 .*, 4 attempts; check the network$"):
        fetch(url, tmp_path / "e")


def test_no_server_is_one_clear_line(tmp_path):
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as closed:
        port = closed.server_port
    with pytest.raises(DataError, match=r"cannot be reached: .*refused, 4 attempts; check the network"):
        fetch(f"http://127.0.0.1:{port}/x", tmp_path / "d")
    assert names(tmp_path) == []
