"""Who may use the page and the HTTP API of a server, and what each may do. Pure: tokens and hashes come from outside.

Three roles, each of which may do what the one before may: a *viewer* looks, an *operator* starts, pauses and stops rollouts, an
*approver* publishes and withdraws releases, and lets a rollout go further than its evidence does. They are about this server's page and
API only: what devices believe is said by keys (docs/keys.md), and who can read the server's folder needs no account.
"""

import re
from collections.abc import Sequence
from typing import Final, Literal

from msgspec import Struct
from msgspec.structs import replace

from protocol.errors import RequestError

Role = Literal["viewer", "operator", "approver"]
ROLES: Final[tuple[Role, ...]] = ("viewer", "operator", "approver")
"""Ascending: each may do what those before it may."""

SESSION_MS: Final = 12 * 3_600_000
"""Life of a sign-in: a working day."""

TOKEN_DAYS_MAX: Final = 365
USERS_MAX: Final = 1_000
SESSIONS_MAX: Final = 50
"""Of one user; the oldest one ends where another begins."""

PASSWORD_LENGTH_MIN: Final = 12
"""Characters; with no rules about their kinds, as NIST SP 800-63B recommends."""

PASSWORD_LENGTH_MAX: Final = 256
_NAME: Final = re.compile(r"[a-z0-9]([a-z0-9._-]{0,62}[a-z0-9])?")


class UserRecord(Struct, frozen=True, kw_only=True):
    """Somebody who may sign in."""

    v: int = 1
    name: str
    role: Role
    password: str  # Argon2id, in its own text form
    created_ms: int


class SessionRecord(Struct, frozen=True, kw_only=True):
    """A sign-in of a browser, or a token of a program. The secret itself is known to its holder only."""

    v: int = 1
    digest: str  # SHA-256 of the secret
    user: str
    kind: Literal["page", "token"]
    csrf: str = ""  # what a browser has to repeat in a header with everything that changes something
    created_ms: int
    expires_ms: int


class UserRemoval(Struct, frozen=True, kw_only=True):
    """A user is gone."""

    name: str


class SessionRemoval(Struct, frozen=True, kw_only=True):
    """A sign-in or token has ended."""

    digest: str


AccountRecord = UserRecord | SessionRecord | UserRemoval | SessionRemoval


class Accounts:
    """Users, their sign-ins and tokens, as the store has them.

    Args:
        users: All of them.
        sessions: All of them.
    """

    def __init__(self, users: Sequence[UserRecord], sessions: Sequence[SessionRecord]) -> None:
        self.users = {user.name: user for user in users}
        self.sessions = {session.digest: session for session in sessions}

    def user(self, name: str) -> UserRecord:
        """A user.

        Raises:
            RequestError: There is none of this name.
        """
        user = self.users.get(name)
        if user is None:
            raise RequestError(f"there is no user {name[:80]!r}", hint="see `whimbrel users list`")
        return user

    def holder(self, digest: str, now_ms: int) -> tuple[UserRecord, SessionRecord] | None:
        """Whose secret this is; None where it is nobody's, or has ended."""
        session = self.sessions.get(digest)
        if session is None or session.expires_ms <= now_ms:
            return None
        user = self.users.get(session.user)
        return None if user is None else (user, session)

    def add(self, user: UserRecord) -> list[AccountRecord]:
        """A new user.

        Raises:
            RequestError: The name is taken or not allowed, or there are too many.
        """
        if not _NAME.fullmatch(user.name):
            raise RequestError(
                f"user name {user.name[:80]!r} is not allowed",
                hint="use 1 to 64 characters: a-z, 0-9, and inside also . _ -",
            )
        if user.name in self.users:
            raise RequestError(f"there is a user {user.name}", hint="choose another name")
        if len(self.users) >= USERS_MAX:
            raise RequestError(f"there are {USERS_MAX} users, which is the limit")
        return [user]

    def change(
        self, name: str, *, role: Role | None = None, password: str | None = None
    ) -> list[AccountRecord]:
        """Give a user another role, or another password, with which all sign-ins and tokens end.

        Raises:
            RequestError: There is none of this name.
        """
        user = self.user(name)
        after = replace(user, role=role or user.role, password=password or user.password)
        return [after, *(self.end_all(name) if password else [])]

    def remove(self, name: str) -> list[AccountRecord]:
        """Take a user out; what they signed in with ends at once.

        Raises:
            RequestError: There is none of this name.
        """
        return [UserRemoval(name=self.user(name).name), *self.end_all(name)]

    def end_all(self, name: str) -> list[AccountRecord]:
        """End all sign-ins and tokens of a user."""
        return [SessionRemoval(digest=each.digest) for each in self.sessions.values() if each.user == name]

    def end(self, digest: str) -> list[AccountRecord]:
        """End one sign-in or token; harmless when it has ended."""
        return [SessionRemoval(digest=digest)] if digest in self.sessions else []

    def begin(self, session: SessionRecord, now_ms: int) -> list[AccountRecord]:
        """A new sign-in or token; drops what has ended, and the oldest of too many.

        Raises:
            RequestError: There is no such user (any more).
        """
        self.user(session.user)
        ended = [each for each in self.sessions.values() if each.expires_ms <= now_ms]
        live = [
            each for each in self.sessions.values() if each.expires_ms > now_ms and each.user == session.user
        ]
        live.sort(key=lambda each: each.created_ms)
        ended += live[: max(0, len(live) - SESSIONS_MAX + 1)]
        return [*(SessionRemoval(digest=each.digest) for each in ended), session]


def may(role: Role, needed: Role) -> bool:
    """Whether a role includes another."""
    return ROLES.index(role) >= ROLES.index(needed)


def check_password(password: str) -> str:
    """A password that may be chosen.

    Raises:
        RequestError: It is too short or too long.
    """
    if not PASSWORD_LENGTH_MIN <= len(password) <= PASSWORD_LENGTH_MAX:
        raise RequestError(
            f"a password of {len(password)} characters",
            hint=f"use {PASSWORD_LENGTH_MIN} to {PASSWORD_LENGTH_MAX}: a few words are easiest to remember",
        )
    return password
