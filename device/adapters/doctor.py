"""`whimbrel-device doctor`: looks at everything that an agent needs, and says what to do about what it lacks.

Nothing is changed but a scratch file in the state folder, which is removed again; so it may be used beside a running agent, whose
connection is asked about instead of opening a second one under the same name.
"""

import contextlib
import ctypes
import json
import os
import pwd
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from enum import Enum
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Final, NamedTuple, get_args

import msgspec
from cryptography import x509
from msgspec import Struct

from device.adapters.clock import SystemClock, system_rng
from device.adapters.confinement import Confinement
from device.adapters.control import AgentNotRunningError, Status, ask_agent
from device.adapters.disk import RealDisk
from device.adapters.engines import LocalEngine
from device.adapters.identity import Credentials, Identity, is_issued_by, read_credentials
from device.adapters.mqtt import BrokerAddress, MqttLoop, MqttTransport
from device.adapters.runtime_check import CheckOrder, CheckResult
from device.compute import ON_PROCESSOR, Compute
from device.config import DeviceConfig, ServingConfig, is_loopback, load_config
from device.executor import ROOT_FILE
from device.journal import Journal, Record
from device.slots import slot_bytes
from protocol.constants import METADATA_BYTES_MAX
from protocol.delta.native import library
from protocol.errors import StorageError, WhimbrelError
from protocol.identity import fingerprint
from protocol.release import RuntimeName
from protocol.trust import check_root

SERVICE_USER: Final = "whimbrel"
SERVICE_FOLDER: Final = Path("/var/lib/whimbrel")
"""As the Debian package sets them up."""

EARLIEST_MS: Final = int(datetime(2026, 1, 1, tzinfo=UTC).timestamp() * 1000)
"""Before this software was written: a board without a battery for its clock wakes up in 1970."""

CLOCK_BACK_MS_MAX: Final = 24 * 3600 * 1000
"""How far before the newest instant of the durable record the clock may be: wrong time zones, no more."""

SYNC_S_MAX: Final = 2.0
"""One megabyte should be on the medium by then; a card that takes longer is worn out or counterfeit."""

OVERDUE_PART: Final = 6
"""In the last sixth of its life a certificate should have been renewed for long: that begins after two thirds."""

CONNECT_S_MAX: Final = 15.0
IMPORT_S_MAX: Final = 120.0
"""A runtime that is read from a cold, slow card."""

_SCRATCH: Final = "doctor.tmp~"
_SCRATCH_BYTES: Final = 1 << 20
RUNTIMES: Final[tuple[RuntimeName, ...]] = get_args(RuntimeName)
_GPU_ADVICE: Final = (
    "install the runtime that knows the accelerator, its driver and its libraries: docs/device.md"
)
_TIME_ERROR: Final = 5  # adjtimex(2): the clock is not synchronized
_TIMEX_BYTES: Final = 256  # more than `struct timex` has anywhere
_MB: Final = 1 << 20


class Level(Enum):
    """How bad it is. The values are what `--json` says."""

    OK = "ok"
    NOTE = "note"  # nothing to be done
    WARNING = "warning"  # works, and not as it could
    FAILED = "failed"  # keeps the device from working or from being updated


class Finding(Struct, frozen=True):
    """What one look found.

    Attributes:
        name: What was looked at.
        level: How bad it is.
        text: What was found, one line.
        advice: What to do, one line, empty where nothing is to be done.
    """

    name: str
    level: Level
    text: str
    advice: str = ""


class _Patient(NamedTuple):
    """What the looks share."""

    config: DeviceConfig
    disk: RealDisk
    record: Record | None
    agent: Status | None
    is_running: bool  # whether an agent has the folder, though it may not answer


