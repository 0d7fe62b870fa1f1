"""What a request can come to instead of an answer, and how that is said: a status, and a `Problem` as JSON."""

from collections.abc import Sequence
from typing import Any, Final

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from protocol.errors import RequestError, TopicError, UnknownReleaseError, WhimbrelError
from server.web.views import Problem


class SignInError(WhimbrelError):
    """Nobody that is known asks."""

    code = "web.sign_in"


class DeniedError(WhimbrelError):
    """Who asks may not have this."""

    code = "web.denied"


class NotFoundError(WhimbrelError):
    """There is no such thing."""

    code = "web.not_found"


class TooManyError(WhimbrelError):
    """Not now.

    Args:
        message: Why.
        retry_after_s: When it can be tried again.
    """

    code = "web.too_many"

    def __init__(self, message: str, *, retry_after_s: int) -> None:
        super().__init__(message, hint=f"try again in {retry_after_s} s")
        self.retry_after_s = retry_after_s


_STATUS: Final[dict[type[WhimbrelError], int]] = {
    SignInError: 401,
    DeniedError: 403,
    NotFoundError: 404,
    TooManyError: 429,
    UnknownReleaseError: 404,
    RequestError: 409,
    TopicError: 422,
}
"""The first one that fits."""

_CODES: Final = {404: "web.not_found", 405: "web.method"}
RESPONSES: Final[dict[int | str, dict[str, Any]]] = {
    status: {"model": Problem, "description": text}
    for status, text in (
        (400, "the body is not what its length or type says"),
        (401, "nobody is signed in"),
        (403, "not with this role"),
        (404, "there is no such thing"),
        (409, "it cannot be done as things stand; says why"),
        (413, "the body is too long, or does not say how long it is"),
        (422, "a field is not as it has to be"),
        (429, "not now; see Retry-After"),
        (503, "the server cannot do it for now: its disk, its database, its keys"),
    )
}
"""For the OpenAPI description of every route."""


def add_handlers(app: FastAPI, routers: Sequence[APIRouter]) -> None:
    """Have every error of the routes in `routers` told as a `Problem`."""

    @app.exception_handler(WhimbrelError)
    def _told(_: Request, error: WhimbrelError) -> JSONResponse:
        status = next((status for kind, status in _STATUS.items() if isinstance(error, kind)), 503)
        headers = {"Retry-After": str(error.retry_after_s)} if isinstance(error, TooManyError) else None
        problem = Problem(code=error.code, message=error.message, hint=error.hint)
        return JSONResponse(problem.model_dump(), status, headers)

    @app.exception_handler(RequestValidationError)
    def _malformed(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        problem = Problem(code="web.field", message=f"{where}: {first['msg']}", hint="see /api/openapi.json")
        return JSONResponse(problem.model_dump(), 422)

    @app.exception_handler(HTTPException)
    def _http(request: Request, error: HTTPException) -> JSONResponse:
        headers = dict(error.headers or {})
        if error.status_code == 405:  # the framework names the methods of one route only
            routes = [route for each in routers for route in each.routes if isinstance(route, APIRoute)]
            fitting = [
                route.methods or set() for route in routes if route.path_regex.fullmatch(request.url.path)
            ]
            headers["Allow"] = ", ".join(sorted(set().union(*fitting)))
        problem = Problem(
            code=_CODES.get(error.status_code, "web.request"), message=str(error.detail), hint=""
        )
        return JSONResponse(problem.model_dump(), error.status_code, headers)
