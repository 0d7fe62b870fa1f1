"""The tables `[[webhook]]` of whimbrel.toml, checked: where alerts go, which ones, and what is refused. Pure."""

import ipaddress
import re
from collections.abc import Sequence
from typing import Annotated, Final
from urllib.parse import SplitResult, urlsplit

from msgspec import Meta, Struct

from protocol.errors import RequestError
from server.alerts.records import KINDS, Alert

WEBHOOKS_MAX: Final = 16
PER_MINUTE: Final = 30
URL_CHARS_MAX: Final = 2_000
_NAME: Final = re.compile(r"[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?")


class WebhookSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One table `[[webhook]]`. Relative paths count from the server's folder.

    Attributes:
        name: For people, and for `whimbrel webhooks`.
        url: Where alerts are sent: `https://…`, or `http://` on loopback.
        secret: File with the secret that they are signed with; a second line is the one before it, during a change.
        events: Kinds of alerts, `rollout.*` for all that begin so, `*` for all.
        per_minute: Alerts that are sent in a minute, at most.
        ca: Certificates of who vouches for the receiver, PEM; empty for those that the system trusts.
    """

    name: str
    url: str
    secret: str
    events: tuple[str, ...] = ("*",)
    per_minute: Annotated[int, Meta(ge=1, le=600)] = PER_MINUTE
    ca: str = ""

    def wants(self, alert: Alert) -> bool:
        """Whether it asks for an alert."""
        return any(_matches(pattern, alert.kind) for pattern in self.events)

    @property
    def shown_url(self) -> str:
        """The address without what may be a secret: some receivers have theirs in the path."""
        parts = urlsplit(self.url)
        return f"{parts.scheme}://{parts.netloc}" + ("/…" if parts.path.strip("/") or parts.query else "")


def checked_webhooks(webhooks: Sequence[WebhookSettings], where: str) -> tuple[WebhookSettings, ...]:
    """The webhooks of a settings file.

    Raises:
        RequestError: One of them is not allowed; names the file, the webhook and the field.
    """
    names = [each.name for each in webhooks]
    for name in names:
        if not _NAME.fullmatch(name):
            raise RequestError(
                f"{where}: [[webhook]] name = {name[:80]!r}", hint="use a-z, 0-9 and -, at most 32"
            )
        if names.count(name) > 1:
            raise RequestError(
                f"{where}: two [[webhook]] are called {name}", hint="give each a name of its own"
            )
    if len(names) > WEBHOOKS_MAX:
        raise RequestError(f"{where}: {len(names)} [[webhook]], allowed are {WEBHOOKS_MAX}")
    for each in webhooks:
        try:
            check_url(each.url)
        except RequestError as error:
            raise RequestError(
                f"{where}: [[webhook]] {each.name}: {error.message}", hint=error.hint
            ) from error
        unknown = [pattern for pattern in each.events if not any(_matches(pattern, kind) for kind in KINDS)]
        if unknown or not each.events:
            raise RequestError(
                f"{where}: [[webhook]] {each.name}: events: "
                + (f"there is no {unknown[0][:80]!r}" if unknown else "none"),
                hint=f'known are {", ".join(KINDS)}; or "rollout.*", or "*"',
            )
        if not each.secret:
            raise RequestError(
                f"{where}: [[webhook]] {each.name}: secret is empty",
                hint="name a file; `whimbrel webhooks secret FILE` makes one",
            )
    return tuple(webhooks)


def check_url(url: str) -> SplitResult:
    """An address that alerts may be sent to.

    Raises:
        RequestError: It is none, or would send them in the clear, or holds a password.
    """
    hint = "use https://HOST/PATH, or http://127.0.0.1:PORT/PATH on this machine"
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise RequestError(f"url: {error}", hint=hint) from error
    host = parts.hostname or ""
    if len(url) > URL_CHARS_MAX or not url.isascii() or not url.isprintable() or " " in url:
        raise RequestError(f"url is longer than {URL_CHARS_MAX} characters, or not all of ASCII", hint=hint)
    if parts.scheme not in {"https", "http"} or not host or port == 0:
        raise RequestError("url is no address of the web", hint=hint)
    if "@" in parts.netloc or parts.fragment:
        raise RequestError(
            "url has a user, a password or a fragment", hint="alerts are signed with `secret` instead"
        )
    if parts.scheme == "http" and not _is_loopback(host):
        raise RequestError("url would send alerts in the clear", hint=hint)
    return parts


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _matches(pattern: str, kind: str) -> bool:
    if pattern == "*":
        return True
    if pattern.endswith(".*"):
        return kind.startswith(pattern[:-1])
    return kind == pattern
