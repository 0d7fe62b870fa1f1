"""The doctor, on devices that are really broken: permissions, full and read-only file systems, damaged records, wrong clocks."""

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cryptography import x509
from msgspec.structs import replace

from device.adapters.clock import SystemClock
from device.adapters.control import ask_agent
from device.adapters.disk import RealDisk
from device.adapters.doctor import (
    EARLIEST_MS,
    Level,
    examine,
    look_at_certificates,
    look_at_clock,
    memory_bytes,
)
from device.adapters.identity import install
from device.cli import main
from device.config import load_config
from device.journal import Journal
from protocol.errors import RequestError
from protocol.identity import make_key
from protocol.ids import DeviceId, FleetId
from server.adapters.authority import Authority
from server.operations import add_release, export_release, init_repository, publish_release
from tests.models import write_classifier, write_health_plan
from tests.server.brokers import embedded_broker, free_port, stop, wait_until

WAIT_S = 30.0
NOBODY = 65534
DAY_MS = 24 * 3600 * 1000
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts and other users need root")


@pytest.fixture(scope="module")
def factory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("factory")
    init_repository(folder / "server", "lab", port=0)
    health = write_health_plan(folder / "health.json")
    model = write_classifier(folder / "v1.onnx", 1)
    add_release(folder / "server", "digits", "v1", [model], runtime="onnx", health=health)
    publish_release(folder / "server", "digits", "v1")
    export_release(folder / "server", "digits", "v1", folder / "factory")
    return folder / "factory"


@pytest.fixture
def device(tmp_path: Path, factory: Path) -> Path:
    write_config(tmp_path, broker=f"127.0.0.1:{free_port()}")
    provision(tmp_path, factory)
    return tmp_path


def write_config(folder: Path, **fields: object) -> None:
    fields = {"device": "pi-1", "fleet": "lab", "family": "digits", "state_folder": "state", **fields}
    text = "".join(f"{name} = {toml(value)}\n" for name, value in fields.items())
    (folder / "device.toml").write_text(text)


def toml(value: object) -> str:
    if isinstance(value, dict):
        return f"{{{', '.join(f'{name} = {toml(inner)}' for name, inner in value.items())}}}"
    return json.dumps(value)


def provision(folder: Path, factory: Path) -> None:
    assert main(["provision", "--config", str(folder / "device.toml"), "--from", str(factory)]) == 0


def found(folder: Path) -> dict[str, tuple[Level, str, str]]:
    findings = examine(folder / "device.toml")
    return {finding.name: (finding.level, finding.text, finding.advice) for finding in findings}


def test_a_healthy_device_has_no_failure_and_nothing_is_left_behind(device: Path) -> None:
    with embedded_broker() as broker:
        write_config(device, broker=f"127.0.0.1:{broker.port}", memory_mb_max=64)
        before = sorted(device.rglob("*"))
        findings = found(device)
        assert {name for name, (level, _, _) in findings.items() if level is Level.FAILED} == set()
        assert findings["certificates"][:2] == (
            Level.NOTE,
            "not configured: the broker is on this machine",
        )
        assert findings["broker"][1].endswith("lets pi-1 in")
        assert findings["record"][1] == "slot a with v1 is active, 0 starts"
        assert sorted(device.rglob("*")) == before