def examine(path: Path, clock: SystemClock | None = None) -> list[Finding]:
    """Look at a device.

    Args:
        path: Its configuration.
        clock: The machine's.
    """
    now_ms = (clock or SystemClock()).now_ms()
    try:
        config = load_config(path)
    except WhimbrelError as error:
        return [
            Finding("configuration", Level.FAILED, error.message, error.hint),
            look_at_clock(now_ms, None),
        ]
    findings = [Finding("configuration", Level.OK, f"{path} and its drop-ins are well formed")]
    disk = RealDisk(config.folder)
    is_running = _is_running(disk)
    agent, asked = _ask(config, is_running=is_running)
    record, remembered = look_at_record(disk)
    patient = _Patient(config, disk, record, agent, is_running)
    findings += [
        look_at_folder(config.folder),
        look_at_disk(patient),
        remembered,
        look_at_trust(disk, now_ms),
    ]
    findings += [
        look_at_memory(patient),
        look_at_clock(now_ms, record),
        look_at_runtimes(record, config.compute),
        _look_at_library(),
        look_at_confinement(),
    ]
    findings += [asked, look_at_broker(patient)]
    if config.serving is not None:
        findings.append(look_at_endpoint(config.serving, is_running=is_running))
    findings.append(look_at_certificates(config, now_ms))
    return findings


def finding_lines(findings: list[Finding]) -> Iterator[str]:
    """Findings for people."""
    for finding in findings:
        word = finding.level.value if finding.level in {Level.OK, Level.NOTE} else finding.level.value.upper()
        yield f"{word:<8} {finding.name:<14} {finding.text}"
        if finding.advice:
            yield f"{'':<8} {'':<14} -> {finding.advice}"


def _is_running(disk: RealDisk) -> bool:
    """Whether an agent holds the lock of the state folder."""
    if not disk.folder.is_dir():
        return False
    try:
        with disk.locked():
            return False
    except StorageError:
        return True


def _ask(config: DeviceConfig, *, is_running: bool) -> tuple[Status | None, Finding]:
    try:
        agent = ask_agent(config.control, "status").status
    except AgentNotRunningError:
        if is_running:
            text, advice = (
                f"it runs, and nobody answers at {config.control}",
                "restart it, and look at its log",
            )
            return None, Finding("agent", Level.FAILED, text, advice)
        text = "it does not run"
        return None, Finding("agent", Level.WARNING, text, "sudo systemctl start whimbrel-device")
    except WhimbrelError as error:
        return None, Finding("agent", Level.FAILED, error.message, error.hint)
    assert agent is not None
    paused = ", updates are paused" if agent.paused_ms is not None else ""
    advice = "whimbrel-device resume" if paused else ""
    if agent.held is not None and not paused:
        paused = f", updates wait: {agent.held.text} ({agent.held.code})"
    text = f"runs as process {agent.pid}, {agent.state}{paused}"
    if not agent.serving:
        return agent, Finding(
            "agent",
            Level.FAILED,
            f"{text}, no model answers",
            "look at its log: journalctl -u whimbrel-device",
        )
    return agent, Finding("agent", Level.OK, f"{text}, {config.agent.family} {agent.serving} answers", advice)


def look_at_folder(folder: Path) -> Finding:
    """The state folder belongs to one user, with everything in it, and nobody else may write to it."""
    name = "state folder"
    try:
        status = folder.stat()
        os.scandir(folder).close()  # which a walk passes over in silence where it may not look
        strangers = [path for path in folder.rglob("*") if path.lstat().st_uid != status.st_uid]
    except FileNotFoundError:
        return Finding(name, Level.FAILED, f"{folder} is not there", "whimbrel-device provision makes it")
    except OSError as error:
        return Finding(name, Level.FAILED, f"{error.filename}: {error.strerror}", "use sudo")
    owner = _user(status.st_uid)
    if folder == SERVICE_FOLDER and owner != SERVICE_USER:
        advice = f"chown -R {SERVICE_USER}: {folder}"
        return Finding(name, Level.FAILED, f"{folder} belongs to {owner}, not to {SERVICE_USER}", advice)
    if strangers:
        text = f"{strangers[0]} belongs to {_user(strangers[0].lstat().st_uid)}, and {folder} to {owner}"
        return Finding(name, Level.FAILED, text, f"chown -R {owner}: {folder}")
    if status.st_mode & 0o022:
        text = f"{folder} can be written to by others than {owner}"
        return Finding(name, Level.WARNING, text, f"chmod go-w {folder}")
    return Finding(name, Level.OK, f"{folder} belongs to {owner}")


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def look_at_disk(patient: _Patient) -> Finding:
    """The state folder can be written and synced, gives back what was written, and has room for an update."""
    config, disk = patient.config, patient.disk
    try:
        if os.statvfs(config.folder).f_flag & os.ST_RDONLY:
            advice = "look for the reason with dmesg, then mount it for writing again"
            return Finding("disk", Level.FAILED, f"{config.folder} is mounted read-only", advice)
        spent_s = _write_scratch(disk)
        free, reserve = disk.free_bytes(), config.agent.disk_reserve_bytes
        active = record_bytes(disk, patient.record)
        inactive = slots_bytes(disk) - active
    except OSError as error:
        return Finding("disk", Level.FAILED, f"{config.folder}: {error.strerror}", _advice_for(error))
    except StorageError as error:
        return Finding("disk", Level.FAILED, error.message, error.hint)
    text = (
        f"{free / _MB:.0f} MB free, {_SCRATCH_BYTES // _MB} MB written and synced in {spent_s * 1000:.0f} ms"
    )
    if free < reserve:
        text += f"; updates leave {reserve / _MB:.0f} MB free and are refused"
        return Finding("disk", Level.FAILED, text, "make room, or lower disk_reserve_mb")
    if not config.agent.is_in_place and free + inactive < active + reserve:
        text += f"; no room for a second version of {active / _MB:.0f} MB"
        return Finding("disk", Level.WARNING, text, "make room, or set in_place = true in [slots]")
    if spent_s > SYNC_S_MAX:
        return Finding(
            "disk", Level.WARNING, f"{text}, which is slow", "the card may be worn out: replace it"
        )
    return Finding("disk", Level.OK, text)


