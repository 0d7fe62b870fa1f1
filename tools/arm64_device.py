"""An update on 64-bit ARM, from an empty Debian to a rollback: `python -m tools.arm64_device`. Root, Debian, debootstrap and qemu-user-static.

A clean Debian for ARM is made with debootstrap and run by qemu's emulation of the processor; nothing else is imitated. Our package for ARM is
built and installed there by its apt, without a network. Outside run a mosquitto and the server. The device is provisioned with a
real ONNX model, gets version 2 as a delta, is killed in the middle of it and started again, tries version 2 and commits it. Version 3,
which loads and runs and answers wrongly, is tried and rolled back. Any of it that does not happen ends the program with a reason.

What is fetched stays in .cache/arm64-device. Mounts are private to this program; a handler for ARM programs (binfmt_misc) is registered
with the kernel if there is none, and taken away again. Processes are ended by their ids.
"""

import contextlib
import ctypes
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

from simulator.live.brokers import Mosquitto, stop
from tools.arm64 import step

ROOT: Final = Path(__file__).resolve().parent.parent
FOLDER: Final = ROOT / ".cache" / "arm64-device"
SUITE: Final = "bookworm"
PYTHON: Final = "3.11"  # that of the suite
PACKAGES: Final = (f"python{PYTHON}", "libstdc++6", "adduser", "ca-certificates")
DEVICE: Final = "pi-under-qemu"
CONFIG: Final = f"""device = "{DEVICE}"
fleet = "lab"
family = "digits"
broker = "127.0.0.1:{{port}}"
tier = "pi"
bandwidth_kb_per_s_max = 64
"""
WHO: Final = "import platform as p, onnxruntime as o; print(p.machine(), p.python_version(), 'onnxruntime', o.__version__)"
KILL_CHUNKS: Final = 5
"""Chunks on disk when the agent is killed."""

SLOWNESS: Final = 20.0
"""An emulated processor is that much slower than a board's, at least: limits of latency are as for such a board."""

WAIT_S: Final = 900.0
BINFMT: Final = Path("/proc/sys/fs/binfmt_misc")
HANDLER: Final = "whimbrel-arm64"
# From qemu's scripts/qemu-binfmt-conf.sh. F: the kernel opens the emulator now, so that a root without it can run.
MAGIC: Final = r"\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00"
MASK: Final = r"\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff"
# What an ARM kernel says of a Cortex-A72, the processor of a Pi 4. This machine's own speaks of another kind, and onnxruntime 1.32 crashes on
# it; emulators from qemu 8 on write such a file themselves.
CPUINFO: Final = """processor\t: {number}
BogoMIPS\t: 108.00
Features\t: fp asimd evtstrm crc32 cpuid
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x0
CPU part\t: 0xd08
CPU revision\t: 3

"""
_CLONE_NEWNS: Final = 0x20000  # linux/sched.h
_MS_PRIVATE_ALL: Final = 0x44000  # MS_PRIVATE | MS_REC, sys/mount.h


def check_machine() -> str:
    """The emulator; ends the program with what to do where something is missing."""
    if os.geteuid() != 0:
        raise SystemExit("whimbrel: root is needed for debootstrap and chroot: sudo make arm64")
    emulator = shutil.which("qemu-aarch64-static")
    lacking = [
        package
        for package, program in {
            "qemu-user-static": "qemu-aarch64-static",
            "debootstrap": "debootstrap",
            "mosquitto": "mosquitto",
            "dpkg": "dpkg-deb",
        }.items()
        if shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin") is None
    ]
    if lacking or emulator is None:
        raise SystemExit(
            f"whimbrel: missing on this machine: {', '.join(lacking)} (apt-get install {' '.join(lacking)})"
        )
    return emulator


def run(*command: str | Path, output: bool = False) -> str:
    """Run a program that must succeed, quietly; gives its output if asked."""
    result = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT)
    if result.returncode:
        words = " ".join(map(str, command))
        raise SystemExit(
            f"whimbrel: failed with {result.returncode}: {words}\n{result.stdout}{result.stderr}"
        )
    return result.stdout if output else ""


