"""A runtime that a model has taken over, in a real trial: what it cannot do, and what it must go on doing (ADR 26)."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from device.adapters import confinement
from device.adapters.doctor import Level, look_at_confinement
from device.adapters.engines import LocalEngine
from device.ports import ModelSource, TrialOrder
from tests.device.test_trial_process import program
from tests.models import health_plan, write_classifier

HOSTILE = Path(__file__).parent / "hostile"
ROOT = Path(__file__).parents[2]


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


@pytest.fixture
def attacked(
    tmp_path: Path, listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> Iterator[TrialOrder]:
    """A device with a model, a secret beside its folder, an open port and the agent's socket, and a hostile runtime."""
    slot = tmp_path / "slot"
    slot.mkdir()
    model = write_classifier(slot / "model.onnx", seed=1)
    key = tmp_path / "device.key"
    key.write_bytes(b"secret")
    control = tmp_path / "agent.sock"
    values = {
        "PYTHONPATH": str(HOSTILE),
        "ATTACK_PORT": str(listener.getsockname()[1]),
        "ATTACK_SOCKET": str(control),
        "ATTACK_KEY": str(key),
        "ATTACK_MODEL": str(model),
    }
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(control))
        server.listen()
        yield TrialOrder(ModelSource("onnx", str(model)), health_plan(), 1 << 30)