def _advice_for(error: OSError) -> str:
    if isinstance(error, PermissionError):
        return "use sudo"
    if isinstance(error, FileNotFoundError):
        return "whimbrel-device provision makes it"
    return "look for errors of the medium with dmesg; make room if it is full"


def _write_scratch(disk: RealDisk) -> float:
    """Seconds until a megabyte was on the medium; what is read back is what was written.

    Raises:
        StorageError: It cannot be written, synced or read back.
    """
    data = os.urandom(_SCRATCH_BYTES)
    path = disk.folder / _SCRATCH
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    try:
        began = time.monotonic()
        disk.create(_SCRATCH, len(data))
        disk.write(_SCRATCH, 0, data)
        disk.sync(_SCRATCH)
        spent_s = time.monotonic() - began
        disk.forget_cached(_SCRATCH)
        if disk.read(_SCRATCH, 0, len(data)) != data:
            raise StorageError(
                f"{disk.folder} gives back other bytes than were written", hint="replace the medium"
            )
    finally:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
    return spent_s


def record_bytes(disk: RealDisk, record: Record | None) -> int:
    """Space that the active version takes."""
    return slot_bytes(disk, record.active) if record is not None and record.active is not None else 0


def slots_bytes(disk: RealDisk) -> int:
    """Space that both versions take."""
    return sum(disk.length(name) or 0 for name in disk.names("slots"))


def look_at_record(disk: RealDisk) -> tuple[Record | None, Finding]:
    """The durable record can be read."""
    name = "record"
    try:
        record = Journal(disk).load()
    except WhimbrelError as error:
        return None, Finding(name, Level.FAILED, error.message, error.hint)
    if record is None:
        return None, Finding(name, Level.FAILED, "no device lives here yet", "whimbrel-device provision")
    active = record.active_slot
    if record.active is None:
        return record, Finding(name, Level.WARNING, "no version is installed", "roll one out on the server")
    text = f"slot {record.active.value} with {active.version} is active, {record.boots} starts"
    return record, Finding(name, Level.OK, text)


def look_at_trust(disk: RealDisk, now_ms: int) -> Finding:
    """The start of trust is there and not expired."""
    name = "trust"
    try:
        if disk.length(ROOT_FILE) is None:
            return Finding(name, Level.FAILED, f"{ROOT_FILE} is missing", "whimbrel-device provision")
        root = disk.read(ROOT_FILE, 0, METADATA_BYTES_MAX["root"] + 1)
        version = check_root(root)
        expires = datetime.fromisoformat(json.loads(root)["signed"]["expires"])
    except WhimbrelError as error:
        return Finding(name, Level.FAILED, error.message, error.hint or "provision the device anew")
    text = f"root document {version}, valid until {expires:%Y-%m-%d}"
    if now_ms > expires.timestamp() * 1000:
        advice = "publish a newer root on the server; the installed version goes on answering"
        return Finding(name, Level.WARNING, f"{text}, which is over", advice)
    return Finding(name, Level.OK, text)


