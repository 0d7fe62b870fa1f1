"""Settings of a server: the file `whimbrel.toml` in its folder, checked field by field."""

import ipaddress
import json
import re
import tomllib
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta, Struct

from protocol.errors import RequestError
from protocol.ids import FleetId, parse_fleet_id
from server.alerts.settings import WebhookSettings, checked_webhooks
from server.display import address_text
from server.fleet.history import HISTORY_DAYS
from server.fleet.identities import DEVICE_DAYS

CONFIG_FILE: Final = "whimbrel.toml"
DATABASE_FILE: Final = "whimbrel.sqlite"
DEFAULT_FLEET: Final = "fleet"
EMBEDDED: Final = "embedded"
DEFAULT_PORT: Final = 1883
DEFAULT_WEB_PORT: Final = 8080
DEFAULT_GRACE_HOURS: Final = 168
DEFAULT_FOLDER: Final = "whimbrel"
FOLDER_VARIABLE: Final = "WHIMBREL_DIR"

_Port = Annotated[int, Meta(ge=0, le=65_535)]
_Days = Annotated[int, Meta(ge=1, le=3_650)]
_Seconds = Annotated[int, Meta(ge=1, le=604_800)]


class TlsSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The table `[tls]`: how this server proves to the broker who it is. Relative paths count from the server's folder.

    Attributes:
        ca: Certificates of who vouches for the broker, PEM.
        certificate: Of this server, PEM.
        key: Its private key, PEM.
    """

    ca: str
    certificate: str
    key: str


class WebSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The table `[web]`: where the page and the HTTP API are. Relative paths count from the server's folder.

    Attributes:
        host: Address to listen on. Beyond loopback only with a certificate, or behind a proxy that has one (`url`).
        port: 0 lets the system choose.
        certificate: Of this server for browsers, PEM; with `key`.
        key: Its private key, PEM.
        url: Where browsers find the page when a proxy stands before it, for example `https://fleet.example`.
    """

    host: str = "127.0.0.1"
    port: _Port = DEFAULT_WEB_PORT
    certificate: str = ""
    key: str = ""
    url: str = ""


class HistorySettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The table `[history]`: how many days is kept what nobody needs to run the fleet (docs/alerts.md).

    Attributes:
        audit_days: The audit trail: who did what.
        device_days: What became of each device.
        rollout_days: The devices of rollouts that have ended; how many came how far is kept for ever.
        alert_days: Alerts, and what became of them.
    """

    audit_days: _Days = 400
    device_days: _Days = HISTORY_DAYS
    rollout_days: _Days = 365
    alert_days: _Days = 90


class _File(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    fleet: str
    broker: str = EMBEDDED
    port: _Port = DEFAULT_PORT
    database: str = ""
    retained_mib_max: Annotated[int, Meta(ge=0, le=1 << 20)] = 512
    delta_workers: Annotated[int, Meta(ge=1, le=64)] = 1
    delta_timeout_s: _Seconds = 3_600
    delta_grace_hours: Annotated[int, Meta(ge=1, le=87_600)] = DEFAULT_GRACE_HOURS
    certificate_days: _Days = DEVICE_DAYS
    tls: TlsSettings | None = None
    web: WebSettings | None = None
    history_days: _Days | None = None  # from before there was `[history]`
    history: HistorySettings | None = None
    webhook: list[WebhookSettings] = []


class ServerConfig(Struct, frozen=True, kw_only=True):
    """What a server needs to know.

    Attributes:
        folder: Keys, blobs, metadata, and the database unless `database` says otherwise.
        fleet: Name of the fleet.
        broker: `embedded`, or `HOST:PORT` of mosquitto, EMQX and the like.
        port: Where the embedded broker listens on loopback; 0 lets the system choose.
        database: SQLAlchemy URL; empty for the SQLite file in the folder.
        retained_bytes_max: Bytes of chunks that the broker is asked to retain.
        delta_workers: Deltas built at the same time.
        delta_timeout_s: After which a build is given up.
        delta_grace_hours: How long a delta stays that no device and no rollout needs.
        certificate_days: Life of a device's certificate.
        tls: How to speak to the broker with certificates; plainly where there is none.
        web: Where the page is; none without.
        history: How long what is kept.
        webhooks: Where alerts go.
    """

    folder: Path
    fleet: FleetId
    broker: str = EMBEDDED
    port: _Port = DEFAULT_PORT
    database: str = ""
    retained_bytes_max: int = 512 << 20
    delta_workers: int = 1
    delta_timeout_s: int = 3_600
    delta_grace_hours: int = DEFAULT_GRACE_HOURS
    certificate_days: int = DEVICE_DAYS
    tls: TlsSettings | None = None
    web: WebSettings | None = None
    history: HistorySettings = HistorySettings()
    webhooks: tuple[WebhookSettings, ...] = ()

    @property
    def delta_grace_ms(self) -> int:
        """How long a delta stays that nobody needs."""
        return self.delta_grace_hours * 3_600_000

    @property
    def database_url(self) -> str:
        """SQLAlchemy URL of the database."""
        return self.database or f"sqlite:///{(self.folder / DATABASE_FILE).absolute()}"

    @property
    def address(self) -> tuple[str, int] | Literal["embedded"]:
        """Host and port of the broker.

        Raises:
            RequestError: The setting is neither `embedded` nor `HOST:PORT`.
        """
        return parse_broker(self.broker)


def parse_broker(text: str) -> tuple[str, int] | Literal["embedded"]:
    """Check a broker setting.

    Raises:
        RequestError: It is neither `embedded` nor `HOST:PORT`.
    """
    if text == EMBEDDED:
        return "embedded"
    host, _, port = text.rpartition(":")
    is_port = port.isascii() and port.isdigit() and 0 < int(port[:6]) <= 65_535
    if not host or {"@", "/"} & set(host) or not is_port:
        raise RequestError(
            f"broker {address_text(text)!r} is not allowed", hint="use `embedded` or HOST:PORT"
        )
    return host.removeprefix("[").removesuffix("]"), int(port)


def read_config(folder: Path) -> ServerConfig:
    """Read the settings of a folder that `whimbrel init` made.

    Raises:
        RequestError: There are none, or they are malformed; names the field.
    """
    path = folder / CONFIG_FILE
    try:
        file = msgspec.convert(tomllib.loads(path.read_text("utf-8")), _File)
    except FileNotFoundError as error:
        raise RequestError(
            f"{folder} holds no repository", hint=f"run `whimbrel init {folder}` or give --dir"
        ) from error
    except OSError as error:
        raise RequestError(f"{path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, msgspec.ValidationError) as error:
        raise RequestError(f"{path}: {error}", hint="correct the file") from error
    if parse_broker(file.broker) == EMBEDDED and file.tls is not None:
        raise RequestError(
            f"{path}: [tls] with the embedded broker, which speaks plainly and on loopback only",
            hint='set broker = "HOST:PORT"',
        )
    if file.history_days is not None and file.history is not None:
        raise RequestError(
            f"{path}: history_days beside [history]", hint="name device_days in [history] instead"
        )
    return ServerConfig(
        folder=folder,
        fleet=parse_fleet_id(file.fleet),
        broker=file.broker,
        port=file.port,
        database=file.database,
        retained_bytes_max=file.retained_mib_max << 20,
        delta_workers=file.delta_workers,
        delta_timeout_s=file.delta_timeout_s,
        delta_grace_hours=file.delta_grace_hours,
        certificate_days=file.certificate_days,
        tls=file.tls,
        web=None if file.web is None else _checked_web(file.web, path),
        history=file.history or HistorySettings(device_days=file.history_days or HISTORY_DAYS),
        webhooks=checked_webhooks(file.webhook, str(path)),
    )


def config_text(config: ServerConfig) -> str:
    """The settings as a file that a person edits."""
    lines = [
        "# Settings of this Whimbrel server.",
        f"fleet = {_quoted(config.fleet)}  # first level of every topic",
        f'broker = {_quoted(config.broker)}  # "embedded", or "HOST:PORT" of mosquitto, EMQX, ...',
        f"port = {config.port}  # where the embedded broker listens on loopback",
        f"retained_mib_max = {config.retained_bytes_max >> 20}  # chunks that the broker keeps in its memory",
        f"delta_workers = {config.delta_workers}  # deltas built at the same time",
        f"delta_timeout_s = {config.delta_timeout_s}",
        f"delta_grace_hours = {config.delta_grace_hours}  # then deltas go that nobody needs",
        f"certificate_days = {config.certificate_days}  # life of a device's certificate",
    ]
    if config.database:
        lines.append(f"database = {_quoted(config.database)}")
    if config.tls is not None:
        lines += ["", *tls_lines(config.tls)]
    if config.web is not None:
        lines += ["", *web_lines(config.web)]
    lines += ["", *_history_lines(config.history)]
    for webhook in config.webhooks:
        lines += ["", *_webhook_lines(webhook)]
    return "\n".join(lines) + "\n"


def web_lines(web: WebSettings) -> list[str]:
    """The table `[web]` as it stands in the file."""
    lines = ["[web]", f"host = {_quoted(web.host)}", f"port = {web.port}"]
    named = {"certificate": web.certificate, "key": web.key, "url": web.url}
    return lines + [f"{name} = {_quoted(value)}" for name, value in named.items() if value]


def _history_lines(history: HistorySettings) -> list[str]:
    return [
        "[history]  # days",
        f"audit_days = {history.audit_days}  # who did what",
        f"device_days = {history.device_days}  # what became of each device",
        f"rollout_days = {history.rollout_days}  # the devices of rollouts that have ended",
        f"alert_days = {history.alert_days}  # alerts that were told",
    ]


def _webhook_lines(webhook: WebhookSettings) -> list[str]:
    lines = [
        "[[webhook]]",
        f"name = {_quoted(webhook.name)}",
        f"url = {_quoted(webhook.url)}",
        f"secret = {_quoted(webhook.secret)}  # file",
        f"events = [{', '.join(map(_quoted, webhook.events))}]",
        f"per_minute = {webhook.per_minute}",
    ]
    return [*lines, f"ca = {_quoted(webhook.ca)}"] if webhook.ca else lines


def _checked_web(web: WebSettings, path: Path) -> WebSettings:
    if bool(web.certificate) != bool(web.key):
        raise RequestError(f"{path}: [web] needs certificate and key, or neither", hint="correct the file")
    if web.url and not re.fullmatch(r"https?://[A-Za-z0-9.\-\[\]:]+", web.url):
        raise RequestError(
            f"{path}: [web] url = {web.url[:80]!r}", hint="use https://HOST or https://HOST:PORT, no path"
        )
    is_private = web.certificate or web.url.startswith("https://")
    if not is_private and not is_loopback(web.host):
        raise RequestError(
            f"{path}: [web] host = {web.host[:80]!r} without encryption: passwords would cross the network in the clear",
            hint="set certificate and key, or url to the https address of a proxy, or listen on 127.0.0.1",
        )
    return web


def is_loopback(host: str) -> bool:
    """Whether an address to listen on can be reached from this machine only."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def tls_lines(tls: TlsSettings) -> list[str]:
    """The table `[tls]` as it stands in the file."""
    return [
        "[tls]",
        f"ca = {_quoted(tls.ca)}  # vouches for the broker",
        f"certificate = {_quoted(tls.certificate)}",
        f"key = {_quoted(tls.key)}",
    ]


def _quoted(text: str) -> str:
    """TOML's basic strings are JSON's, for the characters that occur here."""
    return json.dumps(text)
