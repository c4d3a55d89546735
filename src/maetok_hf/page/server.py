"""Serving the page: on one address, without a word to any other one."""

import asyncio
import ipaddress
import logging
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit


if TYPE_CHECKING:
    import gradio as gr


# what a browser that shows the page may load from: this server only
CONTENT_SECURITY_POLICY = (
    "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; object-src 'none'; base-uri 'self'"
)
# as browsers name this machine to itself
LOCAL_HOSTS = ("127.0.0.1", "localhost", "[::1]")
SHUTDOWN_SECONDS = 1


def open_port(host: str, port: int) -> socket.socket:
    """
    Take a port, before anything is loaded.

    Args:
        host (`str`): Address to listen on.
        port (`int`): Port, 0 for any free one.

    Returns:
        `socket.socket`: Bound to it.

    Raises:
        ValueError: If the address is not one of this machine, or the port is taken or not allowed.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except (socket.gaierror, OverflowError, UnicodeError) as error:
        raise ValueError(f"`host` {host!r} is no address of this machine: use 127.0.0.1 or 0.0.0.0.") from error
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        # not listening yet: a browser is refused, rather than kept waiting, until the page is there
        sock.bind(address)
    except OSError as error:
        sock.close()
        raise ValueError(
            f"cannot listen on {host} port {port} ({error.strerror.lower()}): choose another `port`, or 0 for any "
            "free one."
        ) from error
    return sock


def address_of(sock: socket.socket) -> str:
    """
    What to type into a browser on this machine.

    Args:
        sock (`socket.socket`): From [`open_port`].

    Returns:
        `str`: A URL.
    """
    host, port = sock.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def is_local(sock: socket.socket) -> bool:
    """
    Whether only this machine reaches a port.

    Args:
        sock (`socket.socket`): From [`open_port`].

    Returns:
        `bool`: That.
    """
    return ipaddress.ip_address(sock.getsockname()[0]).is_loopback


@contextmanager
def private_folder() -> Iterator[str]:
    """
    A folder for what people upload and what is made for them, which is deleted with all that is in it.

    Yields:
        `str`: Its path. Gradio uses it for pages that are built inside.
    """
    previous = os.environ.get("GRADIO_TEMP_DIR")
    with tempfile.TemporaryDirectory(prefix="maetok-demo-", ignore_cleanup_errors=True) as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        try:
            yield folder
        finally:
            if previous is None:
                del os.environ["GRADIO_TEMP_DIR"]
            else:
                os.environ["GRADIO_TEMP_DIR"] = previous


class SecurityHeaders:
    """
    Tells browsers to load nothing from other addresses, and to tell them nothing.

    Args:
        app (`Any`): The ASGI application.
    """

    HEADERS = (
        (b"content-security-policy", CONTENT_SECURITY_POLICY.encode()),
        (b"referrer-policy", b"no-referrer"),
    )

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """
        Args:
            scope (`Any`): Of the request.
            receive (`Any`): Its messages.
            send (`Any`): Takes those of the response.
        """

        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), *self.HEADERS]}
            await send(message)

        await self.app(scope, receive, send_with_headers)


class SameOriginOnly:
    """
    Refuses what a page of another site makes a browser send: uploads and orders.

    Args:
        app (`Any`): The ASGI application.
    """

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """
        Args:
            scope (`Any`): Of the request.
            receive (`Any`): Its messages.
            send (`Any`): Takes those of the response.
        """
        from fastapi.responses import PlainTextResponse

        if scope["type"] == "http" and scope["method"] not in ("GET", "HEAD") and self.is_foreign(scope["headers"]):
            response = PlainTextResponse("Another site may not use this page.", status_code=403)
            await response(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    @staticmethod
    def is_foreign(raw_headers: Any) -> bool:
        """
        Args:
            raw_headers (`Iterable[tuple[bytes, bytes]]`): Headers of a request.

        Returns:
            `bool`: Whether a browser says that a page of another origin sends it. Programs say nothing of the kind.
        """
        headers = {name.lower(): value.decode("latin-1") for name, value in raw_headers}
        # behind a proxy the host is another one, but this is not
        if site := headers.get(b"sec-fetch-site"):
            return site not in ("same-origin", "none")
        origin = headers.get(b"origin")
        return origin is not None and urlsplit(origin).netloc != headers.get(b"host")


def make_app(page: "gr.Blocks", css: str, hosts: Sequence[str] | None = None) -> Any:
    """
    The page as a web application.

    Args:
        page (`gr.Blocks`): From [`~maetok_hf.page.layout.build_page`].
        css (`str`): Its style sheet.
        hosts (`Sequence[str]`, *optional*): Names by which the page may be asked for, any if there are none. A page of
            this machine only must be told, as another site's name can be made to lead here.

    Returns:
        `fastapi.FastAPI`: The application; browsers are told to load nothing from elsewhere.
    """
    import gradio as gr
    from fastapi import FastAPI
    from fastapi.middleware.trustedhost import TrustedHostMiddleware

    from .reconstruction import MAX_FILE_SIZE

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    app.add_middleware(SameOriginOnly)
    if hosts is not None:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=[*hosts], www_redirect=False)
    app.add_middleware(SecurityHeaders)
    # of Gradio's own files; the half-bold one that it ships, and takes by default, lacks most letters
    font = gr.themes.LocalFont("Source Sans Pro", weights=(400, 700))
    gr.mount_gradio_app(
        app,
        page,
        path="/",
        css=css,
        theme=gr.themes.Default(primary_hue="blue", secondary_hue="blue", font=(font, "system-ui", "sans-serif")),
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        mcp_server=False,
        pwa=False,
        ssr_mode=False,
        max_file_size=MAX_FILE_SIZE,
    )
    # only then Gradio refuses files that nobody uploaded: any file of this machine could be asked for
    page.has_launched = True
    return app


def _says_more_than_the_end(record: logging.LogRecord) -> bool:
    """Whether a message is about more than the connections of open pages, which are cut when the server ends."""
    error = record.exc_info[1] if isinstance(record.exc_info, tuple) else None
    return not isinstance(error, asyncio.CancelledError) and "graceful shutdown exceeded" not in record.msg


def serve(app: Any, sock: socket.socket) -> None:
    """
    Serve until a signal comes, and then end what is open within seconds.

    Args:
        app (`fastapi.FastAPI`): From [`make_app`].
        sock (`socket.socket`): From [`open_port`].

    Raises:
        SystemExit: With 143 after SIGTERM; after Ctrl-C the function returns.
    """
    import uvicorn

    logging.getLogger("uvicorn.error").addFilter(_says_more_than_the_end)
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, timeout_graceful_shutdown=SHUTDOWN_SECONDS, lifespan="on"
    )
    previous = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        with closing(sock):
            uvicorn.Server(config).run(sockets=[sock])
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGTERM, previous)