def look_at_memory(patient: _Patient) -> Finding:
    """What a model may take is there."""
    total, available = memory_bytes()
    wanted = patient.config.agent.memory_bytes_max
    text = f"{total // _MB} MB, {available // _MB} MB available, a model may take {wanted // _MB} MB"
    if wanted > total:
        advice = f"set memory_mb_max to less than {total // _MB}"
        return Finding("memory", Level.FAILED, f"{text}: more than there is", advice)
    if wanted > available:
        advice = "a trial may run out of memory: stop other programs, or lower memory_mb_max"
        return Finding("memory", Level.WARNING, text, advice)
    return Finding("memory", Level.OK, text)


def memory_bytes() -> tuple[int, int]:
    """Memory of the machine, and how much of it is available, see proc_meminfo(5)."""
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    total, available = (int(fields[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    return total, available


def look_at_clock(now_ms: int, record: Record | None) -> Finding:
    """The clock is not in the past, and somebody sets it."""
    shown = datetime.fromtimestamp(now_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    advice = "set it: sudo timedatectl set-ntp true, and let the device reach a time server"
    if now_ms < EARLIEST_MS:
        return Finding("clock", Level.FAILED, f"{shown} is before this software was made", advice)
    newest_ms = _newest_ms(record)
    if now_ms < newest_ms - CLOCK_BACK_MS_MAX:
        newest = datetime.fromtimestamp(newest_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        return Finding("clock", Level.FAILED, f"{shown}, and something was recorded at {newest}", advice)
    if not _is_synchronized():
        return Finding("clock", Level.WARNING, f"{shown}, and nothing keeps it right", advice)
    return Finding("clock", Level.OK, shown)


def _newest_ms(record: Record | None) -> int:
    """The newest instant that the record names."""
    if record is None:
        return 0
    instants = [record.paused_ms or 0, *(past.finished_ms for past in record.history)]
    if record.update is not None:
        instants += [record.update.started_ms, record.update.finished_ms or 0]
    return max(instants)


def _is_synchronized() -> bool:
    """Whether the kernel believes that somebody keeps its clock right; true where it cannot be asked."""
    try:
        adjtimex = ctypes.CDLL(None).adjtimex
    except (OSError, AttributeError):
        return True
    return bool(adjtimex(ctypes.create_string_buffer(_TIMEX_BYTES)) != _TIME_ERROR)


def _in_child(module: str, given: bytes = b"") -> "subprocess.CompletedProcess[bytes]":
    """Run a module in a process of its own, which may crash or give up its rights."""
    return subprocess.run(
        [sys.executable, "-m", module],
        input=given,
        capture_output=True,
        check=False,
        timeout=IMPORT_S_MAX,
        cwd=Path(__file__).resolve().parents[2],  # the child runs the code that this process runs
    )


def look_at_confinement() -> Finding:
    """What the kernel takes from a trial, in a process of its own: rights do not come back."""
    name = "confinement"
    try:
        result = _in_child("device.adapters.confinement")
        result.check_returncode()
        granted = msgspec.json.decode(result.stdout, type=Confinement)
    except (subprocess.SubprocessError, msgspec.MsgspecError) as error:
        return Finding(name, Level.WARNING, f"trials cannot be confined: {error}", "look at the kernel's log")
    if granted.is_complete:
        return Finding(name, Level.OK, f"trials of new models have {granted}")
    advice = (
        "a kernel with CONFIG_SECCOMP_FILTER and CONFIG_SECURITY_LANDLOCK (Linux 5.13) in its `lsm=` list"
    )
    return Finding(name, Level.WARNING, f"trials of new models: {granted}", advice)


def look_at_runtimes(record: Record | None, compute: Compute = ON_PROCESSOR) -> Finding:
    """The installed runtimes can be loaded, that of the active version is among them, and models run where they should."""
    name, found = "runtimes", LocalEngine().versions()
    wanted = record.active_slot.runtime if record is not None and record.active is not None else None
    extra = wanted or "onnx"
    advice = f"pip install 'whimbrel[{extra}]' into the environment of whimbrel-device"
    if not found:
        return Finding(name, Level.FAILED, "none is installed", advice)
    text = ", ".join(f"{runtime} {version}" for runtime, version in found.items())
    if wanted is not None and wanted not in found:
        return Finding(name, Level.FAILED, f"{text}; the active version needs {wanted}", advice)
    for runtime in RUNTIMES:
        if runtime not in found or wanted not in {None, runtime}:
            continue
        result = _check_runtime(runtime, compute)
        if not result.places:
            where = "" if compute == ON_PROCESSOR else f", or change [{runtime}] in the configuration"
            text = f"{runtime} cannot be used: {result.trouble}"
            return Finding(name, Level.FAILED, text, f"install it anew: {advice}{where}")
        if result.trouble:
            text += f"; {runtime} runs on {', '.join(result.places)} only: {result.trouble}"
            return Finding(name, Level.WARNING, text, _GPU_ADVICE)
        if compute != ON_PROCESSOR:
            text += f"; {runtime} runs on {', '.join(result.places)}"
    return Finding(name, Level.OK, text)


def _check_runtime(runtime: RuntimeName, compute: Compute) -> CheckResult:
    """Where a runtime runs; asked in a process of its own, which may crash."""
    order = msgspec.json.encode(CheckOrder(runtime=runtime, compute=compute))
    try:
        result = _in_child("device.adapters.runtime_check", order)
    except subprocess.TimeoutExpired:
        return CheckResult(places=(), trouble=f"no end after {IMPORT_S_MAX:.0f} s")
    if result.returncode < 0:
        return CheckResult(places=(), trouble=f"ended by signal {-result.returncode}")
    if result.returncode:
        lines = result.stderr.decode(errors="replace").strip().splitlines()
        return CheckResult(places=(), trouble=(lines or ["no reason given"])[-1])
    try:
        return msgspec.json.decode(result.stdout, type=CheckResult)
    except msgspec.MsgspecError:
        return CheckResult(places=(), trouble="it printed what is no result")


def _look_at_library() -> Finding:
    if library() is None:
        text = "the compiled library is missing or does not run here: deltas are decoded slowly"
        return Finding("delta library", Level.WARNING, text, "install the wheel for this processor")
    return Finding("delta library", Level.OK, "loaded")


def look_at_broker(patient: _Patient) -> Finding:
    """The broker lets this device in; a running agent is asked, since a second connection would end its own."""
    config, agent = patient.config, patient.agent
    where = f"{config.broker_host}:{config.broker_port}"
    if agent is None and patient.is_running:
        return Finding("broker", Level.NOTE, f"{where}: not tried, it would end the connection of the agent")
    if agent is not None:
        trouble = "" if agent.is_connected else agent.trouble or "no connection yet"
    else:
        trouble = _connect_trouble(config)
    if trouble:
        advice = "check `broker` in the configuration, the network, the broker's port and its access rules"
        return Finding("broker", Level.FAILED, f"{where}: {trouble.removeprefix(f'{where}: ')}", advice)
    return Finding("broker", Level.OK, f"{where} lets {config.agent.device} in")


def look_at_endpoint(serving: ServingConfig, *, is_running: bool) -> Finding:
    """Applications are answered where the configuration says."""
    name, where = "endpoint", serving.address
    if not is_running:
        return Finding(name, Level.NOTE, f"{where}: not tried, the agent does not run")
    try:
        status = _endpoint_status(serving.listen)
    except (OSError, HTTPException) as error:
        advice = "restart the agent, and look at its log; it may be a change of the configuration since"
        return Finding(name, Level.FAILED, f"{where}: {error}", advice)
    if status == HTTPStatus.OK:
        return Finding(name, Level.OK, f"{where} answers applications")
    return Finding(name, Level.WARNING, f"{where} says {status}: no model answers", "see above for the agent")


def _endpoint_status(listen: Path | tuple[str, int]) -> int:
    """What the endpoint's `/health` answers."""
    host, port = ("localhost", None) if isinstance(listen, Path) else listen
    connection = HTTPConnection(host, port, timeout=CONNECT_S_MAX)
    if isinstance(listen, Path):
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.settimeout(CONNECT_S_MAX)
        connection.sock.connect(str(listen))
    with contextlib.closing(connection):
        connection.request("GET", "/health")
        return connection.getresponse().status


def _connect_trouble(config: DeviceConfig) -> str:
    """Why there is no connection, empty where there is one."""
    tls = None
    if config.tls is not None:
        tls = Identity(config.agent.device, config.tls, RealDisk(config.folder), SystemClock()).tls
    with contextlib.closing(MqttLoop()) as loop:
        transport = MqttTransport(
            loop,
            BrokerAddress(config.broker_host, config.broker_port, tls),
            config.agent.device,
            system_rng(),
            will=None,
            on_connected=lambda: None,
            on_disconnected=lambda: None,
            on_message=lambda _topic, _payload: None,
        )
        transport.start()
        loop.run_until(lambda: transport.is_connected or bool(transport.error), CONNECT_S_MAX)
        if transport.is_connected:
            return ""
        return transport.error or f"no answer after {CONNECT_S_MAX:.0f} s"


def look_at_certificates(config: DeviceConfig, now_ms: int) -> Finding:
    """Key and certificate are there, belong together, are for this device, valid, and nobody else's to read."""
    name, where = "certificates", f"{config.broker_host}:{config.broker_port}"
    if config.tls is None:
        if is_loopback(config.broker_host):
            return Finding(name, Level.NOTE, "not configured: the broker is on this machine")
        text = f"not configured: whoever is on the way to {where} can read and forge everything"
        return Finding(name, Level.WARNING, text, "whimbrel-device enroll, see docs/device.md")
    try:
        mode = config.tls.key.stat().st_mode
        credentials = read_credentials(config.tls)
        authorities = x509.load_pem_x509_certificates(config.tls.ca.read_bytes())
    except FileNotFoundError as error:
        advice = "whimbrel-device enroll" if config.tls.is_enrolled else "see [tls] in the configuration"
        return Finding(name, Level.FAILED, f"{error.filename} is missing", advice)
    except OSError as error:
        return Finding(name, Level.FAILED, f"{error.filename}: {error.strerror}", "use sudo")
    except ValueError:
        return Finding(name, Level.FAILED, f"{config.tls.ca} holds no certificate", "enroll the device anew")
    except WhimbrelError as error:
        return Finding(name, Level.FAILED, error.message, error.hint)
    if mode & 0o077:
        text = f"{config.tls.key} can be read by others than its owner"
        return Finding(
            name, Level.FAILED, text, f"chmod 600 {config.tls.key}, and have the certificate revoked"
        )
    if not any(is_issued_by(credentials.certificate, authority) for authority in authorities):
        text = f"{config.tls.ca} does not vouch for {config.tls.certificate}"
        return Finding(name, Level.FAILED, text, "enroll the device anew")
    return _judged(config, credentials, now_ms)


def _judged(config: DeviceConfig, credentials: Credentials, now_ms: int) -> Finding:
    """Name and dates of a certificate that belongs to its key and to its authority."""
    name, device, life = "certificates", config.agent.device, credentials.life
    anew = f"whimbrel devices claim {device} on the server, whimbrel-device enroll here"
    if credentials.name != device:
        text = f"the certificate is for {credentials.name!r}, and this is {device}"
        return Finding(name, Level.FAILED, text, anew)
    start, end = (datetime.fromtimestamp(at_ms / 1000, UTC) for at_ms in (life.start_ms, life.end_ms))
    if now_ms >= life.end_ms:
        return Finding(name, Level.FAILED, f"the certificate expired on {end:%Y-%m-%d}", anew)
    if now_ms < life.start_ms:
        text = f"the certificate is valid from {start:%Y-%m-%d} on: the clock is wrong"
        return Finding(name, Level.WARNING, text, "see the clock")
    text = f"{device} until {end:%Y-%m-%d}, key {fingerprint(credentials.key.public_key())}"
    if now_ms > life.end_ms - (life.end_ms - life.start_ms) // OVERDUE_PART:
        advice = "let the agent reach the server, and look at both logs"
        if not config.tls or not config.tls.is_enrolled:
            advice = "renew it: the agent renews only what `enroll` got"
        return Finding(name, Level.WARNING, f"{text}, and not renewed", advice)
    return Finding(name, Level.OK, text)
