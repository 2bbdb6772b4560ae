"""Serve the report of running jobs to a browser on this machine.

Any request whose path does not begin with the token gets 404, because other users of the machine can reach the port.
"""

from __future__ import annotations

import json
import secrets
import socket
import threading
import webbrowser
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import uvicorn
from plotly.offline import get_plotlyjs
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from ..._console import Screen
from ...errors import printable
from ..analysis.errors import RunError
from ..analysis.log import Keys, find_runs, name_runs
from ..dashboard import Live, assess, render_page
from .follow import Signature, read_growing, sign
from .marker import is_running

__all__ = ["Page", "listen", "make_app", "serve"]

HEADERS = {
    "Cache-Control": "no-store",
    # The address contains the token, which other sites must not get.
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}

LIVE = Live(plotly="plotly.js", script="live.js")

BOUND_TO_ALL = {"0.0.0.0", "::", ""}
"""Hosts that stand for all addresses of the machine."""


class Page:
    """The report of some runs, which is rendered again when their files change.

    Args:
        paths: see `find_runs`. Runs that appear below them later are added to the page.
        keys: names of the columns in logs of other tools.
    """

    def __init__(self, paths: Sequence[Path], keys: Keys) -> None:
        self._paths, self._keys = paths, keys
        self._lock = threading.Lock()
        self._signature: tuple[Signature, ...] | None = None
        self.html = ""
        self.data: dict[str, Any] = {}

    def refresh(self) -> str:
        """Render the page if a file has changed, and return its version.

        Raises:
            RunError: a run cannot be read, such as one without a step.
        """
        # A second request waits for the first one, and then finds the page rendered.
        with self._lock:
            runs = find_runs(self._paths)
            signature = tuple(map(sign, runs))
            if signature != self._signature:
                self._render(runs)
                self._signature = signature
            return str(self.data["version"])

    def _render(self, runs: Sequence[Path]) -> None:
        logs, errors = [], []
        for run, name in zip(runs, name_runs(runs), strict=True):
            try:
                logs.append(read_growing(run, name, self._keys))
            except RunError as error:  # noqa: PERF203
                errors.append(error)
        if not logs:
            raise errors[0]
        self.html, figures = render_page(logs, assess(logs), LIVE)
        over = all(is_running(log.path.parent) is False for log in logs)
        self.data = {"version": secrets.token_hex(8), "html": self.html, "figures": figures, "is_over": over}


def make_app(page: Page, token: str) -> Starlette:
    """Return the application.

    Args:
        page: page to serve.
        token: first part of every path.
    """

    def is_allowed(request: Request) -> bool:
        return secrets.compare_digest(request.path_params["token"].encode(), token.encode())

    def route(path: str, answer: Any) -> Route:
        # This is not asynchronous, so Starlette runs it in a thread.
        def guarded(request: Request) -> Response:
            response = answer(request) if is_allowed(request) else PlainTextResponse("Not Found", 404)
            response.headers.update(HEADERS)
            return response

        return Route("/{token}" + path, guarded, methods=["GET"])

    def show(request: Request) -> Response:
        try:
            page.refresh()
        except RunError as error:
            # The browser asks again until the run has its first steps.
            return PlainTextResponse(f"{printable(error)}\n", headers={"Refresh": "2"})
        return Response(page.html.encode(errors="replace"), media_type="text/html; charset=utf-8")

    def show_data(request: Request) -> Response:
        try:
            version = page.refresh()
        except RunError as error:
            return Response(json.dumps({"error": printable(error)}), media_type="application/json")
        if version == request.query_params.get("version"):
            return Response(status_code=204)
        return Response(json.dumps(page.data).encode(errors="replace"), media_type="application/json")

    plotly, script = get_plotlyjs().encode(), Path(__file__).with_name("live.js").read_bytes()

    def show_plotly(request: Request) -> Response:
        return Response(plotly, media_type="text/javascript; charset=utf-8")

    def show_script(request: Request) -> Response:
        return Response(script, media_type="text/javascript; charset=utf-8")

    routes = [route("/", show), route("/data", show_data)]
    return Starlette(routes=[*routes, route("/plotly.js", show_plotly), route("/live.js", show_script)])


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens.

    Args:
        host: name or address.
        port: 0 for a free one.

    Raises:
        RunError: the address is not one of this machine, or the port is taken.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
            listener.listen(128)
        except OSError:
            listener.close()
            raise
    except (OSError, OverflowError) as error:
        raise RunError(f"--host {host} --port {port}: {error}. Pass --port 0 for a free port") from None
    return listener


def serve(paths: Sequence[Path], keys: Keys, screen: Screen, *, host: str, port: int, in_browser: bool = False) -> None:
    """Serve the report until the user interrupts it.

    Args:
        paths, keys: see `Page`.
        screen: output of the address.
        host, port: see `listen`.
        in_browser: whether to open the address.

    Raises:
        RunError: there is no run at one of the paths, or `listen` fails.
    """
    page, token = Page(paths, keys), secrets.token_urlsafe(24)
    find_runs(paths)
    listener = listen(host, port)
    with listener:
        address = listener.getsockname()
        shown = socket.gethostname() if host in BOUND_TO_ALL else f"[{host}]" if ":" in host else host
        url = f"http://{shown}:{address[1]}/{token}/"
        screen.line(f"page: {url}")
        screen.line("Ctrl-C ends it.")
        if not _is_loopback(address[0]):
            screen.line("Other machines can reach the page, with this address.", "yellow")
        if in_browser:
            webbrowser.open(url)
        options = {"log_level": "error", "access_log": False, "lifespan": "off", "server_header": False}
        server = uvicorn.Server(uvicorn.Config(make_app(page, token), timeout_graceful_shutdown=1, **options))  # type: ignore[arg-type]
        try:
            server.run(sockets=[listener])
        except KeyboardInterrupt:
            # The server has closed its connections by now.
            return


def _is_loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"