def test_the_command_ends_with_1_where_something_failed(
    device: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", "--config", str(device / "device.toml")]) == 1
    out = capsys.readouterr().out
    assert "FAILED   broker" in out
    assert "-> check `broker` in the configuration" in out
    assert main(["doctor", "--config", str(device / "device.toml"), "--json"]) == 1
    shown = json.loads(capsys.readouterr().out)
    assert {"name", "level", "text", "advice"} == set(shown[0])


def test_a_wrong_configuration_is_the_first_thing_that_is_said(device: Path) -> None:
    (device / "device.d").mkdir()
    (device / "device.d" / "bad.toml").write_text("memory_mb_max = -1\n")
    level, text, _ = found(device)["configuration"]
    assert level is Level.FAILED
    assert "device.d/bad.toml" in text


def test_a_device_that_was_never_provisioned_is_told_to_be(tmp_path: Path) -> None:
    write_config(tmp_path)
    findings = found(tmp_path)
    for name in ("state folder", "disk", "record", "trust"):
        assert findings[name][0] is Level.FAILED, findings[name]
        assert "whimbrel-device provision" in findings[name][2], findings[name]
    assert not (tmp_path / "state").exists()


def test_a_damaged_record_and_a_damaged_start_of_trust_are_found(device: Path) -> None:
    for path in (device / "state").glob("record.*"):
        path.write_bytes(b"damage" * 100)
    (device / "state" / "root.json").write_bytes(b"{}")
    findings = found(device)
    assert findings["record"][:2] == (Level.FAILED, "both copies of the durable record are damaged")
    assert findings["trust"][0] is Level.FAILED


def test_more_memory_than_there_is_is_refused(device: Path) -> None:
    total, _ = memory_bytes()
    write_config(device, memory_mb_max=(total >> 20) + 1)
    assert found(device)["memory"][0] is Level.FAILED


def test_a_runtime_that_the_active_version_needs_and_is_not_there_is_named(
    device: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = RealDisk(device / "state")
    journal = Journal(disk)
    record = journal.load()
    assert record is not None
    assert record.active is not None
    slot = replace(record.active_slot, runtime="llama")
    journal.save(replace(record, slots={**record.slots, record.active: slot}))
    monkeypatch.setattr(sys, "path", [path for path in sys.path if "site-packages" not in path])
    level, _, advice = found(device)["runtimes"]
    assert level is Level.FAILED
    assert "whimbrel[llama]" in advice


def test_a_runtime_that_does_not_load_is_found(
    device: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "onnxruntime.py").write_text(
        "raise ImportError('libgomp.so.1: cannot open shared object file')\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(broken))
    level, text, _ = found(device)["runtimes"]
    assert level is Level.FAILED
    assert "libgomp.so.1" in text


@pytest.mark.parametrize(
    ("year_ms", "level"),
    [(0, Level.FAILED), (EARLIEST_MS - 1, Level.FAILED), (EARLIEST_MS + 86_400_000 * 200, Level.OK)],
)
def test_a_clock_of_1970_is_wrong(year_ms: int, level: Level) -> None:
    finding = look_at_clock(year_ms, None)
    assert (finding.level is Level.FAILED) is (level is Level.FAILED)


def test_a_clock_before_what_was_recorded_is_wrong(device: Path) -> None:
    assert main(["pause", "--config", str(device / "device.toml")]) == 0
    record = Journal(RealDisk(device / "state")).load()
    assert record is not None
    assert record.paused_ms is not None
    day_ms = 86_400_000
    assert look_at_clock(record.paused_ms - 10 * day_ms, record).level is Level.FAILED
    assert look_at_clock(record.paused_ms - day_ms // 2, record).level is not Level.FAILED


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[None]:
    folder.mkdir(exist_ok=True)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=False, capture_output=True
    )
    if done.returncode:
        pytest.skip("mounting is not permitted here")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


@needs_root
def test_a_full_disk_is_found(tmp_path: Path, factory: Path) -> None:
    with mounted(tmp_path / "state", "size=4m"):
        write_config(tmp_path, disk_reserve_mb=1)
        provision(tmp_path, factory)
        assert found(tmp_path)["disk"][0] is Level.OK
        write_config(tmp_path, disk_reserve_mb=8)
        level, text, advice = found(tmp_path)["disk"]
        assert (level, "updates leave 8 MB free" in text, "make room" in advice) == (Level.FAILED, True, True)
        with contextlib.suppress(OSError), (tmp_path / "state" / "filler").open("wb", buffering=0) as filler:
            while filler.write(random.randbytes(4096)):
                pass
        level, _, advice = found(tmp_path)["disk"]
        assert (level, advice) == (Level.FAILED, "make room")
        assert not (tmp_path / "state" / "doctor.tmp~").exists()


@needs_root
def test_no_room_for_a_second_version_is_a_warning(tmp_path: Path, factory: Path) -> None:
    with mounted(tmp_path / "state", "size=4m"):
        write_config(tmp_path, disk_reserve_mb=1)
        provision(tmp_path, factory)
        record = Journal(RealDisk(tmp_path / "state")).load()
        assert record is not None
        (tmp_path / "state" / "slots" / "a" / "more.onnx").write_bytes(bytes(3 << 19))
        level, text, advice = found(tmp_path)["disk"]
        assert level is Level.WARNING
        assert "no room for a second version" in text
        assert "in_place" in advice


@needs_root
def test_a_read_only_disk_is_found(tmp_path: Path, factory: Path) -> None:
    with mounted(tmp_path / "state", "size=4m"):
        write_config(tmp_path)
        provision(tmp_path, factory)
        subprocess.run(["mount", "-o", "remount,ro", tmp_path / "state"], check=True)
        level, text, _ = found(tmp_path)["disk"]
        assert level is Level.FAILED
        assert "mounted read-only" in text


@needs_root
def test_files_of_another_user_are_found(device: Path) -> None:
    record = device / "state" / "record.1"
    os.chown(record, NOBODY, NOBODY)
    level, text, advice = found(device)["state folder"]
    assert level is Level.FAILED
    assert str(record) in text
    assert advice == f"chown -R root: {device / 'state'}"


def test_a_folder_that_others_may_write_to_is_a_warning(device: Path) -> None:
    (device / "state").chmod(0o777)
    assert found(device)["state folder"][0] is Level.WARNING


@pytest.fixture
def as_nobody() -> list[str]:
    """The start of a command that also another user may run: an interpreter below /root is nobody's but root's."""
    packages = os.pathsep.join([str(Path(__file__).parents[2]), sysconfig.get_path("purelib")])
    for python in (sys.executable, "/usr/bin/python3"):
        command = ["env", f"PYTHONPATH={packages}", "PYTHONDONTWRITEBYTECODE=1", python]
        program = f"import sys, device.cli, device.adapters.doctor; assert sys.version_info[:2] == {sys.version_info[:2]}"
        with contextlib.suppress(OSError):
            ran = subprocess.run(
                [*command, "-c", program],
                user=NOBODY,
                extra_groups=[],
                check=False,
                cwd="/",
                capture_output=True,
            )
            if ran.returncode == 0:
                return [*command, "-m", "device.cli"]
    pytest.skip("no interpreter that another user may read")


@needs_root
def test_somebody_who_may_not_look_is_told_to_use_sudo(device: Path, as_nobody: list[str]) -> None:
    (device / "state").chmod(0o700)
    for parent in (device, *device.parents[:-2]):
        parent.chmod(parent.stat().st_mode | 0o055)
    result = subprocess.run(
        [*as_nobody, "doctor", "--config", device / "device.toml", "--json"],
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
        user=NOBODY,
        extra_groups=[],
    )
    assert result.returncode == 1, result.stderr
    findings = {finding["name"]: finding for finding in json.loads(result.stdout)}
    assert findings["state folder"]["level"] == "failed"
    assert findings["state folder"]["advice"] == "use sudo"
    assert findings["disk"]["level"] == "failed"


@needs_root
def test_what_root_does_belongs_to_the_owner_of_the_state_folder(
    tmp_path: Path, factory: Path, as_nobody: list[str]
) -> None:
    """Root provisions and pauses, and the agent of another user can still write its record."""
    shutil.copytree(factory, tmp_path / "factory")
    (tmp_path / "factory").chmod(0o700)  # as in a home folder, where the owner of the state cannot look
    write_config(tmp_path, broker=f"127.0.0.1:{free_port()}")
    state = tmp_path / "state"
    state.mkdir(mode=0o750)
    os.chown(state, NOBODY, NOBODY)
    for parent in (tmp_path, *tmp_path.parents[:-2]):
        parent.chmod(parent.stat().st_mode | 0o055)
    for words in (["provision", "--from", "factory"], ["pause"], ["resume"]):
        subprocess.run([*as_nobody, *words, "--config", "device.toml"], cwd=tmp_path, check=True)
    assert {path.lstat().st_uid for path in state.rglob("*")} == {NOBODY}
    agent = subprocess.Popen(
        [*as_nobody, "run", "--config", "device.toml"], cwd=tmp_path, stdout=subprocess.DEVNULL
    )
    try:
        assert wait_until(load_config(tmp_path / "device.toml").control.exists, WAIT_S)
        assert f"Uid:\t{NOBODY}\t" in Path(f"/proc/{agent.pid}/status").read_text()
        subprocess.run([*as_nobody, "pause", "--config", "device.toml"], cwd=tmp_path, check=True)
    finally:
        stop(agent)
    assert {path.lstat().st_uid for path in state.rglob("*")} == {NOBODY}


def test_a_running_agent_is_asked_and_not_thrown_off_the_broker(device: Path) -> None:
    with embedded_broker() as broker:
        write_config(device, broker=f"127.0.0.1:{broker.port}")
        agent = subprocess.Popen(
            [sys.executable, "-m", "device.cli", "run", "--config", "device.toml"],
            cwd=device,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert wait_until(is_serving(device), WAIT_S)
            findings = found(device)
            assert {findings[name][0] for name in ("agent", "broker")} == {Level.OK}
            assert findings["agent"][1] == f"runs as process {agent.pid}, idle, digits v1 answers"
            (device / "state" / "pi-1.sock").unlink()
            findings = found(device)
            assert findings["agent"][0] is Level.FAILED
            assert findings["broker"][0] is Level.NOTE
        finally:
            agent.terminate()
            out, _ = agent.communicate(timeout=WAIT_S)
    assert out.count(": connected to") == 1


@pytest.mark.parametrize("kind", ["port", "socket"])
def test_the_endpoint_for_applications_is_tried(
    device: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    listen = f"127.0.0.1:{free_port()}" if kind == "port" else f"unix:{device}/model.sock"
    with embedded_broker() as broker:
        write_config(device, broker=f"127.0.0.1:{broker.port}", serving={"listen": listen})
        level, text, _ = found(device)["endpoint"]
        assert (level, "the agent does not run" in text) == (Level.NOTE, True)
        agent = subprocess.Popen(
            [sys.executable, "-m", "device.cli", "run", "--config", "device.toml"], cwd=device
        )
        try:
            assert wait_until(is_serving(device), WAIT_S)
            assert found(device)["endpoint"][:2] == (Level.OK, f"{listen} answers applications")
            capsys.readouterr()
            assert main(["status", "--config", str(device / "device.toml")]) == 0
            assert f"endpoint  {listen}\n" in capsys.readouterr().out
            other = f"127.0.0.1:{free_port()}"
            write_config(device, broker=f"127.0.0.1:{broker.port}", serving={"listen": other})
            level, text, _ = found(device)["endpoint"]
            assert (level, text.startswith(f"{other}: ")) == (Level.FAILED, True)
        finally:
            stop(agent)


def is_serving(device: Path) -> Callable[[], bool]:
    def asked() -> bool:
        with contextlib.suppress(RequestError):
            status = ask_agent(device / "state" / "pi-1.sock", "status").status
            return status is not None and status.is_connected and bool(status.serving)
        return False

    return asked


@pytest.fixture
def enrolled_device(device: Path, tmp_path: Path) -> tuple[Path, Authority]:
    """A device with a certificate of a server's."""
    (device / "device.toml").write_text((device / "device.toml").read_text() + "[tls]\n")
    authority = Authority(tmp_path / "ca")
    authority.create(FleetId("lab"), now_ms())
    (device / "state/identity").mkdir()
    (device / "state/identity/ca.pem").write_bytes(authority.pem())
    give_certificate(device, authority)
    return device, authority


def now_ms() -> int:
    return SystemClock().now_ms()


def give_certificate(device: Path, authority: Authority, *, name: str = "pi-1", days_ago: int = 0) -> None:
    key = make_key()
    issued = authority.issue_device(DeviceId(name), key.public_key(), now_ms() - days_ago * DAY_MS, 90)
    install(RealDisk(device / "state"), key, x509.load_der_x509_certificate(issued.certificate))


def certificates(device: Path) -> tuple[Level, str, str]:
    return found(device)["certificates"]


def test_a_good_certificate_is_found_good(enrolled_device: tuple[Path, Authority]) -> None:
    level, text, _ = certificates(enrolled_device[0])
    assert (level, text[:11]) == (Level.OK, "pi-1 until ")


def test_a_plain_connection_to_another_machine_is_worth_a_warning(device: Path) -> None:
    write_config(device, broker="192.0.2.1:1883")
    assert look_at_certificates(load_config(device / "device.toml"), now_ms()).level is Level.WARNING


@pytest.mark.parametrize(
    ("days_ago", "level", "text"),
    [
        (91, Level.FAILED, "the certificate expired on "),
        (-2, Level.WARNING, "the clock is wrong"),
        (80, Level.WARNING, "and not renewed"),
        (70, Level.OK, "pi-1 until"),
    ],
)
def test_the_dates_of_a_certificate_are_judged(
    enrolled_device: tuple[Path, Authority], days_ago: int, level: Level, text: str
) -> None:
    give_certificate(*enrolled_device, days_ago=days_ago)
    shown = certificates(enrolled_device[0])
    assert shown[0] is level
    assert text in shown[1]


def test_a_certificate_for_another_name_or_of_another_authority_is_found(
    enrolled_device: tuple[Path, Authority], tmp_path: Path
) -> None:
    device, authority = enrolled_device
    give_certificate(device, authority, name="pi-2")
    assert certificates(device)[:2] == (Level.FAILED, "the certificate is for 'pi-2', and this is pi-1")
    foreign = Authority(tmp_path / "foreign")
    foreign.create(FleetId("lab"), now_ms())
    give_certificate(device, foreign)
    level, text, _ = certificates(device)
    assert level is Level.FAILED
    assert "does not vouch for" in text


def test_a_key_that_others_can_read_is_found(enrolled_device: tuple[Path, Authority]) -> None:
    device, _ = enrolled_device
    (device / "state/identity/identity.pem").chmod(0o640)
    level, text, advice = certificates(device)
    assert level is Level.FAILED
    assert "can be read by others" in text
    assert "chmod 600" in advice


def test_a_missing_or_damaged_certificate_is_found(enrolled_device: tuple[Path, Authority]) -> None:
    device, _ = enrolled_device
    identity = device / "state/identity/identity.pem"
    pem = identity.read_bytes()
    identity.write_bytes(pem[:200])
    assert "is damaged" in certificates(device)[1]
    identity.unlink()
    level, text, advice = certificates(device)
    assert (level, advice) == (Level.FAILED, "whimbrel-device enroll")
    assert "identity.pem is missing" in text
    assert found(device)["broker"][0] is Level.FAILED
    identity.write_bytes(pem)
    (device / "state/identity/ca.pem").write_bytes(b"nonsense")
    assert "holds no certificate" in certificates(device)[1]
