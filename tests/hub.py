"""A read-only Hub on the loopback interface: what loading from a repo id asks for, and nothing more."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


COMMIT = hashlib.sha1(b"the only commit").hexdigest()


def _handler(folder: Path, repo_id: str) -> type[BaseHTTPRequestHandler]:
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    repo = re.escape(repo_id)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args) -> None:
            pass

        def answer(self, status: int, body: bytes, **headers: str) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_GET(self) -> None:
            path = self.path.split("?")[0]
            if re.fullmatch(rf"/api/models/{repo}(/revision/[^/]+)?", path):
                siblings = [{"rfilename": name, "size": len(content)} for name, content in files.items()]
                info = {"_id": "0", "id": repo_id, "modelId": repo_id, "sha": COMMIT, "tags": [], "siblings": siblings}
                self.answer(200, json.dumps(info).encode(), Content_Type="application/json")
            elif re.fullmatch(rf"/api/models/{repo}/tree/[^/]+", path):
                entries = [
                    {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                    for name, content in files.items()
                ]
                self.answer(200, json.dumps(entries).encode(), Content_Type="application/json")
            elif (match := re.fullmatch(rf"/{repo}/resolve/[^/]+/(.+)", path)) and match[1] in files:
                content = files[match[1]]
                self.answer(200, content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', X_Repo_Commit=COMMIT)
            else:
                code = "EntryNotFound" if f"/{repo_id}" in path else "RepoNotFound"
                self.answer(404, b"{}", X_Error_Code=code, X_Repo_Commit=COMMIT)

        do_HEAD = do_GET

    return Handler


@contextmanager
def serve_folder(folder: Path, repo_id: str) -> Iterator[str]:
    """
    Serve a folder as a model repo.

    Yields:
        The address that a client takes as `HF_ENDPOINT`; its process also needs `HF_HUB_DISABLE_XET=1`.
    """
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(folder, repo_id))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
