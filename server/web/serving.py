"""The page's own HTTP server, in a thread beside the fleet's. The only importer of `uvicorn`."""

import socket
import threading
from pathlib import Path
from typing import Final, Self

import uvicorn

from protocol.errors import RequestError
from server.adapters.clock import SystemClock
from server.adapters.store import SqlStore
from server.config import WebSettings
from server.ports import Clock
from server.runtime import Server
from server.web.app import create_app

BACKLOG: Final = 256
STOP_S_MAX: Final = 3
"""How long pages that listen may keep the server from ending."""


class WebServer:
    """Serves the page of a running server; from `start` to `stop`.

    Args:
        server: Has been started.
        settings: Where to listen.
        clock: Wall clock.
    """

    def __init__(self, server: Server, settings: WebSettings, clock: Clock | None = None) -> None:
        self._server = server
        self._settings = settings
        self._clock = clock or SystemClock()
        self._store: SqlStore | None = None
        self._uvicorn: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None
        self._port = settings.port

    @property
    def url(self) -> str:
        """Where the page is."""
        if self._settings.url:
            return self._settings.url
        scheme = "https" if self._settings.certificate else "http"
        host = f"[{self._settings.host}]" if ":" in self._settings.host else self._settings.host
        return f"{scheme}://{host}:{self._port}"

    def start(self) -> None:
        """Listen, and serve in the background.

        Raises:
            RequestError: The address is taken or not one of this machine, or a certificate cannot be used.
        """
        settings = self._settings
        listening = _listen(settings)
        self._port = listening.getsockname()[1]
        self._store = SqlStore(self._server.config.database_url)
        is_secure = bool(settings.certificate) or settings.url.startswith("https://")
        app = create_app(self._server, self._store, self._clock, is_secure=is_secure)
        folder = self._server.config.folder
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=bool(settings.url),
            timeout_graceful_shutdown=STOP_S_MAX,
            ssl_certfile=_file(folder, settings.certificate),
            ssl_keyfile=_file(folder, settings.key),
        )
        try:
            config.load()
        except OSError as error:  # ssl.SSLError is one
            listening.close()
            self._store.close()
            raise RequestError(
                f"[web] certificate or key cannot be used: {error}", hint="correct whimbrel.toml"
            ) from error
        self._uvicorn = uvicorn.Server(config)
        self._thread = threading.Thread(
            target=self._uvicorn.run, args=([listening],), name="whimbrel-web", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """End; harmless when it does not run."""
        if self._uvicorn is None or self._thread is None or self._store is None:
            return
        self._uvicorn.should_exit = True
        self._thread.join()
        self._store.close()
        self._uvicorn = self._thread = self._store = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def _listen(settings: WebSettings) -> socket.socket:
    try:
        family, kind, number, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listening = socket.socket(family, kind, number)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(address)
            listening.listen(BACKLOG)  # whoever comes from now on waits for the first answer
        except BaseException:
            listening.close()
            raise
    except OSError as error:
        raise RequestError(
            f"the page cannot listen on {settings.host}:{settings.port}: {error.strerror or error}",
            hint="choose another port with --web-port, or [web] port in whimbrel.toml",
        ) from error
    return listening


def _file(folder: Path, name: str) -> str | None:
    return str(folder / name) if name else None