def unshare_mounts() -> None:
    """Whatever is mounted from here on is seen by this program and its children only, and goes with them."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNS) or libc.mount(b"none", b"/", None, _MS_PRIVATE_ALL, None):
        raise SystemExit(f"whimbrel: no mounts of its own: {os.strerror(ctypes.get_errno())}")


@contextlib.contextmanager
def arm_programs(emulator: str) -> Iterator[None]:
    """The kernel starts programs for ARM with the emulator."""
    if not (BINFMT / "register").exists():
        run("mount", "-t", "binfmt_misc", "binfmt_misc", BINFMT)
    known = [path for path in BINFMT.iterdir() if path.name not in {"register", "status"}]
    if any("qemu-aarch64" in path.read_text() and "flags: " in path.read_text() for path in known):
        yield
        return
    (BINFMT / "register").write_text(f":{HANDLER}:M::{MAGIC}:{MASK}:{emulator}:F")
    try:
        yield
    finally:
        (BINFMT / HANDLER).write_text("-1")


def mirror() -> str:
    """Where this machine fetches Debian's packages from."""
    sites = run(
        "apt-get", "indextargets", "--format", "$(REPO_URI)", f"Codename: {SUITE}", output=True
    ).split()
    sites += run("apt-get", "indextargets", "--format", "$(REPO_URI)", "Origin: Debian", output=True).split()
    return sites[0] if sites else "http://deb.debian.org/debian"


def clean_debian() -> Path:
    """A Debian for ARM with what our package depends on, made once; gives the folder, which is not to be changed."""
    made, stamp = FOLDER / "debian", FOLDER / "stamp"
    wanted = hashlib.sha256(" ".join([SUITE, *PACKAGES]).encode()).hexdigest()
    if stamp.exists() and stamp.read_text() == wanted:
        return made
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    with step(f"making a Debian {SUITE} for ARM"):
        include = f"--include={','.join(PACKAGES)}"
        options = ["--arch=arm64", "--variant=minbase", "--foreign", include]
        run("debootstrap", *options, SUITE, made, mirror())
    with step("setting it up, in the emulator"):
        run("chroot", made, "/debootstrap/debootstrap", "--second-stage")
    stamp.write_text(wanted)
    return made


class ArmDevice:
    """The root of a device, with an agent or without.

    Args:
        root: Its file system.
    """

    def __init__(self, root: Path) -> None:
        self.root: Final = root
        self._agent: subprocess.Popen[bytes] | None = None
        self._log: Final = root / "var" / "log" / "whimbrel.log"
        self.trace: Final = root / "var" / "lib" / "whimbrel-trace.jsonl"

    def mount(self) -> None:
        """Give it processes, devices and the kernel's view of the machine."""
        run("mount", "-t", "proc", "proc", self.root / "proc")
        for name in ("dev", "sys"):
            run("mount", "--rbind", f"/{name}", self.root / name)
        processors = self.root.parent / "cpuinfo"
        processors.write_text("".join(CPUINFO.format(number=each) for each in range(os.cpu_count() or 1)))
        run("mount", "--bind", processors, self.root / "proc" / "cpuinfo")

    def __call__(self, *command: str, user: str = "root", output: bool = True) -> str:
        """Run a program in it that must succeed."""
        return run("chroot", f"--userspec={user}", self.root, *command, output=output)

    def install(self, package: Path) -> None:
        """Install our package with the device's own apt; everything that it depends on is there."""
        shutil.copy(package, self.root / "tmp")
        self("apt-get", "-qq", "install", "--yes", "--no-install-recommends", f"/tmp/{package.name}")  # noqa: S108 - the device's
        # Without systemd nobody makes the folder of the control socket.
        self("install", "-d", "-o", "whimbrel", "-g", "whimbrel", "-m", "0750", "/run/whimbrel")
        self.trace.touch()
        shutil.chown(self.trace, *self._owner())

    def _owner(self) -> tuple[int, int]:
        status = (self.root / "var/lib/whimbrel").stat()
        return status.st_uid, status.st_gid

    def provision(self, factory: Path, port: int) -> None:
        """Tell it who it is, and give it the first version."""
        (self.root / "etc/whimbrel/device.d/50-local.toml").write_text(CONFIG.format(port=port))
        shutil.copytree(factory, self.root / "srv" / "factory")
        self("whimbrel-device", "provision", "--from", "/srv/factory")

    def start(self) -> None:
        """Start the agent, as its user."""
        command = ["whimbrel-device", "run", "--trace", f"/{self.trace.relative_to(self.root)}"]
        with self._log.open("ab") as log:
            self._agent = subprocess.Popen(
                ["/usr/sbin/chroot", "--userspec=whimbrel:whimbrel", self.root, *command],
                stdout=log,
                stderr=log,
            )

    def kill(self) -> None:
        """SIGKILL, as a power cut would end it."""
        assert self._agent is not None
        self._agent.kill()
        self._agent.wait()

    def stop(self) -> None:
        """End the agent, if one runs."""
        if self._agent is not None:
            stop(self._agent)

    def chunks(self) -> list[tuple[str, int]]:
        """Chunks that were stored so far, by the trace; one that came twice is there twice."""
        lines = [json.loads(line) for line in self.trace.read_text().splitlines()]
        return [(line["blob"], line["index"]) for line in lines if line["kind"] == "chunk"]

    def last_words(self) -> str:
        """The end of the agent's log."""
        return self._log.read_text(errors="replace")[-2000:] if self._log.exists() else ""


