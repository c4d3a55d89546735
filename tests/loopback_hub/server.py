"""HTTP around a [`LoopbackHub`]: the site, and on another port the storage of large files that it redirects to."""

import json
import re
import threading
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from .answers import Answer, Refusal
from .faults import Fault
from .routes import Request, answer
from .state import LoopbackHub


class ConnectionCut(Exception):
    """The connection ends here."""


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1  # one packet for head and body: the client would wait for the second one
    disable_nagle_algorithm = True
    hub: LoopbackHub

    def log_message(self, *args) -> None:
        pass

    def handle_request(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        fault = self.hub.fault_of(f"{self.command} {url.path}")
        try:
            found = self.decide(url, fault)
            self.note(url.path, found.status)
            self.write(found, fault)
        except ConnectionCut:
            self.note(url.path, None)
            self.close_connection = True
        except (BrokenPipeError, ConnectionResetError):  # the client has gone
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_request

    def decide(self, url: urllib.parse.SplitResult, fault: Fault | None) -> Answer:
        body = self.read_body(fault)
        if fault is not None and fault.delay:
            time.sleep(fault.delay)
        if fault is not None and fault.status is not None:
            return Refusal(fault.status, fault.message, headers=fault.headers).answer
        query = {name: values[-1] for name, values in urllib.parse.parse_qs(url.query).items()}
        token = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
        request = Request(self.command, url.path, query, token, body, self.headers.get("Content-Type", ""))
        with self.hub.lock:
            try:
                return self.part_of(answer(self.hub, request))
            except Refusal as refusal:
                return refusal.answer

    def part_of(self, whole: Answer) -> Answer:
        """The bytes of a file that are asked for."""
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted is None or whole.status != 200 or not isinstance(whole.body, bytes):
            return whole
        size, start = len(whole.body), int(wanted[1])
        if start >= size:
            return Answer(416, b"", {"Content-Range": f"bytes */{size}"})
        end = min(int(wanted[2] or size - 1), size - 1)
        headers = whole.headers | {"Content-Range": f"bytes {start}-{end}/{size}"}
        return Answer(206, whole.body[start : end + 1], headers)

    def note(self, path: str, status: int | None) -> None:
        with self.hub.lock:
            self.hub.requests.append((self.command, path, status))

    def read_body(self, fault: Fault | None) -> bytes:
        chunked = self.headers.get("Transfer-Encoding", "").lower() == "chunked"
        length = int(self.headers.get("Content-Length") or 0)
        if fault is not None and fault.cut_after is not None and (chunked or length):
            self.rfile.read(fault.cut_after)
            raise ConnectionCut
        if not chunked:
            return self.rfile.read(length)
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def write(self, found: Answer, fault: Fault | None) -> None:
        cut = fault is not None and fault.cut_after is not None
        if cut and fault.cut_after == 0:
            raise ConnectionCut
        body = found.body if isinstance(found.body, bytes) else json.dumps(found.body).encode()
        self.send_response(found.status)
        self.send_header("Content-Type", "application/octet-stream" if body is found.body else "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Accept-Ranges", "bytes")
        for name, value in found.headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: fault.cut_after] if cut else body)
        if cut:
            self.close_connection = True


@contextmanager
def serving(hub: LoopbackHub) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def serve_hub() -> Iterator[LoopbackHub]:
    """
    Serve a Hub without repositories.

    Yields:
        Its state; clients need the variables of [`LoopbackHub.environment`], those of this process
        [`~clients.connect_clients`].
    """
    hub = LoopbackHub()
    with serving(hub) as hub.endpoint, serving(hub) as hub.storage:
        yield hub


@contextmanager
def serve_folder(folder: Path, repo_id: str) -> Iterator[str]:
    """
    Serve a folder as a model repo.

    Yields:
        The address that a client takes as `HF_ENDPOINT`; its process also needs `HF_HUB_DISABLE_XET=1`.
    """
    with serve_hub() as hub:
        files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        hub.add(repo_id, files)
        yield hub.endpoint