ATTACKS = {
    "_connect": "Operation not permitted",
    "_ask_agent": "Operation not permitted",
    "_read_key": "Permission denied",
    "_write_model": "Permission denied",
    "_leave_file": "Permission denied",
    "_kill_agent": "Operation not permitted",
    "_look_into_agent": "Permission denied",
    "_trace_agent": "ptrace",
    "_limit_agent": "Operation not permitted",
    "_fork": "Operation not permitted",
    "_start_program": "Operation not permitted",
    "_start_shell": "Operation not permitted",
    "_ring": "io_uring",
    "_new_rights": "unshare",
    "_fill_disk": "File too large",
    "_many_files": "Too many open files",
    "_privileges": "CapEff:\t0000000000000000".replace("\t", " "),
    "_oom_score": "score 1000",
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_row_58_a_runtime_that_was_taken_over_cannot(
    attacked: TrialOrder, attack: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATTACK", attack)
    model = Path(attacked.model.path)
    before = model.read_bytes()
    detail = LocalEngine().trial(attacked).detail
    assert "refused: " in detail
    assert ATTACKS[attack] in detail
    assert model.read_bytes() == before
    assert [path.name for path in model.parent.iterdir()] == [model.name]


def test_row_58_an_abort_is_a_crash_and_nothing_else(
    attacked: TrialOrder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATTACK", "_abort")
    assert LocalEngine().trial(attacked).detail.startswith(f"killed by signal {signal.SIGABRT.value}")


def test_a_confined_runtime_goes_on_with_what_runtimes_do(
    attacked: TrialOrder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATTACK", "_ordinary_work")
    assert LocalEngine().trial(attacked).detail.endswith("onnxruntime cannot load the file: done")


def test_the_agent_says_how_a_trial_was_confined(
    attacked: TrialOrder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("ATTACK", "_ordinary_work")
    caplog.set_level("INFO", "device.adapters.trial")
    LocalEngine().trial(attacked)
    assert "no network and no programs (seccomp), files read-only (Landlock" in caplog.text


def _in_child(tmp_path: Path, lines: str) -> str:
    """Run lines of Python in a process of their own, and return what they print."""
    script = tmp_path / "script.py"
    script.write_text(f"import os, socket, sys\nfrom device.adapters import confinement\n{lines}\n")
    found = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        check=False,
        env=dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1"),
        timeout=60,
    )
    assert found.stderr == ""
    return found.stdout.strip()


_REACH = """
def attempt(work):
    try:
        work()
        return "open"
    except OSError as error:
        return "refused"
"""


def test_without_seccomp_the_network_is_a_namespace_of_its_own(
    tmp_path: Path, listener: socket.socket
) -> None:
    port = listener.getsockname()[1]
    said = _in_child(
        tmp_path,
        f"""{_REACH}
confinement._can_filter = lambda libc: False
confinement._restrict_files = lambda *_, **__: 0  # it refuses TCP as well
print(confinement.confine([]).network, attempt(lambda: socket.create_connection(("127.0.0.1", {port}), 5)))""",
    )
    assert said in {"namespace refused", "open open"}, "whatever the kernel grants is what is said"
    if os.geteuid() == 0:
        assert said == "namespace refused"


def test_without_landlock_files_are_said_to_be_open(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("x")
    said = _in_child(
        tmp_path,
        f"""{_REACH}
confinement._restrict_files = lambda *_, **__: 0
found = confinement.confine([])
print(found.files, found.is_complete, attempt(open({str(secret)!r}).close), found)""",
    )
    assert said == (
        "0 False open no network and no programs (seccomp), files are open: this kernel has no Landlock"
    )


def test_an_accelerator_keeps_its_nodes_and_unix_sockets_and_no_network(tmp_path: Path) -> None:
    said = _in_child(
        tmp_path,
        f"""{_REACH}
confinement._ACCELERATOR_DEVICES = ("ptmx",)  # any node that is no accelerator, and not among those of every process
for is_used in (True, False):
    if os.fork() == 0:
        confinement.confine([], accelerators=is_used)
        outcome = [attempt(lambda: os.open("/dev/ptmx", os.O_RDWR)), attempt(lambda: socket.socket(socket.AF_UNIX)),
                   attempt(lambda: socket.socket(socket.AF_INET))]
        print(*outcome, flush=True)
        os._exit(0)
    os.wait()""",
    )
    assert said.splitlines() == ["open open refused", "refused refused refused"]


@pytest.mark.parametrize("version", [1, 2, 3, 4, 5, 6, 7, 99])
def test_every_version_of_landlock_is_asked_for_what_it_knows(version: int) -> None:
    rights = confinement._FILE_RIGHTS[min(version, max(confinement._FILE_RIGHTS))]
    assert rights == {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)


@pytest.mark.parametrize("machine", ["x86_64", "aarch64", "riscv64"])
def test_a_filter_refuses_by_name_whatever_the_processor_calls_it(machine: str) -> None:
    named = confinement._MACHINES[machine].calls
    program = confinement._program(confinement._MACHINES[machine], 1, accelerators=False)
    assert len(program) < 256, "jumps are one byte"
    compared = {int.from_bytes(line[4:], "little") for line in program if line[0] == confinement._JUMP_EQUAL}
    assert set(named.values()) <= compared


def test_a_trial_is_confined_before_another_thread_exists(tmp_path: Path) -> None:
    said = _in_child(
        tmp_path, "import device.adapters.trial_child\nprint(len(os.listdir('/proc/self/task')))"
    )
    assert said == "1"


def test_doctor_says_what_this_kernel_grants() -> None:
    finding = look_at_confinement()
    assert finding.level is Level.OK
    assert "no network and no programs (seccomp), files read-only (Landlock" in finding.text


@pytest.mark.parametrize(
    ("lines", "text"),
    [
        (
            """echo '{"network":"open","files":0}'""",
            "the network is open: this kernel has no seccomp filters",
        ),
        ("""echo '{"network":"seccomp","files":0}'""", "files are open: this kernel has no Landlock"),
        ("echo nonsense", "trials cannot be confined"),
        ("exit 3", "trials cannot be confined"),
    ],
)
def test_doctor_warns_of_a_kernel_that_grants_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: str, text: str
) -> None:
    monkeypatch.setattr(sys, "executable", program(tmp_path / "python", lines))
    finding = look_at_confinement()
    assert finding.level is Level.WARNING
    assert text in finding.text
    assert finding.advice
