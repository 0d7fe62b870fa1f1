"""`whimbrel keys …`: who signs for what, and the ceremony of signing, one person at a time.

docs/keys.md leads through it.
"""

import argparse
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import msgspec
from securesystemslib.signer import Key, Signer  # type: ignore[attr-defined]  # public, but without __all__

from protocol.errors import RequestError
from protocol.release import DIRECTOR_ROLE
from server import ceremony
from server.adapters.blobs import write_file
from server.adapters.keys import asker, new_passphrase, read_key, write_private
from server.display import table
from server.releases.metadata import KeyInfo, Standing, key_info
from server.releases.signers import make_key, public_key_of, remote_signer, signer_of

_ROLE_HELP: Final = "root, targets, snapshot, timestamp, artifacts, director, or releases.FAMILY"


def add_parser(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add `keys` to the commands of `whimbrel`."""
    keys = commands.add_parser("keys", help="who signs for what; make, rotate, revoke keys, add signatures")
    actions = keys.add_subparsers(metavar="ACTION", required=True)
    _add_key_files(actions)
    listing = actions.add_parser(
        "list", parents=[common], help="roles with their keys, and what waits for signatures"
    )
    listing.set_defaults(run=_list)
    _add_changes(actions, common)
    _add_signatures(actions, common)


def _add_key_files(actions: Any) -> None:
    make = actions.add_parser("make", help="make a key: NAME.pem is secret, NAME.pub is for the others")
    make.add_argument("name", metavar="NAME", help="of a person or a machine")
    make.add_argument("-o", "--output", type=Path, default=Path(), metavar="FOLDER", help="default: here")
    make.add_argument("--passphrase-file", type=Path, metavar="FILE", help="instead of asking for it")
    make.add_argument(
        "--no-passphrase", action="store_true", help="for a machine that signs by itself; readable to thieves"
    )
    make.add_argument("--json", action="store_true", help="print JSON for programs")
    make.set_defaults(run=_make)
    show = actions.add_parser("show", help="name, id and kind of a public key, as `keys list` has them")
    show.add_argument("file", metavar="FILE", type=Path, help="NAME.pub")
    show.add_argument("--json", action="store_true", help="print JSON for programs")
    show.set_defaults(run=_show)


def _add_changes(actions: Any, common: argparse.ArgumentParser) -> None:
    assign = actions.add_parser("assign", parents=[common], help="say which keys sign for a role")
    assign.add_argument("role", metavar="ROLE", help=_ROLE_HELP)
    assign.add_argument("keys", metavar="NAME.pub", nargs="+", type=Path, help="public keys, all of them")
    assign.add_argument(
        "--threshold",
        metavar="N",
        type=int,
        help="how many have to sign (default: all of them; for the director one)",
    )
    assign.set_defaults(run=_assign)
    rotate = actions.add_parser("rotate", parents=[common], help="put one key in the place of another")
    rotate.add_argument("old", metavar="OLD", help="name or id of the key that goes")
    rotate.add_argument("new", metavar="NAME.pub", type=Path, help="the key that comes")
    rotate.add_argument("--role", default="", help="only in this role (default: in all that have it)")
    rotate.set_defaults(run=_rotate)
    revoke = actions.add_parser("revoke", parents=[common], help="take a key away")
    revoke.add_argument("old", metavar="OLD", help="name or id of the key that goes")
    revoke.add_argument("--role", default="", help="only from this role (default: from all that have it)")
    revoke.set_defaults(run=_revoke)
    renew = actions.add_parser("renew", parents=[common], help="give a document a new life")
    renew.add_argument("role", metavar="ROLE", help="root, targets, or releases.FAMILY")
    renew.set_defaults(run=_renew)


def _add_signatures(actions: Any, common: argparse.ArgumentParser) -> None:
    sign = actions.add_parser("sign", parents=[common], help="add your signature to what waits for it")
    sign.add_argument(
        "files", metavar="DOCUMENT", nargs="*", type=Path, help="sign these files, without a repository"
    )
    sign.add_argument(
        "--key", required=True, metavar="KEY", help="NAME.pem, or the URI of a token or key service"
    )
    sign.add_argument("--public", type=Path, metavar="NAME.pub", help="public key of a URI")
    sign.add_argument("--passphrase-file", type=Path, metavar="FILE", help="instead of asking for it")
    sign.set_defaults(run=_sign)
    publish = actions.add_parser(
        "publish", parents=[common], help="publish what waits, once nothing lacks a signature"
    )
    publish.set_defaults(run=_publish)
    drop = actions.add_parser("drop", parents=[common], help="give up what waits for signatures")
    drop.set_defaults(run=_drop)


# Keys


def _make(arguments: argparse.Namespace) -> int:
    name = arguments.name
    if not name or name.startswith(".") or "/" in name:
        raise RequestError(f"a key cannot be called {name[:80]!r}", hint="the name is that of two files")
    secret = None if arguments.no_passphrase else new_passphrase(arguments.passphrase_file)
    private, public = make_key(secret)
    path = arguments.output / f"{name}.pem"
    write_private(path, private)
    write_file(path.with_suffix(".pub"), public)
    info = key_info(public_key_of(name, public))
    lines = [
        f"{path} is secret: keep it, and a copy, where no one else gets at it",
        f"{path.with_suffix('.pub')} is for the others: {_key_text(info)}",
    ]
    value = {"private": str(path), "public": str(path.with_suffix(".pub"))}
    _print(arguments, value | msgspec.to_builtins(info), lines)
    return 0


def _show(arguments: argparse.Namespace) -> int:
    info = key_info(_public(arguments.file))
    _print(arguments, msgspec.to_builtins(info), [f"{_key_text(info)}, {info.scheme}", info.keyid])
    return 0


def _list(arguments: argparse.Namespace) -> int:
    status = ceremony.status(arguments.dir)
    rows = [
        [
            role.role,
            f"{role.threshold} of {len(role.keys)}",
            ", ".join(_key_text(each.key) + (" here" if each.is_here else "") for each in role.keys),
            str(role.version),
            _day(role.expires_ms) + (" !" if role.is_due else ""),
            "the server" if role.is_automatic else "people",
        ]
        for role in status.roles
    ]
    lines = table(["ROLE", "SIGN", "KEYS", "VERSION", "EXPIRES", "SIGNED BY"], rows)
    if status.pending:
        lines += ["", *_waiting_lines(arguments.dir, status.pending)]
    _print(arguments, msgspec.to_builtins(status), lines)
    return 0


# Changes


def _assign(arguments: argparse.Namespace) -> int:
    keys = [_public(path) for path in arguments.keys]
    every = 1 if arguments.role == DIRECTOR_ROLE else len(keys)
    threshold = every if arguments.threshold is None else arguments.threshold
    return _outcome(arguments, ceremony.assign(arguments.dir, arguments.role, keys, threshold))


def _rotate(arguments: argparse.Namespace) -> int:
    new = _public(arguments.new)
    return _outcome(arguments, ceremony.rotate(arguments.dir, arguments.old, new, arguments.role))


def _revoke(arguments: argparse.Namespace) -> int:
    return _outcome(arguments, ceremony.revoke(arguments.dir, arguments.old, arguments.role))


def _renew(arguments: argparse.Namespace) -> int:
    return _outcome(arguments, ceremony.renew(arguments.dir, arguments.role))


# Signatures


def _sign(arguments: argparse.Namespace) -> int:
    if not arguments.files and not arguments.json:
        waiting = ceremony.status(arguments.dir).pending
        if not waiting:
            raise RequestError("nothing waits for signatures")
        print("\n".join(_waiting_lines(arguments.dir, waiting)))  # noqa: T201 - before the passphrase is asked for
    signer = _signer(arguments)
    name = key_info(signer.public_key).name
    if arguments.files:
        for path in arguments.files:
            ceremony.sign_file(path, signer)
        lines = [f"{path} is signed by {name}" for path in arguments.files]
        _print(arguments, {"signed": [str(path) for path in arguments.files]}, lines)
        return 0
    roles, waiting_now = ceremony.sign_pending(arguments.dir, signer)
    return _outcome(arguments, waiting_now, [f"{name} signed {', '.join(roles)}"])


def _publish(arguments: argparse.Namespace) -> int:
    waiting = ceremony.publish(arguments.dir)
    _outcome(arguments, waiting)
    return 1 if waiting else 0


def _drop(arguments: argparse.Namespace) -> int:
    roles = ceremony.drop(arguments.dir)
    lines = [f"Given up: {', '.join(roles)}"] if roles else ["Nothing waits for signatures"]
    _print(arguments, {"dropped": roles}, lines)
    return 0


def _signer(arguments: argparse.Namespace) -> Signer:
    """The key that signs: a file, or something that is reached by its URI."""
    text, ask = arguments.key, asker(arguments.passphrase_file)
    path = Path(text)
    if ":" not in text or path.exists():
        pem = read_key(path)
        secret = ask(f"Passphrase of {path.stem}") if b"ENCRYPTED" in pem else None
        return signer_of(path.stem, pem, secret)
    if arguments.public is None:
        raise RequestError(f"{text[:200]}: its public key is missing", hint="give --public NAME.pub")
    return remote_signer(text, _public(arguments.public), ask)


def _public(path: Path) -> Key:
    return public_key_of(path.stem, read_key(path))


# Output


def waiting_text(standings: list[Standing]) -> list[str]:
    """What a command says that changed something which others have to sign."""
    lines = []
    for standing in standings:
        if standing.missing:
            who = ", ".join(key.name for key in standing.unsigned)
            lines.append(
                f"{standing.role} version {standing.version} lacks {standing.missing} signature(s) of: {who}"
            )
    return lines


def _outcome(arguments: argparse.Namespace, waiting: list[Standing], lines: list[str] | None = None) -> int:
    lines = list(lines or [])
    lines += [*waiting_text(waiting), "Each signs with `whimbrel keys sign`"] if waiting else ["Published"]
    value = {"is_published": not waiting, "waiting": msgspec.to_builtins(waiting)}
    _print(arguments, value, lines)
    return 0


def _waiting_lines(folder: Path, waiting: list[ceremony.Waiting]) -> list[str]:
    lines = [f"Waiting in {folder / 'pending'}:"]
    for each in waiting:
        standing = each.standing
        signed = ", ".join(key.name for key in standing.signed) or "nobody"
        lines.append(
            f"  {standing.role} version {standing.version}, until {_day(standing.expires_ms)}: signed by {signed}, "
            + (f"lacks {standing.missing}" if standing.missing else "complete")
        )
        lines += [f"    {line}" for line in each.changes]
    return lines


def _key_text(info: KeyInfo) -> str:
    return f"{info.name} ({info.keyid[:8]})"


def _day(at_ms: int) -> str:
    return datetime.fromtimestamp(at_ms / 1000, UTC).strftime("%Y-%m-%d")


def _print(arguments: argparse.Namespace, value: Any, lines: list[str]) -> None:
    print(json.dumps(value) if arguments.json else "\n".join(lines))  # noqa: T201 - a command line prints
