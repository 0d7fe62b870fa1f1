"""Who asks: sign-in, the cookie of a browser, the token of a program; and what keeps others from asking in their name.

A browser sends its cookie with whatever page makes it ask. So the cookie is `SameSite=Strict`, and everything that changes something needs
a header beside it that only our own page knows how to fill (OWASP: synchronizer token). A token in `Authorization` is never sent by itself.
"""

import hmac
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Final, NoReturn

from fastapi import Depends, Request

from server.accounts import SESSION_MS, Role, SessionRecord, UserRecord, may
from server.adapters.secrets import hash_password, is_password, new_token, token_digest
from server.audit import DONE, Act, Actor, new_act
from server.ports import Clock
from server.web.problems import DeniedError, SignInError, TooManyError

COOKIE: Final = "whimbrel"
CSRF_HEADER: Final = "X-CSRF-Token"
_CHANGING: Final = frozenset({"POST", "PUT", "PATCH", "DELETE"})

FAILURES_FREE: Final = 5
"""Wrong passwords for a name before it has to wait."""

WAIT_MS_MAX: Final = 60_000
NAMES_MAX: Final = 10_000
"""Names whose failures are remembered; more are only tried by somebody who guesses."""


@dataclass(frozen=True, slots=True)
class Visit:
    """Somebody who has proved who they are.

    Attributes:
        user: Who.
        session: By which sign-in or token.
        address: Where they ask from.
    """

    user: UserRecord
    session: SessionRecord
    address: str

    @property
    def actor(self) -> Actor:
        """In whose name things are done."""
        return Actor(kind=self.session.kind, name=self.user.name, role=self.user.role, address=self.address)


class Doors:
    """Signs people in, with more and more time between wrong passwords.

    Args:
        clock: Wall clock.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._failures: dict[str, tuple[int, int]] = {}  # by name: how many, and when the next try may come
        # Compared with where there is no such user, so that the time of an answer does not tell which names there are.
        self._nobody = hash_password(new_token())

    def check(self, user: UserRecord | None, name: str, password: str) -> UserRecord:
        """Compare a password.

        Raises:
            SignInError: It is wrong, or there is no such user.
            TooManyError: There were too many wrong ones just now.
        """
        now_ms = self._clock.now_ms()
        count, next_ms = self._failures.get(name, (0, 0))
        if now_ms < next_ms:
            raise TooManyError(
                f"too many wrong passwords for {name}", retry_after_s=(next_ms - now_ms) // 1000 + 1
            )
        if not is_password(password, user.password if user else self._nobody) or user is None:
            if len(self._failures) >= NAMES_MAX:
                self._failures.pop(next(iter(self._failures)))
            wait_ms = (
                0 if count + 1 < FAILURES_FREE else min(1000 << (count + 1 - FAILURES_FREE), WAIT_MS_MAX)
            )
            self._failures[name] = (count + 1, now_ms + wait_ms)
            raise SignInError("name or password is wrong")
        self._failures.pop(name, None)
        return user


def new_page_session(user: UserRecord, now_ms: int) -> tuple[str, SessionRecord]:
    """A sign-in of a browser: the secret for its cookie, and what is kept of it."""
    token = new_token()
    session = SessionRecord(
        digest=token_digest(token),
        user=user.name,
        kind="page",
        csrf=new_token(),
        created_ms=now_ms,
        expires_ms=now_ms + SESSION_MS,
    )
    return token, session


def visit(request: Request) -> Visit:
    """Who asks.

    Raises:
        SignInError: Nobody that is known.
        DeniedError: A browser was made to ask by another page.
    """
    header = request.headers.get("authorization", "")
    is_token = header.lower().startswith("bearer ")
    secret = header[7:].strip() if is_token else request.cookies.get(COOKIE, "")
    store, clock = request.app.state.store, request.app.state.clock
    digest = token_digest(secret)
    held = store.accounts_of(digest).holder(digest, clock.now_ms()) if secret else None
    if held is None or (held[1].kind == "token") != is_token:
        raise SignInError("sign in first")
    user, session = held
    visitor = Visit(user, session, address_of(request))
    if not is_token and request.method in _CHANGING:
        sent = request.headers.get(CSRF_HEADER, "")
        if not hmac.compare_digest(sent.encode(), session.csrf.encode()):
            deny(request, visitor, f"the header {CSRF_HEADER} is not that of this sign-in")
    return visitor


def address_of(request: Request) -> str:
    """Where somebody asks from; behind a proxy, what it says."""
    return request.client.host if request.client else ""


def act_of(request: Request, by: Actor, what: str, on: str, text: str = "", *, outcome: str = DONE) -> Act:
    """Something that is done with the API itself, to be noted in the audit trail."""
    return new_act(by, request.app.state.clock.now_ms(), what, on, text, outcome=outcome)


def deny(request: Request, visitor: Visit, why: str) -> NoReturn:
    """Refuse something to somebody who may not have it, and note that.

    Raises:
        DeniedError: Always.
    """
    on = f"{request.method} {request.url.path}"
    act = act_of(request, visitor.actor, "api.refuse", on, why, outcome=DeniedError.code)
    request.app.state.store.save([act])
    raise DeniedError(why)


def _at_least(role: Role) -> Callable[[Request, Visit], Visit]:
    def check(request: Request, visitor: Annotated[Visit, Depends(visit)]) -> Visit:
        if not may(visitor.user.role, role):
            deny(request, visitor, f"{visitor.user.name} is {visitor.user.role}, this needs {role}")
        return visitor

    return check


Viewer = Annotated[Visit, Depends(_at_least("viewer"))]
Operator = Annotated[Visit, Depends(_at_least("operator"))]
Approver = Annotated[Visit, Depends(_at_least("approver"))]
