"""`whimbrel webhooks`: where alerts go, how it goes with them, and whether a receiver understands us."""

import argparse
from pathlib import Path
from typing import Any

import msgspec

from protocol.errors import RequestError
from server.adapters.keys import write_private
from server.alerts.delivery import headers, message
from server.alerts.records import WebhookStanding, new_alert
from server.audit import DONE
from server.display import Printer, instant_text, table
from server.home import opened


class WebhookError(RequestError):
    """A receiver did not take what it was sent."""

    code = "webhook.refused"


def add_parser(commands: Any, common: argparse.ArgumentParser, printer: Printer) -> None:
    """Register `webhooks` and its actions."""
    webhooks = commands.add_parser("webhooks", help="where alerts go, and how it goes with them")
    actions = webhooks.add_subparsers(metavar="ACTION", required=True)
    listing = actions.add_parser(
        "list", parents=[common], help="list the webhooks with what waits and what failed last"
    )
    listing.set_defaults(run=_list, printer=printer)
    test = actions.add_parser("test", parents=[common], help="send a test to one webhook, at once")
    test.add_argument("name", metavar="NAME", help="as in whimbrel.toml")
    test.set_defaults(run=_test, printer=printer)
    secret = actions.add_parser("secret", help="make a secret for a webhook; the receiver needs it too")
    secret.add_argument("file", metavar="FILE", type=Path, help="new file, readable by you only")
    secret.add_argument("--json", action="store_true", help="print JSON for programs")
    secret.set_defaults(run=_secret, printer=printer)


def _list(arguments: argparse.Namespace) -> int:
    with opened(arguments.dir) as home:
        webhooks = home.config.webhooks
        standings = home.store.standings([webhook.name for webhook in webhooks])
    rows = [
        [
            webhook.name,
            webhook.shown_url,
            ", ".join(webhook.events),
            str(standing.waiting),
            str(standing.delivered),
            str(standing.dropped),
            _failed_text(standing),
        ]
        for webhook, standing in zip(webhooks, standings, strict=True)
    ]
    lines = table(["NAME", "TO", "EVENTS", "WAIT", "SENT", "DROPPED", "FAILED LAST"], rows)
    values = [
        {"url": webhook.shown_url, "events": webhook.events, **msgspec.to_builtins(standing)}
        for webhook, standing in zip(webhooks, standings, strict=True)
    ]
    arguments.printer(arguments, values, lines or ["No [[webhook]] in whimbrel.toml (docs/alerts.md)"])
    return 0


def _test(arguments: argparse.Namespace) -> int:
    from server.adapters.webhooks import post, read_secrets  # noqa: PLC0415 - brings urllib3: no other command needs it

    with opened(arguments.dir) as home:
        found = [webhook for webhook in home.config.webhooks if webhook.name == arguments.name]
        if not found:
            known = ", ".join(webhook.name for webhook in home.config.webhooks) or "none"
            raise RequestError(f"there is no webhook {arguments.name[:80]!r}", hint=f"known are: {known}")
        webhook, now_ms = found[0], home.clock.now_ms()
        with home.attempting("webhook.test", webhook.name):
            secrets = read_secrets(home.config.folder, webhook)
            alert = new_alert(
                "webhook.test", webhook.name, now_ms, "A test, sent by `whimbrel webhooks test`"
            )
            body = message(alert, home.config.fleet)
            answer = post(home.config.folder, webhook, headers(alert, body, secrets, now_ms), body)
            if not answer.is_good:
                raise WebhookError(
                    f"{webhook.shown_url}: {answer.error}", hint="correct [[webhook]] or the receiver"
                )
        home.store.save([home.act("webhook.test", webhook.name, DONE)])
    took_ms = home.clock.now_ms() - now_ms
    lines = [f"{webhook.shown_url} answered {answer.status} after {took_ms} ms"]
    arguments.printer(arguments, {"id": alert.id, "status": answer.status, "took_ms": took_ms}, lines)
    return 0


def _secret(arguments: argparse.Namespace) -> int:
    from server.adapters.webhooks import new_secret  # noqa: PLC0415 - likewise

    write_private(arguments.file, new_secret().encode() + b"\n")
    lines = [f"{arguments.file} holds a secret; give the receiver a copy of what is in it"]
    arguments.printer(arguments, {"file": str(arguments.file)}, lines)
    return 0


def _failed_text(standing: WebhookStanding) -> str:
    failed = standing.failed
    if failed is None:
        return "-"
    return f"{instant_text(failed.tried_ms or failed.since_ms)}: {failed.error}"
