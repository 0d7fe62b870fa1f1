"""`whimbrel audit`: who did what, and whether the records of it are whole."""

import argparse
import re
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import msgspec

from server.arguments import integer
from server.audit import DONE, AuditRecord, actor_text, parse_head
from server.display import Printer, instant_text, table
from server.home import opened

SHOWN: Final = 100
COUNT_MAX: Final = 1_000_000
_UNITS: Final = {"m": "minutes", "h": "hours", "d": "days"}
_AGE: Final = re.compile(r"(\d{1,5})([mhd])")


def add_parser(commands: Any, common: argparse.ArgumentParser, printer: Printer) -> None:
    """Register `audit` and its actions."""
    audit = commands.add_parser("audit", help="who did what, and whether the records of it are whole")
    actions = audit.add_subparsers(metavar="ACTION", required=True)
    listing = actions.add_parser("list", parents=[common], help="list acts, newest first")
    listing.add_argument(
        "--since", type=_since, metavar="TIME", default=None, help="for example 2h, 7d or 2027-01-31"
    )
    listing.add_argument("--who", default="", metavar="NAME", help="only by this user or device, or `server`")
    listing.add_argument(
        "--what",
        default="",
        metavar="KIND",
        help="only acts whose kind begins so, for example rollout or user.add",
    )
    listing.add_argument(
        "--count",
        type=integer(1, COUNT_MAX),
        default=SHOWN,
        metavar="N",
        help="at most so many (default: %(default)s)",
    )
    listing.set_defaults(run=_list, printer=printer)
    verify = actions.add_parser(
        "verify",
        parents=[common],
        help="look whether a record was altered or removed; exit code 1 if so",
        description="Look whether a record was altered or removed. Whoever can write the database can make a whole new chain: note what this prints somewhere else, and give it later with --expect.",
    )
    verify.add_argument(
        "--expect",
        metavar="NUMBER:DIGEST",
        help="a record as it was printed before, which has to be there still",
    )
    verify.set_defaults(run=_verify, printer=printer)


def _list(arguments: argparse.Namespace) -> int:
    with opened(arguments.dir) as home:
        since = arguments.since
        since_ms = 0
        if isinstance(since, timedelta):
            since_ms = home.clock.now_ms() - int(since.total_seconds() * 1000)
        elif isinstance(since, datetime):
            since_ms = int(since.timestamp() * 1000)
        records = home.store.audit(
            since_ms=since_ms, who=arguments.who, what=arguments.what, count_max=arguments.count
        )
    rows = [
        [str(each.number), instant_text(each.at_ms), actor_text(each.by), each.what, each.on, _outcome(each)]
        for each in records
    ]
    lines = table(["NUMBER", "WHEN", "WHO", "WHAT", "ON", "OUTCOME"], rows)
    arguments.printer(arguments, msgspec.to_builtins(records), lines or ["Nothing is noted that matches"])
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    expected = None if arguments.expect is None else parse_head(arguments.expect)
    with opened(arguments.dir) as home:
        verified = home.store.verify_audit(expected)
    value = {
        "is_whole": not verified.faults,
        "records": verified.records,
        "first": verified.first,
        "head": str(verified.head),
        "faults": verified.faults,
    }
    if verified.faults:
        lines = ["The audit trail is NOT whole:", *(f"  {fault}" for fault in verified.faults)]
    else:
        kept = (
            f"{verified.records} records from number {verified.first}"
            if verified.records
            else "no record yet"
        )
        lines = [f"The audit trail is whole: {kept}", f"Newest: {verified.head}"]
    arguments.printer(arguments, value, lines)
    return 1 if verified.faults else 0


def _outcome(record: AuditRecord) -> str:
    facts = [record.text] if record.text else []
    facts += [f"{name} {value}" for name, value in record.details.items() if value != ""]
    said = "; ".join(facts)
    if record.outcome == DONE:
        return said or DONE
    return f"{record.outcome}: {said}" if said else record.outcome


def _since(text: str) -> timedelta | datetime:
    found = _AGE.fullmatch(text)
    if found is not None:
        return timedelta(**{_UNITS[found[2]]: int(found[1])})
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text[:40]!r} is no time such as 90m, 2h, 7d or 2027-01-31T08:00"
        ) from None
    return when if when.tzinfo else when.replace(tzinfo=UTC)
