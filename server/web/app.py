"""The application: routes, the page's files, and what every answer carries."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from importlib import metadata
from pathlib import Path
from typing import Final

from fastapi import FastAPI, Request, Response
from fastapi.responses import FileResponse, JSONResponse
from fastapi.staticfiles import StaticFiles

from server.adapters.store import SqlStore
from server.ports import Clock
from server.runtime import Server
from server.web import acting, metrics, reading, trail, weighing
from server.web.access import Doors
from server.web.feed import Feed
from server.web.problems import add_handlers
from server.web.views import Problem

STATIC: Final = Path(__file__).parent / "static"
BODY_BYTES_MAX: Final = 65_536
"""Of a request: the longest one is an order with its reason."""


_HEADERS: Final = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
"""The page needs nothing from elsewhere, and nobody may put it into theirs."""


def create_app(server: Server, store: SqlStore, clock: Clock, *, is_secure: bool) -> FastAPI:
    """The application of a running server.

    Args:
        server: What it shows.
        store: An open store on the same database.
        clock: Wall clock.
        is_secure: Whether browsers come by https, and the cookie must not go any other way.
    """

    @contextlib.asynccontextmanager
    async def living(app: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(app.state.feed.run())
        yield
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    app = FastAPI(
        title="Whimbrel",
        version=metadata.version("whimbrel"),
        description="What an operator can see and do. Sign in with `POST /api/v1/session`, or send a token: `Authorization: Bearer …`.",
        openapi_url="/api/openapi.json",
        docs_url=None,  # they load scripts from elsewhere
        redoc_url=None,
        lifespan=living,
    )
    app.state.server = server
    app.state.store = store
    app.state.clock = clock
    app.state.is_secure = is_secure
    app.state.doors = Doors(clock)
    app.state.feed = Feed(server, clock)
    routers = (reading.router, weighing.router, acting.router, trail.router, metrics.router)
    add_handlers(app, routers)
    for router in routers:
        app.include_router(router)

    @app.middleware("http")
    async def finish(request: Request, call: Callable[[Request], Awaitable[Response]]) -> Response:
        response = _too_long(request) or await call(request)
        for name, value in _HEADERS.items():
            response.headers.setdefault(name, value)
        if request.url.path.startswith("/api/"):
            response.headers.setdefault("Cache-Control", "no-store")
        else:
            response.headers.setdefault("Cache-Control", "no-cache")
        return response

    @app.get("/", include_in_schema=False)
    def page() -> FileResponse:
        return FileResponse(STATIC / "index.html")

    app.mount("/static", StaticFiles(directory=STATIC))
    return app


def _too_long(request: Request) -> Response | None:
    """A refusal, where the body is longer than any that is understood, or does not say how long it is."""
    length = request.headers.get("content-length", "0")
    is_stated = length.isascii() and length.isdigit() and "transfer-encoding" not in request.headers
    if is_stated and int(length[:20]) <= BODY_BYTES_MAX:
        return None
    problem = Problem(
        code="web.too_long",
        message=f"the body has to say its length, and may have {BODY_BYTES_MAX} bytes",
        hint="send less, with Content-Length",
    )
    return JSONResponse(problem.model_dump(), 413)