class FleetServer:
    """The server's command, and the server.

    Args:
        folder: Its folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder: Final = folder
        self.program: Final = Path(sys.executable).parent / "whimbrel"
        self._process: subprocess.Popen[bytes] | None = None

    def __call__(self, *words: str | Path) -> str:
        """Run the command."""
        return run(self.program, *words, "--dir", self.folder, output=True)

    def start(self) -> None:
        """Start the server."""
        with (self.folder.parent / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                [self.program, "serve", "--dir", self.folder], stdout=log, stderr=log, cwd=ROOT
            )

    def stop(self) -> None:
        """End the server, if it runs."""
        if self._process is not None:
            stop(self._process)

    def version(self) -> str:
        """The version that the device reported last, empty until it has."""
        devices = json.loads(self("devices", "--json"))
        return str((devices[0]["report"] or {}).get("version", "")) if devices else ""

    def release(self, version: str, models: Path) -> None:
        """Add and publish a version."""
        health = models / "health.json"
        self("release", "add", "digits", version, models / f"{version}.onnx", "--runtime", "onnx", "--health", health)  # fmt: skip
        self("release", "publish", "digits", version)


def wait_for(what: str, is_there: Callable[[], bool], device: ArmDevice, every_s: float = 2.0) -> None:
    """Wait until something has happened, and look every so often.

    Raises:
        SystemExit: It did not, in time; with the end of the agent's log.
    """
    end = time.monotonic() + WAIT_S
    while not is_there():
        if time.monotonic() > end:
            raise SystemExit(f"whimbrel: not within {WAIT_S:.0f} s: {what}\n{device.last_words()}")
        time.sleep(every_s)


def rehearse(device: ArmDevice, server: FleetServer, models: Path) -> None:
    """The update, the kill, the commit, and the rollback of a bad version."""
    with step("the first start, and its report"):
        device.start()
        wait_for("the device reports v1", lambda: server.version() == "v1", device)
    print(device("whimbrel-device", "doctor"), flush=True)

    server.release("v2", models)
    server("rollout", "start", "digits", "v2", "--canary", "1")
    with step(f"version 2 on its way, until SIGKILL after {KILL_CHUNKS} chunks"):
        wait_for("chunks of version 2 on disk", lambda: len(device.chunks()) >= KILL_CHUNKS, device, 0.05)
        device.kill()
    stored = len(device.chunks())
    with step("started again: the rest of version 2, its trial and its commit"):
        device.start()
        wait_for("the device reports v2", lambda: server.version() == "v2", device)
    chunks = device.chunks()
    if len(set(chunks)) < len(chunks):
        raise SystemExit("whimbrel: a chunk that was on disk before the kill was fetched again")
    if stored == len(chunks):
        raise SystemExit("whimbrel: nothing was left to fetch after the kill")
    print(f"{stored} chunks before the kill, {len(chunks) - stored} after it, none twice", flush=True)
    (past,) = json.loads(device("whimbrel-device", "history", "--json"))
    whole = (models / "v2.onnx").stat().st_size
    print(f"{past['received_bytes']:,} bytes were fetched, the file has {whole:,}", flush=True)
    if past["received_bytes"] >= whole:
        raise SystemExit("whimbrel: version 2 did not come as a delta")
    print(device("whimbrel-device", "status"), flush=True)

    server.release("v3", models)
    server("rollout", "start", "digits", "v3", "--canary", "1")
    with step("version 3, which answers wrongly, until it is rolled back"):
        wait_for("version 3 in the history", lambda: "v3" in device("whimbrel-device", "history"), device)
    history = json.loads(device("whimbrel-device", "history", "--json"))
    print(device("whimbrel-device", "history"), flush=True)
    last = next(past for past in history if past["version"] == "v3")
    if (last["version"], last["code"]) != ("v3", "trial.answers"):
        raise SystemExit(f"whimbrel: version 3 was to fail its trial by its answers: {last}")
    question = json.loads((models / "health.json").read_text())["prompts"][0]
    (device.root / "tmp" / "question.json").write_text(json.dumps(question["input"]))
    answer = device("whimbrel-device", "infer", "--input", "/tmp/question.json").strip()  # noqa: S108 - the device's
    print(f"asked for the class of a held-out digit: {answer}, true is {question['label']}", flush=True)
    if answer != str(question["label"]) or server.version() != "v2":
        raise SystemExit("whimbrel: version 2 does not answer after the rollback")


def make_models(folder: Path) -> None:
    """The digits of `make demo`, with limits for an emulated processor."""
    run(sys.executable, "-m", "examples.digits.build", "--out", folder)
    health = json.loads((folder / "health.json").read_text())
    health["latency_p99_ms_max"] *= SLOWNESS
    (folder / "health.json").write_text(json.dumps(health))


def main(arguments: Sequence[str]) -> int:
    """Do all of it; returns the exit code."""
    if arguments:
        raise SystemExit(f"whimbrel: no argument is known\n{__doc__}")
    emulator = check_machine()
    unshare_mounts()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with arm_programs(emulator), contextlib.ExitStack() as ends:
        debian = clean_debian()
        work = FOLDER / "run"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        with step("building our package for ARM"):
            run(sys.executable, "-m", "tools.deb", work, "--arch", "arm64", "--python", PYTHON)
        (package,) = work.glob("*.deb")
        with step("training the models"):
            make_models(work / "models")
        run("cp", "--archive", debian, work / "root")
        device = ArmDevice(work / "root")
        device.mount()
        with step(f"installing {package.name}, in the emulator"):
            device.install(package)
        print(device("/usr/lib/whimbrel/bin/python3", "-c", WHO), end="", flush=True)
        broker = Mosquitto(work)
        broker.start()
        ends.callback(broker.stop)
        server = FleetServer(work / "fleet")
        run(server.program, "init", server.folder, "--fleet", "lab", "--broker", f"127.0.0.1:{broker.port}")
        server.release("v1", work / "models")
        server("release", "export", "digits", "v1", "-o", work / "factory")
        server.start()
        ends.callback(server.stop)
        with step("provisioning"):
            device.provision(work / "factory", broker.port)
        ends.callback(device.stop)
        rehearse(device, server, work / "models")
    print(
        "an update, a kill in the middle of it, a commit and a rollback on 64-bit ARM: all as it should be",
        flush=True,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
