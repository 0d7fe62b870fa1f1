"""Who acts now: whoever called the command, unless somebody else was named for the while (the page does, for who is signed in)."""

import getpass
import os
import pwd
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Final

from server.audit import Actor

_ACTOR: Final[ContextVar[Actor | None]] = ContextVar("actor", default=None)


def login() -> str:
    """What whoever runs this process is called, unless they say otherwise."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # no name for this user, as in some containers
        return "unknown"


def current_actor() -> Actor:
    """In whose name things are done here and now; for commands, what the operating system says of who runs them."""
    return _ACTOR.get() or _caller()


def _caller() -> Actor:
    """Variables that anybody can set do not count; who became root by sudo is named, since only root could lie about that."""
    user = os.getuid()
    if user == 0 and (before := os.environ.get("SUDO_USER")):
        return Actor(kind="command", name=before, role="sudo")
    try:
        return Actor(kind="command", name=pwd.getpwuid(user).pw_name)
    except KeyError:
        return Actor(kind="command", name=f"uid {user}")


@contextmanager
def acting(actor: Actor) -> Iterator[None]:
    """Do everything within in the name of `actor`; other threads and tasks are not concerned."""
    token = _ACTOR.set(actor)
    try:
        yield
    finally:
        _ACTOR.reset(token)
