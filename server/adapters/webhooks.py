"""Sends an alert to a receiver over HTTP, once. The only importer of `urllib3`.

Redirects are not followed and no proxy of the environment is asked: an alert goes where the settings say, or nowhere. Of an answer
the status and one short piece of text are read, and all of it together may take so long and no longer.
"""

import re
import secrets
import socket
import ssl
import threading
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from typing import Final

from urllib3 import HTTPResponse
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import HTTPError

from protocol.errors import RequestError
from server.alerts.delivery import SECRET_BYTES_MIN, Answer, parse_secrets, secret_text
from server.alerts.settings import WebhookSettings, check_url

WAIT_S: Final = 10
"""For a connection, and between two pieces of an answer."""

TOTAL_S: Final = 15
"""From the first look-up of the name to the last byte: a receiver that dribbles its answer is cut off."""

ANSWER_BYTES_MAX: Final = 512
"""Of the body of an answer that says no: enough for its reason."""

SECRET_FILE_BYTES_MAX: Final = 4_096
_RETRY_AFTER_S_MAX: Final = 86_400
_OBJECT: Final = re.compile(r"^HTTPS?Connection\(host=.*?, port=\d+\): ")
_TOO_SLOW: Final = f"no whole answer within {TOTAL_S} s"


def read_secrets(folder: Path, webhook: WebhookSettings) -> list[bytes]:
    """The secrets of a webhook.

    Raises:
        RequestError: The file cannot be read, or holds none; never shows them.
    """
    path = folder / webhook.secret
    try:
        with path.open("rb") as file:
            text = file.read(SECRET_FILE_BYTES_MAX).decode("ascii")
    except OSError as error:
        raise RequestError(
            f"{path}: {error.strerror}", hint=f"`whimbrel webhooks secret {webhook.secret}` makes it"
        ) from error
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} is no text", hint="`whimbrel webhooks secret FILE` makes one") from error
    return parse_secrets(text, str(path))


def new_secret() -> str:
    """A secret for a webhook, as receivers are given it."""
    return secret_text(secrets.token_bytes(SECRET_BYTES_MIN + 8))


def post(folder: Path, webhook: WebhookSettings, headers: dict[str, str], body: bytes) -> Answer:
    """Send a message.

    Args:
        folder: That relative paths of the settings count from.
        webhook: Where to.
        headers: All that stand in the message.
        body: Its body.

    Returns:
        What was answered, or why nothing was; no receiver makes this raise.
    """
    try:
        connection = _connection(folder, webhook)
    except (RequestError, OSError) as error:  # an error of ssl is one of the system
        return Answer(0, f"[[webhook]] ca: {error}")
    opened: list[socket.socket] = []
    is_cut = threading.Event()
    cut = threading.Timer(TOTAL_S, _cut, [opened, is_cut])
    cut.daemon = True
    cut.start()
    try:
        connection.connect()
        opened.append(connection.sock)  # the connection forgets it where the receiver closes
        if is_cut.is_set():
            return Answer(0, _TOO_SLOW)
        connection.request(
            "POST", _target(webhook), body, headers, preload_content=False, decode_content=False
        )
        answer = _answer(connection.getresponse())
        return Answer(0, _TOO_SLOW) if is_cut.is_set() else answer
    except (HTTPError, HTTPException, OSError, ValueError) as error:
        return Answer(0, _TOO_SLOW if is_cut.is_set() else _reason(error))
    finally:
        cut.cancel()
        connection.close()


def _target(webhook: WebhookSettings) -> str:
    parts = check_url(webhook.url)
    return (parts.path or "/") + (f"?{parts.query}" if parts.query else "")


def _connection(folder: Path, webhook: WebhookSettings) -> HTTPConnection:
    parts = check_url(webhook.url)
    host = parts.hostname or ""
    if parts.scheme == "http":
        return HTTPConnection(host, parts.port or 80, timeout=WAIT_S)
    context = ssl.create_default_context(cafile=str(folder / webhook.ca) if webhook.ca else None)
    return HTTPSConnection(host, parts.port or 443, timeout=WAIT_S, ssl_context=context)


def _answer(response: HTTPResponse) -> Answer:
    """What a receiver says; where it says yes, nothing more is read."""
    status = response.status
    if 200 <= status < 300:
        response.close()
        return Answer(status)
    text = f"answered {status}"
    if 300 <= status < 400:
        text += ", a redirect: it is not followed"
    with suppress(HTTPError, OSError):
        said = response.read(ANSWER_BYTES_MAX).decode("utf-8", "replace").strip()
        text += f": {said}" if said else ""
    response.close()
    after = response.headers.get("retry-after", "")
    seconds = int(after[:9]) if after.isascii() and after.isdigit() else 0
    return Answer(status, text, min(seconds, _RETRY_AFTER_S_MAX) * 1000)


def _cut(opened: list[socket.socket], is_cut: threading.Event) -> None:
    """End whatever is waited for, from another thread."""
    is_cut.set()
    for each in opened:
        with suppress(OSError):
            socket.socket.shutdown(each, socket.SHUT_RDWR)


def _reason(error: Exception) -> str:
    """What went wrong, without the objects that libraries print."""
    return _OBJECT.sub("", str(error)) or type(error).__name__
