"""How an alert goes to a webhook: what is sent, how it is signed, when it is tried again, when it is given up. Pure.

Messages follow Standard Webhooks (https://github.com/standard-webhooks/standard-webhooks, spec/standard-webhooks.md).
"""

import base64
import binascii
import hashlib
import hmac
import re
from datetime import UTC, datetime
from typing import Final, NamedTuple

import msgspec

from protocol.errors import RequestError
from server.alerts.records import Alert, Delivery

SECRET_PREFIX: Final = "whsec_"  # noqa: S105 - what secrets begin with, and none itself
SECRET_BYTES_MIN: Final = 24
SECRET_BYTES_MAX: Final = 64
"""As Standard Webhooks has them."""

SECRETS_MAX: Final = 2
"""The one in use and the one before it: receivers change over without missing an alert."""

RETRY_MS: Final = 5_000
"""Before the second attempt; each further wait is three times as long, and somewhere between half of that and all."""

RETRY_MS_MAX: Final = 3_600_000
AGE_MS_MAX: Final = 3 * 24 * 3_600_000
"""After which an alert is given up: a weekend, and Monday morning."""

WAITING_MAX: Final = 1_000
"""Deliveries that wait for one webhook; beyond it the oldest are given up."""

GONE: Final = 410
"""A receiver that answers this wants no more, says Standard Webhooks."""

_ERROR_CHARS_MAX: Final = 300
_UNPRINTABLE: Final = re.compile(r"[^\x20-\x7e]+")


class Answer(NamedTuple):
    """What became of one attempt.

    Attributes:
        status: HTTP status; 0 for none.
        error: Why there is none, or what was answered, in words.
        retry_after_ms: That the receiver asks to wait.
    """

    status: int
    error: str = ""
    retry_after_ms: int = 0

    @property
    def is_good(self) -> bool:
        """Whether the alert has arrived."""
        return 200 <= self.status < 300


def message(alert: Alert, fleet: str, page: str = "") -> bytes:
    """The body that is sent.

    Args:
        alert: What is told.
        fleet: Name of the fleet.
        page: Address of the page, if there is one.
    """
    data: dict[str, object] = {"fleet": fleet, "about": alert.about, "text": alert.text}
    if alert.count:
        data |= {"count": alert.count, "devices": list(alert.devices)}
    data |= {"details": alert.details}
    if page and alert.kind.startswith("rollout."):
        data["url"] = f"{page}/#/rollouts/{alert.about}"
    when = datetime.fromtimestamp(alert.at_ms / 1000, UTC).isoformat(timespec="milliseconds")
    return msgspec.json.encode({"type": alert.kind, "timestamp": when.replace("+00:00", "Z"), "data": data})


def headers(alert: Alert, body: bytes, secrets: list[bytes], now_ms: int) -> dict[str, str]:
    """Headers of a message, its signatures among them: one for each secret.

    Args:
        alert: What is told; its id stays the same in every attempt, so that a receiver notices a repetition.
        body: As it is sent.
        secrets: Keys of HMAC-SHA256.
        now_ms: Of this attempt: a receiver refuses what is old.
    """
    timestamp = str(now_ms // 1000)
    content = b".".join((alert.id.encode(), timestamp.encode(), body))
    signatures = [hmac.new(secret, content, hashlib.sha256).digest() for secret in secrets]
    return {
        "content-type": "application/json",
        "user-agent": "Whimbrel",
        "webhook-id": alert.id,
        "webhook-timestamp": timestamp,
        "webhook-signature": " ".join("v1," + base64.b64encode(each).decode() for each in signatures),
    }


def parse_secrets(text: str, where: str) -> list[bytes]:
    """The secrets in a file, one a line.

    Raises:
        RequestError: There is none, there are too many, or one is not as Standard Webhooks has it; never shows it.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    hint = "`whimbrel webhooks secret FILE` makes one; a second line may hold the one before it"
    if not 1 <= len(lines) <= SECRETS_MAX:
        raise RequestError(f"{where} has {len(lines)} secrets, expected are 1 or {SECRETS_MAX}", hint=hint)
    secrets = []
    for number, line in enumerate(lines, start=1):
        try:
            secret = base64.b64decode(line.removeprefix(SECRET_PREFIX), validate=True)
        except (binascii.Error, ValueError):
            secret = b""
        if not line.startswith(SECRET_PREFIX) or not SECRET_BYTES_MIN <= len(secret) <= SECRET_BYTES_MAX:
            raise RequestError(
                f"{where}: line {number} is not {SECRET_PREFIX} with {SECRET_BYTES_MIN} to {SECRET_BYTES_MAX} bytes in base64",
                hint=hint,
            )
        secrets.append(secret)
    return secrets


def secret_text(secret: bytes) -> str:
    """A secret as receivers are given it."""
    return SECRET_PREFIX + base64.b64encode(secret).decode()


def attempted(delivery: Delivery, answer: Answer, now_ms: int, chance: float) -> Delivery:
    """A delivery after an attempt: arrived, to be tried again, or given up.

    Args:
        delivery: As it was.
        answer: What came of the attempt.
        now_ms: When that was.
        chance: Between 0 and 1: where in its range the next wait lies, so that not all come back at once.
    """
    attempts = delivery.attempts + 1
    error = "" if answer.is_good else _UNPRINTABLE.sub(" ", answer.error)[:_ERROR_CHARS_MAX]
    after = msgspec.structs.replace(
        delivery, attempts=attempts, tried_ms=now_ms, status=answer.status, error=error
    )
    if answer.is_good:
        return msgspec.structs.replace(after, state="delivered")
    if answer.status == GONE:
        return dropped(after, f"{error}: the receiver wants no more")
    longest_ms = min(RETRY_MS * 3 ** min(attempts - 1, 20), RETRY_MS_MAX)
    wait_ms = max(int(longest_ms * (1 + chance) / 2), min(answer.retry_after_ms, RETRY_MS_MAX))
    next_ms = now_ms + wait_ms
    if next_ms > delivery.since_ms + AGE_MS_MAX:
        return dropped(after, f"given up after {attempts} attempts: {error}")
    return msgspec.structs.replace(after, next_ms=next_ms)


def dropped(delivery: Delivery, why: str) -> Delivery:
    """A delivery that is given up, and why."""
    return msgspec.structs.replace(delivery, state="dropped", error=why[:_ERROR_CHARS_MAX])
