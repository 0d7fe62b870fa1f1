"""`whimbrel users`: who may use the page and the API of this server."""

import argparse
import getpass
import sys
from pathlib import Path
from typing import Any, Final

from protocol.errors import RequestError
from server.accounts import (
    PASSWORD_LENGTH_MAX,
    ROLES,
    TOKEN_DAYS_MAX,
    AccountRecord,
    Accounts,
    SessionRecord,
    UserRecord,
    check_password,
)
from server.adapters.secrets import hash_password, new_token, token_digest
from server.audit import Act
from server.display import Printer, table
from server.home import opened

_DAY_MS: Final = 86_400_000


def add_parser(commands: Any, common: argparse.ArgumentParser, printer: Printer) -> None:
    """Register `users` and its actions."""
    users = commands.add_parser("users", help="say who may use the page and the HTTP API")
    actions = users.add_subparsers(metavar="ACTION", required=True)
    add = actions.add_parser("add", parents=[common], help="let somebody sign in")
    add.add_argument("name", metavar="NAME")
    add.add_argument(
        "--role", choices=ROLES, default="viewer", help="what they may do (default: %(default)s)"
    )
    _add_password(add)
    add.set_defaults(run=_add, printer=printer)
    role = actions.add_parser("role", parents=[common], help="change what somebody may do")
    role.add_argument("name", metavar="NAME")
    role.add_argument("role", choices=ROLES)
    role.set_defaults(run=_role, printer=printer)
    password = actions.add_parser(
        "password", parents=[common], help="change a password; everything that was signed in with it ends"
    )
    password.add_argument("name", metavar="NAME")
    _add_password(password)
    password.set_defaults(run=_password, printer=printer)
    token = actions.add_parser(
        "token", parents=[common], help="make a token for a program, with a user's role"
    )
    token.add_argument("name", metavar="NAME")
    token.add_argument(
        "--days",
        type=_days,
        default=90,
        help=f"how long it is good, at most {TOKEN_DAYS_MAX} (default: %(default)s)",
    )
    token.set_defaults(run=_token, printer=printer)
    remove = actions.add_parser(
        "remove", parents=[common], help="end somebody's sign-ins, tokens and account"
    )
    remove.add_argument("name", metavar="NAME")
    remove.set_defaults(run=_remove, printer=printer)
    listing = actions.add_parser("list", parents=[common], help="list the users")
    listing.set_defaults(run=_list, printer=printer)


def _add_password(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--password-file",
        type=Path,
        metavar="FILE",
        help="first line is the password (default: ask, or read stdin)",
    )


def _add(arguments: argparse.Namespace) -> int:
    password = _chosen_password(arguments)
    with opened(arguments.dir) as home, home.attempting("user.add", arguments.name):
        user = UserRecord(
            name=arguments.name,
            role=arguments.role,
            password=hash_password(password),
            created_ms=home.clock.now_ms(),
        )
        act = home.act("user.add", user.name, role=user.role)
        home.store.change_accounts(lambda accounts: [*accounts.add(user), act])
    _print(arguments, f"{arguments.name} may sign in as {arguments.role}")
    return 0


def _role(arguments: argparse.Namespace) -> int:
    name, role = arguments.name, arguments.role
    with opened(arguments.dir) as home, home.attempting("user.role", name):

        def change(accounts: Accounts) -> list[AccountRecord | Act]:
            before = accounts.user(name).role
            return [*accounts.change(name, role=role), home.act("user.role", name, role=role, before=before)]

        home.store.change_accounts(change)
    _print(arguments, f"{arguments.name} is {arguments.role} from now on")
    return 0


def _password(arguments: argparse.Namespace) -> int:
    with opened(arguments.dir) as home:
        home.store.accounts().user(arguments.name)  # before a password is asked for
        kept = hash_password(_chosen_password(arguments))
        act = home.act("user.password", arguments.name)
        home.store.change_accounts(lambda accounts: [*accounts.change(arguments.name, password=kept), act])
    _print(arguments, f"{arguments.name} has a new password; sign-ins and tokens from before have ended")
    return 0


def _token(arguments: argparse.Namespace) -> int:
    token = new_token()
    with opened(arguments.dir) as home:
        now_ms = home.clock.now_ms()
        session = SessionRecord(
            digest=token_digest(token),
            user=arguments.name,
            kind="token",
            created_ms=now_ms,
            expires_ms=now_ms + arguments.days * _DAY_MS,
        )
        act = home.act("user.token", arguments.name, days=arguments.days)
        home.store.change_accounts(lambda accounts: [*accounts.begin(session, now_ms), act])
    lines = [token, f"Shown once; good for {arguments.days} days as `Authorization: Bearer TOKEN`"]
    arguments.printer(arguments, {"token": token, "expires_ms": session.expires_ms}, lines)
    return 0


def _remove(arguments: argparse.Namespace) -> int:
    with opened(arguments.dir) as home, home.attempting("user.remove", arguments.name):
        act = home.act("user.remove", arguments.name)
        home.store.change_accounts(lambda accounts: [*accounts.remove(arguments.name), act])
    _print(arguments, f"{arguments.name} is gone, with all sign-ins and tokens")
    return 0


def _list(arguments: argparse.Namespace) -> int:
    with opened(arguments.dir) as home:
        accounts, now_ms = home.store.accounts(), home.clock.now_ms()
    live = [session for session in accounts.sessions.values() if session.expires_ms > now_ms]
    values = [
        {
            "name": user.name,
            "role": user.role,
            "created_ms": user.created_ms,
            "pages": sum(each.user == user.name and each.kind == "page" for each in live),
            "tokens": sum(each.user == user.name and each.kind == "token" for each in live),
        }
        for user in accounts.users.values()
    ]
    rows = [[str(value[name]) for name in ("name", "role", "pages", "tokens")] for value in values]
    lines = table(["NAME", "ROLE", "SIGNED IN", "TOKENS"], rows)
    arguments.printer(arguments, values, lines or ["No user yet: `whimbrel users add NAME --role approver`"])
    return 0


def _chosen_password(arguments: argparse.Namespace) -> str:
    if arguments.password_file is not None:
        try:
            with arguments.password_file.open(encoding="utf-8") as file:
                text = file.readline(PASSWORD_LENGTH_MAX + 2)
        except (OSError, UnicodeDecodeError) as error:
            raise RequestError(f"{arguments.password_file}: {error}", hint="give a text file") from error
        return check_password(text.rstrip("\r\n"))
    if not sys.stdin.isatty():
        return check_password(sys.stdin.readline(PASSWORD_LENGTH_MAX + 2).rstrip("\r\n"))
    password = check_password(getpass.getpass(f"Password of {arguments.name}: "))
    if getpass.getpass("Once more: ") != password:
        raise RequestError("the two passwords differ", hint="try again")
    return password


def _print(arguments: argparse.Namespace, line: str) -> None:
    arguments.printer(arguments, {"user": arguments.name}, [line])


def _days(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text[:6]) <= TOKEN_DAYS_MAX:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not between 1 and {TOKEN_DAYS_MAX}")
    return int(text)
