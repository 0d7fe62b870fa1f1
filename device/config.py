"""Settings of a device: what the pure agent must know, and what the driver around it must know beside.

They come from a file and its drop-ins: beside `device.toml` the files `device.d/*.toml`, in the order of their names. A later one wins,
field by field, so that a package brings the file and its owner adds others.
"""

import ipaddress
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeVar
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import msgspec
from msgspec import Meta, Struct

from device.compute import ON_PROCESSOR, Compute, LlamaSettings, OnnxSettings, check_llama, check_onnx
from device.policy import NO_RULES, WINDOWS_MAX, Metered, Policy, Step, parse_window
from protocol.delta_graph import LINK_BYTES_PER_S, LINKS_MAX
from protocol.errors import RequestError, TopicError
from protocol.ids import DeviceId, Family, FleetId, parse_device_id, parse_family, parse_fleet_id
from protocol.messages import Capacity

_Megabytes = Annotated[int, Meta(ge=1, le=1 << 20)]
_Parsed = TypeVar("_Parsed")
_MB = 1 << 20
_KB = 1000

CONFIG_BYTES_MAX: Final = 1 << 16
DROP_INS_MAX: Final = 64
"""A configuration is read as a whole: a file that is none must not fill the memory."""

IDENTITY_FOLDER: Final = "identity"
"""Below the state folder: key and certificate that `enroll` got."""

_PLACEHOLDERS: Final = dict.fromkeys(("device", "fleet", "family", "state_folder"), "placeholder")
"""For what another file may still bring, while one is judged."""

_HINT: Final = "see device/README.md for its fields"


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentConfig:
    """What the agent decides by.

    Attributes:
        device: Identity on the broker and in reports.
        fleet: Fleet that the device belongs to.
        family: The model family that this device runs.
        tier: Hardware tier, as releases name them.
        memory_bytes_max: What a model may take on this device while it runs.
        memory_total_bytes_max: What everything of ours may take together: the version that answers, and beside it the one that is tried,
            or the decoder; `None` for whatever there is.
        delta_memory_bytes_max: What applying a delta may take.
        disk_reserve_bytes: Space that an update must leave free.
        groups_outstanding: Chunk groups subscribed to at a time; two keep a link busy without flooding it.
        link_bytes_per_s: What the link carries, for the choice among deltas; a metered one is described by a low rate.
        bandwidth_bytes_per_s_max: What updates may take of the link, on average; 0 for all of it.
        processor_percent: Speed of one core, with a server's as 100, for the same choice.
        is_in_place: Rewrite the files of the active slot where there is a delta for that, and serve nothing meanwhile: for a disk
            without room for two versions.
        can_decrypt: Whether there is a certificate for which the keys of encrypted releases can be wrapped.
        policy: When an update may go on.
    """

    device: DeviceId
    fleet: FleetId
    family: Family
    tier: str = ""
    memory_bytes_max: int = 1 << 30
    memory_total_bytes_max: int | None = None
    delta_memory_bytes_max: int = 128 << 20
    disk_reserve_bytes: int = 16 << 20
    groups_outstanding: int = 2
    link_bytes_per_s: int = LINK_BYTES_PER_S
    bandwidth_bytes_per_s_max: int = 0
    processor_percent: int = 100
    is_in_place: bool = False
    can_decrypt: bool = False
    policy: Policy = NO_RULES

    @property
    def capacity(self) -> Capacity:
        """What the device can spend on an update."""
        link_bytes_per_s = self.link_bytes_per_s
        if self.bandwidth_bytes_per_s_max:
            link_bytes_per_s = min(link_bytes_per_s, self.bandwidth_bytes_per_s_max)
        return Capacity(
            link_bytes_per_s=link_bytes_per_s,
            processor_percent=self.processor_percent,
            delta_memory_bytes=self.delta_memory_bytes_max,
            links_max=1 if self.is_in_place else LINKS_MAX,
            in_place=self.is_in_place,
        )


class SlotSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The table `[slots]`."""

    in_place: bool = False


class ServingSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The table `[serving]`."""

    listen: str = ""
    requests_max: Annotated[int, Meta(ge=1, le=32)] = 8
    request_s_max: Annotated[int, Meta(ge=1, le=3600)] = 60


class HookSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The table `[hooks]`."""

    after_swap: Annotated[list[str], Meta(max_length=64)] = []
    timeout_s: Annotated[int, Meta(ge=1, le=600)] = 30


class PrioritySettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The table `[priority]`: how far installations and trials give way."""

    nice: Annotated[int, Meta(ge=0, le=19)] = 10
    io: Literal["normal", "low", "idle"] = "low"


class PolicySettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The table `[policy]`."""

    window: Annotated[list[str], Meta(max_length=WINDOWS_MAX)] = []
    window_steps: tuple[Literal["fetch", "install", "trial"], ...] = ("fetch", "install", "trial")
    time_zone: str = ""
    battery_percent_min: Annotated[int, Meta(ge=1, le=100)] | None = None
    temperature_c_max: Annotated[float, Meta(ge=0, le=150)] | None = None
    load_max: Annotated[float, Meta(gt=0, le=1000)] | None = None
    pressure_percent_max: Annotated[float, Meta(gt=0, le=100)] | None = None
    memory_available_mb_min: _Megabytes | None = None
    metered: Literal["always", "small", "never"] = "always"
    metered_mb_max: Annotated[float, Meta(ge=0, le=1 << 20)] = 5.0
    metered_link: bool = False
    metered_file: str = ""


class TlsSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The table `[tls]`."""

    ca: str = ""
    certificate: str = ""
    key: str = ""


class DeviceSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A configuration file, `device.toml`."""

    device: str
    fleet: str
    family: str
    state_folder: str
    broker: str = "127.0.0.1:1883"
    tier: Annotated[str, Meta(max_length=64)] = ""
    memory_mb_max: _Megabytes = 1024
    memory_total_mb_max: _Megabytes | None = None
    delta_memory_mb_max: _Megabytes = 128
    disk_reserve_mb: _Megabytes = 16
    link_kb_per_s: Annotated[int, Meta(ge=1, le=1_000_000_000)] = LINK_BYTES_PER_S // _KB
    bandwidth_kb_per_s_max: Annotated[int, Meta(ge=0, le=1_000_000_000)] = 0
    processor_percent: Annotated[int, Meta(ge=1, le=10_000)] = 100
    clock: Literal["auto", "trusted", "none"] = "auto"
    runtime_folder: str = ""
    tls: TlsSettings | None = None
    slots: SlotSettings = SlotSettings()
    serving: ServingSettings = ServingSettings()
    hooks: HookSettings = HookSettings()
    policy: PolicySettings = PolicySettings()
    priority: PrioritySettings = PrioritySettings()
    onnx: OnnxSettings = OnnxSettings()
    llama: LlamaSettings = LlamaSettings()


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsConfig:
    """How to prove to the broker who this is.

    Attributes:
        ca: Certificates of who vouches for the broker, PEM.
        certificate: Of this device, PEM.
        key: Its private key, PEM; in the same file where that is the one of the certificate.
        is_enrolled: Key and certificate are what `enroll` left in the state folder; the agent renews them.
    """

    ca: Path
    certificate: Path
    key: Path
    is_enrolled: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingConfig:
    """The local endpoint.

    Attributes:
        listen: A Unix socket, or address and port of loopback.
        requests_max: Answered, or waiting for the model, at a time.
        request_s_max: Until a request is given up.
    """

    listen: Path | tuple[str, int]
    requests_max: int
    request_s_max: float

    @property
    def address(self) -> str:
        """Where it listens, as the configuration says it."""
        if isinstance(self.listen, Path):
            return f"unix:{self.listen}"
        host, port = self.listen
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


@dataclass(frozen=True, slots=True, kw_only=True)
class HookConfig:
    """A command of the owner.

    Attributes:
        after_swap: The command and its arguments; empty for none.
        timeout_s: It is killed after that.
    """

    after_swap: tuple[str, ...] = ()
    timeout_s: float = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ConditionSources:
    """Where to look for what the policy asks about, beside what the kernel says.

    Attributes:
        zone: Time zone of the windows; the system's where there is none.
        is_metered: Whether the link is metered, where no file says so.
        metered_file: A file that says `yes` or `no`, as a modem manager writes it.
    """

    zone: ZoneInfo | None = None
    is_metered: bool = False
    metered_file: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceConfig:
    """Everything that a running device needs to know.

    Attributes:
        agent: What the agent decides by.
        folder: Where the device keeps its state.
        broker_host: Name or address of the broker.
        broker_port: Its port.
        runtime_folder: Where the running agent has its control socket; the state folder where there is none.
        tls: How to speak to the broker with certificates; plainly where there is none.
        serving: The local endpoint; `None` for none.
        hooks: Commands of the owner.
        sources: Where to look for what the policy asks about.
        priority: How far installations and trials give way.
        compute: Where models run.
        clock: Whether the machine's clock is to be believed; `auto` for finding out.
    """

    agent: AgentConfig
    folder: Path
    broker_host: str
    broker_port: int
    runtime_folder: Path | None = None
    tls: TlsConfig | None = None
    serving: ServingConfig | None = None
    hooks: HookConfig = HookConfig()
    sources: ConditionSources = ConditionSources()
    priority: PrioritySettings = field(default_factory=PrioritySettings)
    compute: Compute = ON_PROCESSOR
    clock: Literal["auto", "trusted", "none"] = "auto"

    @property
    def control(self) -> Path:
        """The socket on which the running agent takes orders."""
        return (self.runtime_folder or self.folder) / f"{self.agent.device}.sock"


def load_config(path: Path) -> DeviceConfig:
    """Read a configuration file and its drop-ins; relative folders are meant from the file's own folder.

    Raises:
        RequestError: One of the files cannot be read, or a field is missing, unknown or impossible: file and field are named.
    """
    fields: dict[str, Any] = {}
    origins: dict[str, Path] = {}
    for each in (path, *drop_ins(path)):
        read = _read(each)
        origins |= dict.fromkeys(read, each)
        fields = _merged(fields, read)
        _settings(each, _PLACEHOLDERS | fields)  # what is wrong now came with this file
    settings = _settings(path, fields)

    def checked(name: str, parse: Callable[[Any], _Parsed]) -> _Parsed:
        try:
            return parse(getattr(settings, name))
        except (TopicError, RequestError) as error:
            raise RequestError(f"{origins.get(name, path)}: {error}") from error

    agent = AgentConfig(
        device=checked("device", parse_device_id),
        fleet=checked("fleet", parse_fleet_id),
        family=checked("family", parse_family),
        tier=settings.tier,
        memory_bytes_max=settings.memory_mb_max * _MB,
        memory_total_bytes_max=None
        if settings.memory_total_mb_max is None
        else settings.memory_total_mb_max * _MB,
        delta_memory_bytes_max=settings.delta_memory_mb_max * _MB,
        disk_reserve_bytes=settings.disk_reserve_mb * _MB,
        link_bytes_per_s=settings.link_kb_per_s * _KB,
        bandwidth_bytes_per_s_max=settings.bandwidth_kb_per_s_max * _KB,
        processor_percent=settings.processor_percent,
        is_in_place=settings.slots.in_place,
        can_decrypt=settings.tls is not None,
        policy=checked("policy", _policy),
    )
    host, port = checked("broker", parse_address)
    home = path.absolute().parent
    return DeviceConfig(
        agent=agent,
        folder=home / settings.state_folder,
        broker_host=host,
        broker_port=port,
        runtime_folder=home / settings.runtime_folder if settings.runtime_folder else None,
        tls=checked("tls", lambda tls: _tls(tls, home, home / settings.state_folder)),
        serving=_serving(settings.serving, home, origins.get("serving", path)),
        hooks=HookConfig(
            after_swap=tuple(settings.hooks.after_swap), timeout_s=float(settings.hooks.timeout_s)
        ),
        sources=ConditionSources(
            zone=checked("policy", _zone),
            is_metered=settings.policy.metered_link,
            metered_file=home / settings.policy.metered_file if settings.policy.metered_file else None,
        ),
        priority=settings.priority,
        compute=Compute(onnx=checked("onnx", check_onnx), llama=checked("llama", check_llama)),
        clock=settings.clock,
    )


def enrolled(folder: Path) -> TlsConfig:
    """Where `enroll` keeps the identity of a device.

    Args:
        folder: Its state folder.
    """
    home = folder / IDENTITY_FOLDER
    pair = home / "identity.pem"
    return TlsConfig(ca=home / "ca.pem", certificate=pair, key=pair, is_enrolled=True)


def _tls(settings: TlsSettings | None, home: Path, folder: Path) -> TlsConfig | None:
    if settings is None:
        return None
    if bool(settings.certificate) != bool(settings.key):
        raise RequestError(
            "[tls] has only one of certificate and key", hint="give both, or none for those of `enroll`"
        )
    own = enrolled(folder)
    ca = home / settings.ca if settings.ca else own.ca
    if not settings.certificate:
        return replace(own, ca=ca)
    return TlsConfig(
        ca=ca, certificate=home / settings.certificate, key=home / settings.key, is_enrolled=False
    )


def _serving(settings: ServingSettings, home: Path, origin: Path) -> ServingConfig | None:
    if not settings.listen:
        return None
    try:
        listen = parse_listen(settings.listen, home)
    except RequestError as error:
        raise RequestError(f"{origin}: {error.message}", hint=error.hint) from error
    return ServingConfig(
        listen=listen, requests_max=settings.requests_max, request_s_max=float(settings.request_s_max)
    )


def _policy(settings: PolicySettings) -> Policy:
    if settings.metered != "always" and not settings.metered_link and not settings.metered_file:
        raise RequestError(
            f"policy.metered is {settings.metered!r}, and nothing says when the link is metered",
            hint="set metered_link = true, or metered_file to a file that says yes or no",
        )
    least_mb = settings.memory_available_mb_min
    return Policy(
        windows=tuple(parse_window(text) for text in settings.window),
        window_steps=frozenset(Step(name) for name in settings.window_steps),
        battery_percent_min=settings.battery_percent_min,
        temperature_c_max=settings.temperature_c_max,
        load_max=settings.load_max,
        pressure_percent_max=settings.pressure_percent_max,
        memory_bytes_min=None if least_mb is None else least_mb * _MB,
        metered=Metered(settings.metered),
        metered_bytes_max=int(settings.metered_mb_max * _KB * _KB),
    )


def _zone(settings: PolicySettings) -> ZoneInfo | None:
    if not settings.time_zone:
        return None
    try:
        return ZoneInfo(settings.time_zone)
    except (ZoneInfoNotFoundError, ValueError, OSError) as error:
        raise RequestError(
            f"policy.time_zone {settings.time_zone!r} is not known here",
            hint="a name such as Europe/Berlin is expected; the package tzdata brings them",
        ) from error


def drop_ins(path: Path) -> list[Path]:
    """The drop-ins of a configuration file, in the order in which they count; hidden files are none.

    Raises:
        RequestError: The folder cannot be read, or holds too many.
    """
    folder = path.with_suffix(".d")
    try:
        found = sorted(each for each in folder.iterdir() if each.suffix == ".toml" and each.name[0] != ".")
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise RequestError(f"{folder}: {error.strerror}") from error
    if len(found) > DROP_INS_MAX:
        raise RequestError(f"{folder} has {len(found)} files, allowed are {DROP_INS_MAX}", hint="join some")
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            data = file.read(CONFIG_BYTES_MAX + 1)
        if len(data) > CONFIG_BYTES_MAX:
            raise RequestError(f"{path} is longer than {CONFIG_BYTES_MAX} bytes", hint=_HINT)
        return tomllib.loads(data.decode())
    except OSError as error:
        raise RequestError(f"{path}: {error.strerror}", hint=_HINT) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RequestError(f"{path}: {error}", hint=_HINT) from error


def _merged(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Fields of `after` in place of those of `before`; tables field by field."""
    merged = dict(before)
    for name, value in after.items():
        old = merged.get(name)
        merged[name] = _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _settings(path: Path, fields: dict[str, Any]) -> DeviceSettings:
    try:
        return msgspec.convert(fields, DeviceSettings)
    except msgspec.ValidationError as error:
        raise RequestError(f"{path}: {error}", hint=_HINT) from error


