"""What a broker needs, as files: listeners with certificates, who may use which topic, and limits. Pure: names in, texts out.

The rules follow SPEC section 10.4. A client is called on the broker by the name in its certificate, whatever it calls itself.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Literal

from protocol.constants import FLEET_TOPIC_PREFIX
from protocol.ids import NAME_PATTERN, FleetId
from protocol.messages import BUNDLE_BYTES_MAX
from protocol.topics import CLAIM_PREFIX, REQUEST_SHARDS

BrokerKind = Literal["mosquitto", "emqx"]

PORT: Final = 8883
CLAIMS_PORT: Final = 8884
CLAIM_CONNECTIONS_MAX: Final = 64
"""Devices that enrol at a time; a claim that is abused keeps others from enrolling, and nothing else."""

SERVER_CONNECTIONS_MAX: Final = 64
PACKET_BYTES_MAX: Final = BUNDLE_BYTES_MAX + 4096
"""The longest message, a bundle of metadata, with its topic and header."""

KEEPALIVE_S_MAX: Final = 3600
QUEUED_MESSAGES_MIN: Final = 1000
"""The broker's own default."""

QUEUED_BYTES_MAX: Final = 64 << 20
"""Of one client that does not read: a server that just connected is sent the last report of every device."""

CONF_FILE: Final = "mosquitto.conf"
ACL_FILE: Final = "acl"
CLAIMS_ACL_FILE: Final = "acl-claims"
CA_FILE: Final = "ca.pem"
CLAIMS_CA_FILE: Final = "ca-claims.pem"
CERTIFICATE_FILE: Final = "broker.pem"
KEY_FILE: Final = "broker.key"
REVOKED_FILE: Final = "revoked.pem"
EMQX_CONF_FILE: Final = "emqx.conf"
EMQX_ACL_FILE: Final = "acl.conf"

_EVERYWHERE: Final = "0.0.0.0"  # noqa: S104 - a broker serves a network

_DEVICE_READS: Final = (
    "md/#",
    "b/#",
    "dev/{me}/desired",
    "dev/{me}/chunk",
    "dev/{me}/metadata",
    "dev/{me}/keys",
    "dev/{me}/certificate",
)
_DEVICE_WRITES: Final = (
    "dev/{me}/report",
    "dev/{me}/link",
    "dev/{me}/renewal",
    # One by one: with a wildcard, a device could fill the broker's memory with what it retains on topics without end.
    *(f"req/{shard}/{{me}}" for shard in range(REQUEST_SHARDS)),
)
_CLAIM_READS: Final = ("enroll/{me}/answer",)
_CLAIM_WRITES: Final = ("enroll/{me}/request",)


@dataclass(frozen=True, slots=True, kw_only=True)
class BrokerLayout:
    """What the operator chose for a broker.

    Attributes:
        fleet: The fleet.
        folder: Where the files are going to lie on the machine of the broker.
        bind: Address to listen on; empty for all.
        port: For devices and servers.
        claims_port: For claims.
        devices_max: Devices that may be connected at a time.
    """

    fleet: FleetId
    folder: str
    bind: str = ""
    port: int = PORT
    claims_port: int = CLAIMS_PORT
    devices_max: int = 10_000


def rule_files(
    kind: BrokerKind, fleet: FleetId, servers: Iterable[str], barred: Iterable[str]
) -> dict[str, str]:
    """Who may use which topic; these files change with revocations and are read again when the broker reloads.

    Args:
        kind: Of broker.
        fleet: The fleet.
        servers: Names of servers, which may use every topic of the fleet.
        barred: Names that may use none.
    """
    if kind == "emqx":
        return {EMQX_ACL_FILE: _emqx_rules(fleet, servers, barred)}
    return {
        ACL_FILE: _mosquitto_rules(fleet, servers, barred),
        CLAIMS_ACL_FILE: _mosquitto_claim_rules(fleet),
    }


def layout_files(kind: BrokerKind, layout: BrokerLayout) -> dict[str, str]:
    """Listeners and limits."""
    if kind == "emqx":
        return {EMQX_CONF_FILE: _emqx_conf(layout)}
    return {CONF_FILE: _mosquitto_conf(layout)}


def _topics(fleet: FleetId, patterns: Iterable[str], me: str) -> list[str]:
    return [f"{FLEET_TOPIC_PREFIX}.{fleet}/{pattern.format(me=me)}" for pattern in patterns]


def _mosquitto_conf(layout: BrokerLayout) -> str:
    queued = max(QUEUED_MESSAGES_MIN, 2 * layout.devices_max)
    lines = [
        f"# Broker of the fleet {layout.fleet}, written by `whimbrel broker config`. Use it alone: mosquitto -c {layout.folder}/{CONF_FILE}",
        f"# or with `include_dir`, then without other listeners. {ACL_FILE} and {REVOKED_FILE} are read again on SIGHUP.",
        "per_listener_settings true",
        "",
        "# A longer packet ends its connection.",
        f"max_packet_size {PACKET_BYTES_MAX}",
        f"max_keepalive {KEEPALIVE_S_MAX}",
        "# A server that connects is sent a report of every device; whoever does not read is cut off at that.",
        f"max_queued_messages {queued}",
        f"max_queued_bytes {QUEUED_BYTES_MAX}",
        "# Nobody needs a session of the past, see SPEC 5.4.",
        "persistent_client_expiration 1d",
        "# What a device retained goes unread once the device may not write it any more.",
        "check_retain_source true",
        "set_tcp_nodelay true",
        "",
        "# Devices and servers.",
        *_mosquitto_listener(
            layout, layout.port, CA_FILE, ACL_FILE, layout.devices_max + SERVER_CONNECTIONS_MAX
        ),
        f"crlfile {layout.folder}/{REVOKED_FILE}",
        "",
        "# Claims for a first certificate. Nothing but enrolment goes on here.",
        *_mosquitto_listener(
            layout, layout.claims_port, CLAIMS_CA_FILE, CLAIMS_ACL_FILE, CLAIM_CONNECTIONS_MAX
        ),
    ]
    return "\n".join(lines) + "\n"


