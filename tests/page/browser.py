"""A headless Chromium and the server of a page, for tests and for pictures of the page."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


ROOT = Path(__file__).resolve().parents[2]
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def find_chromium() -> str | None:
    """Path of Chromium: the variable CHROMIUM, or the program of this name."""
    return os.environ.get("CHROMIUM") or shutil.which("chromium")


@contextmanager
def open_browser(chromium: str, **options: Any) -> Iterator[Any]:
    """A new user's Chromium."""
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile, sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            profile, executable_path=chromium, headless=True, args=list(FLAGS), **options
        )
        try:
            yield context
        finally:
            context.close()


class Server:
    """`maetok-demo` as a process of its own, on a free port."""

    def __init__(self, *words: str, temporary: str | None = None, cwd: str | Path = ROOT):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "maetok_hf.commands.demo_page", "--port", "0", *words],
            cwd=cwd,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **({"TMPDIR": temporary} if temporary else {})},
        )
        self.lines: list[str] = []
        self.url = ""
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))
            if match := re.search(r"The page is at (\S+)", line):
                self.url = match.group(1)
                break
        if not self.url:
            raise RuntimeError("the server did not start:\n" + "\n".join(self.lines))

    def stop(self, number: int = signal.SIGINT) -> int:
        """End it and return its exit code; all that it printed is in `lines` then."""
        self.process.send_signal(number)
        rest, _ = self.process.communicate(timeout=60)
        self.lines += rest.splitlines()
        return self.process.returncode


@contextmanager
def serve_page(*words: str, **options: Any) -> Iterator[Server]:
    """A server that is ended in any case."""
    server = Server(*words, **options)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.stop()