def parse_listen(text: str, home: Path) -> Path | tuple[str, int]:
    """Read where the local endpoint listens: `unix:PATH`, a relative one from `home`, or `host:port` of loopback.

    Raises:
        RequestError: It is not of these forms, or another machine could reach it.
    """
    if text.startswith("unix:"):
        if text == "unix:":
            raise RequestError("[serving] listen = 'unix:' names no path")
        return home / text.removeprefix("unix:")
    host, _, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isascii() or not port.isdigit() or int(port) >= 1 << 16:
        raise RequestError(
            f"[serving] listen = {text!r} is not of the form host:port or unix:PATH",
            hint='for example "127.0.0.1:8091"',
        )
    if not is_loopback(host):
        raise RequestError(
            f"[serving] listen = {text!r} is not an address of loopback, and the endpoint asks nobody who they are",
            hint="use 127.0.0.1, and a reverse proxy with authentication for other machines",
        )
    return ("127.0.0.1" if host == "localhost" else host), int(port)


def is_loopback(host: str) -> bool:
    """Whether a name or an address stays on this machine."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def parse_address(text: str) -> tuple[str, int]:
    """Split `host:port`.

    Raises:
        RequestError: It is not of that form.
    """
    host, _, port = text.rpartition(":")
    is_port = port.isascii() and port.isdigit() and 0 < int(port[:6]) < 1 << 16
    if not host or {"@", "/"} & set(host) or not is_port:
        shown = text.rpartition("@")[2]  # before it may stand a password
        raise RequestError(f"broker {shown!r} is not of the form host:port")
    return host, int(port)