def _mosquitto_listener(
    layout: BrokerLayout, port: int, ca: str, acl: str, connections_max: int
) -> list[str]:
    folder = layout.folder
    return [
        f"listener {port} {layout.bind}".rstrip(),
        f"cafile {folder}/{ca}",
        f"certfile {folder}/{CERTIFICATE_FILE}",
        f"keyfile {folder}/{KEY_FILE}",
        "tls_version tlsv1.3",
        "require_certificate true",
        "use_identity_as_username true",
        "use_username_as_clientid true",
        "allow_anonymous false",
        f"acl_file {folder}/{acl}",
        f"max_connections {connections_max}",
    ]


def _mosquitto_rules(fleet: FleetId, servers: Iterable[str], barred: Iterable[str]) -> str:
    lines = [
        f"# Who may use which topic in the fleet {fleet}; %u is the name in the certificate. `whimbrel broker config` and",
        "# `whimbrel devices revoke` write this file. mosquitto warns of the first two lines, since they are for everybody: that is meant.",
        *(f"pattern read {topic}" for topic in _topics(fleet, _DEVICE_READS, "%u")),
        *(f"pattern write {topic}" for topic in _topics(fleet, _DEVICE_WRITES, "%u")),
    ]
    for server in servers:
        lines += ["", f"user {server}", f"topic readwrite {FLEET_TOPIC_PREFIX}.{fleet}/#"]
    for name in barred:
        lines += ["", f"user {name}", "topic deny #"]
    return "\n".join(lines) + "\n"


def _mosquitto_claim_rules(fleet: FleetId) -> str:
    lines = [
        *(f"pattern read {topic}" for topic in _topics(fleet, _CLAIM_READS, "%u")),
        *(f"pattern write {topic}" for topic in _topics(fleet, _CLAIM_WRITES, "%u")),
    ]
    return "\n".join(lines) + "\n"


def _emqx_conf(layout: BrokerLayout) -> str:
    def listener(name: str, port: int, ca: str, connections_max: int) -> str:
        return f"""listeners.ssl.{name} {{
  bind = "{layout.bind or _EVERYWHERE}:{port}"
  max_connections = {connections_max}
  ssl_options {{
    cacertfile = "{layout.folder}/{ca}"
    certfile = "{layout.folder}/{CERTIFICATE_FILE}"
    keyfile = "{layout.folder}/{KEY_FILE}"
    versions = ["tlsv1.3"]
    verify = verify_peer
    fail_if_no_peer_cert = true
  }}
}}
"""

    return f"""# Broker of the fleet {layout.fleet}, written by `whimbrel broker config --for emqx`. Not tried with a running EMQX.
# EMQX fetches lists of revoked certificates from where certificates point to, and ours point nowhere: what is revoked may
# connect, and {EMQX_ACL_FILE} lets it do nothing.
listeners.tcp.default.enable = false
listeners.ws.default.enable = false
listeners.wss.default.enable = false
listeners.ssl.default.enable = false

{listener("devices", layout.port, CA_FILE, layout.devices_max + SERVER_CONNECTIONS_MAX)}
{listener("claims", layout.claims_port, CLAIMS_CA_FILE, CLAIM_CONNECTIONS_MAX)}
mqtt {{
  peer_cert_as_username = cn
  peer_cert_as_clientid = cn
  max_packet_size = {-(-PACKET_BYTES_MAX // 1024)}KB
  max_mqueue_len = {max(QUEUED_MESSAGES_MIN, 2 * layout.devices_max)}
  session_expiry_interval = "0s"
  shared_subscription = false
}}
authorization {{
  no_match = deny
  deny_action = ignore
  cache.enable = false
  sources = [{{ type = file, enable = true, path = "{layout.folder}/{EMQX_ACL_FILE}" }}]
}}
"""


def _emqx_rules(fleet: FleetId, servers: Iterable[str], barred: Iterable[str]) -> str:
    me = "${username}"
    device = f'{{username, {{re, "^{NAME_PATTERN}$"}}}}'
    claim = f'{{username, {{re, "^{CLAIM_PREFIX.replace(".", "[.]")}[0-9a-f]+$"}}}}'

    def allow(who: str, action: str, patterns: Iterable[str]) -> str:
        topics = ", ".join(f'"{topic}"' for topic in _topics(fleet, patterns, me))
        return f"{{allow, {who}, {action}, [{topics}]}}."

    lines = [
        f"%% Who may use which topic in the fleet {fleet}, written by `whimbrel broker config --for emqx` and `whimbrel devices revoke`.",
        "%% Not tried with a running EMQX.",
        *(f'{{deny, {{username, "{name}"}}, all, ["#"]}}.' for name in barred),
        *(
            f'{{allow, {{username, "{server}"}}, all, ["{FLEET_TOPIC_PREFIX}.{fleet}/#"]}}.'
            for server in servers
        ),
        allow(device, "subscribe", _DEVICE_READS),
        allow(device, "publish", _DEVICE_WRITES),
        allow(claim, "subscribe", _CLAIM_READS),
        allow(claim, "publish", _CLAIM_WRITES),
        "{deny, all}.",
    ]
    return "\n".join(lines) + "\n"
