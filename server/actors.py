"""Who acts now: whoever called the command, unless somebody else was named for the while (the page does, for who is signed in)."""

import getpass
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Final

from server.audit import Actor

_ACTOR: Final[ContextVar[Actor | None]] = ContextVar("actor", default=None)


def login() -> str:
    """The operating system's name for whoever runs this process."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # no name for this user, as in some containers
        return "unknown"


def current_actor() -> Actor:
    """In whose name things are done here and now."""
    return _ACTOR.get() or Actor(kind="command", name=login())


@contextmanager
def acting(actor: Actor) -> Iterator[None]:
    """Do everything within in the name of `actor`; other threads and tasks are not concerned."""
    token = _ACTOR.set(actor)
    try:
        yield
    finally:
        _ACTOR.reset(token)
