"""The `whimbrel-device` command: provision and enroll a device, run its agent, look at it, steer it, ask its model.

Exit codes: 0 done, 1 it could not be done (one line says why), 2 wrong usage, 130 interrupted.
"""

import argparse
import json
import logging
import os
import pwd
import signal
import sys
from collections.abc import Sequence
from contextlib import ExitStack, closing, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Final

import msgspec

from device.adapters.clock import SystemClock, system_rng
from device.adapters.control import AgentNotRunningError, ControlServer, Status, ask_agent
from device.adapters.disk import RealDisk
from device.adapters.engines import LocalEngine
from device.adapters.mqtt import MqttLoop
from device.adapters.systemd import Notifier, log_formatter
from device.adapters.workers import WorkerPool
from device.config import DeviceConfig, load_config
from device.journal import Journal, Record
from device.ports import ModelSource
from device.runtime import DeviceRuntime, install_factory
from device.slots import slot_file
from device.states import REWRITING
from device.status import history_lines, status_fields, status_lines
from protocol.errors import RequestError, StorageError, WhimbrelError
from protocol.release import ClassPrompt, Prompt, Release, TextPrompt, decode_release

CONFIG: Final = Path("/etc/whimbrel/device.toml")
_LOG: Final = logging.getLogger("device")
_TELL_S: Final = 5.0
"""How often the service manager hears how things stand, at least; and that the loop turns, where it waits for that."""

_ENROLL_S_MAX: Final = 7 * 24 * 3600

_LISTEN_S: Final = 10.0
"""Until another try to listen for applications."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.command(arguments))
    except WhimbrelError as error:
        print(f"whimbrel-device: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read the output has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="whimbrel-device", description="The agent of one device.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--config", type=Path, default=CONFIG, help="default: %(default)s, with its drop-ins")
    program = argparse.ArgumentParser(add_help=False)
    program.add_argument("--json", action="store_true", help="for programs")
    provision = commands.add_parser("provision", parents=[common], help="put the first version on the device")
    provision.add_argument(
        "--from",
        dest="folder",
        type=Path,
        help="folder that `whimbrel release export` wrote; or, one by one:",
    )
    provision.add_argument("--release", type=Path, help="release description of the version")
    provision.add_argument(
        "--file", type=Path, action="append", default=[], help="a file of the release; repeat"
    )
    provision.add_argument("--root", type=Path, help="the server's 1.root.json")
    provision.set_defaults(command=_provision, refuse=provision.error)
    _add_enroll(commands, common)
    run = commands.add_parser("run", parents=[common], help="run the agent until it is stopped")
    run.add_argument("--trace", type=Path, help="append a line of JSON per transition and stored chunk")
    run.set_defaults(command=_run)
    looks: tuple[tuple[str, Any, str], ...] = (
        ("status", _status, "show slots, the running agent and the last update"),
        ("history", _history, "show past updates, newest first"),
        ("doctor", _doctor, "look for what keeps this device from working, and say what to do"),
    )
    for name, command, text in looks:
        commands.add_parser(name, parents=[common, program], help=text).set_defaults(command=command)
    orders = (
        ("pause", "let no update begin or go on, restarts included, until `resume`"),
        ("resume", "let updates go on"),
        ("rollback", "go back to the version before, and never take the present one again"),
    )
    for name, text in orders:
        commands.add_parser(name, parents=[common], help=text).set_defaults(command=_order, wish=name)
    infer = commands.add_parser("infer", parents=[common], help="ask the active model")
    question = infer.add_mutually_exclusive_group(required=True)
    question.add_argument("--prompt", help="a text")
    question.add_argument("--input", type=Path, help="file with a JSON list of numbers")
    infer.set_defaults(command=_infer)
    return parser


def _add_enroll(commands: Any, common: argparse.ArgumentParser) -> None:
    enroll = commands.add_parser(
        "enroll",
        parents=[common],
        help="get a certificate: make a key, and ask with a claim of the operator's",
    )
    enroll.add_argument(
        "--claim",
        required=True,
        help="what `whimbrel devices claim` gave: a file, - for input, or the text itself, which others can see in the process list",
    )
    enroll.add_argument(
        "--wait", type=_seconds, default=900, help="seconds for the operator to accept (default: %(default)s)"
    )
    enroll.add_argument(
        "--again", action="store_true", help="although there is a certificate: it was revoked"
    )
    enroll.set_defaults(command=_enroll)


def _seconds(text: str) -> float:
    value = float(text) if text.isascii() and text.isdigit() else -1.0
    if not 1 <= value <= _ENROLL_S_MAX:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not between 1 and {_ENROLL_S_MAX}")
    return value


def _provision(arguments: argparse.Namespace) -> int:
    release_path, root_path = arguments.release, arguments.root
    if arguments.folder is not None:
        release_path = release_path or arguments.folder / "release.json"
        root_path = root_path or arguments.folder / "root.json"
    if release_path is None or root_path is None:
        arguments.refuse("give --from FOLDER, or --release, --file and --root")
    config = load_config(arguments.config)
    release = decode_release(_read(release_path))
    root = _read(root_path)
    with ExitStack() as stack:
        files = _opened(arguments, release, stack)
        _become_owner(config.folder)
        with RealDisk(config.folder).locked():
            install_factory(config, release, files, root)
    print(f"{config.agent.device} is provisioned with {release.family} {release.version}")
    return 0


def _opened(arguments: argparse.Namespace, release: Release, stack: ExitStack) -> dict[str, BinaryIO]:
    """The files of a release by their names, opened while this process may still read them."""
    named = {path.name: path for path in arguments.file}
    if len(release.files) == 1 and len(arguments.file) == 1:
        named = {release.files[0].name: arguments.file[0]}
    if arguments.folder is not None:
        named = {file.name: arguments.folder / file.name for file in release.files} | named
    try:
        return {name: stack.enter_context(path.open("rb")) for name, path in named.items()}
    except OSError as error:
        raise RequestError(f"{error.filename}: {error.strerror}") from error


def _become_owner(folder: Path) -> None:
    """Work as the user who owns the state folder: what root leaves there, the agent's own user could not change.

    Raises:
        StorageError: The folder cannot be looked at.
    """
    try:
        status = folder.stat()
    except FileNotFoundError:
        return
    except OSError as error:
        raise StorageError(f"{folder}: {error.strerror}") from error
    if os.geteuid() != 0 or status.st_uid == 0:
        return
    try:
        os.initgroups(pwd.getpwuid(status.st_uid).pw_name, status.st_gid)
    except KeyError:  # a user without a name
        os.setgroups([])
    os.setgid(status.st_gid)
    os.setuid(status.st_uid)


def _enroll(arguments: argparse.Namespace) -> int:
    from device.adapters.enrolment import enroll  # noqa: PLC0415 - an agent does without
    from protocol.identity import CLAIM_HEAD, decode_claim  # noqa: PLC0415 - likewise

    config = load_config(arguments.config)
    named: str = arguments.claim
    claim = decode_claim(named if named.startswith(CLAIM_HEAD) else _claim_text(named))
    _become_owner(config.folder)
    certificate = enroll(
        config,
        claim,
        wait_s=arguments.wait,
        rng=system_rng(),
        tell=partial(print, flush=True),
        is_again=arguments.again,
    )
    print(f"{config.agent.device} has a certificate until {certificate.not_valid_after_utc:%Y-%m-%d}")
    if config.tls is None:
        print(f"to use it, add a line [tls] to {arguments.config} or a drop-in, and restart the agent")
    return 0


def _claim_text(name: str) -> str:
    from protocol.identity import CLAIM_CHARS_MAX  # noqa: PLC0415 - an agent does without

    try:
        with nullcontext(sys.stdin) if name == "-" else Path(name).open() as file:
            return file.read(CLAIM_CHARS_MAX + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{name[:200]}: {getattr(error, 'strerror', None) or error}") from error


def _run(arguments: argparse.Namespace) -> int:
    config = load_config(arguments.config)
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(log_formatter(sys.stdout))
    logging.basicConfig(handlers=[handler])
    _LOG.setLevel(logging.INFO)
    _become_owner(config.folder)
    disk, notifier = RealDisk(config.folder), Notifier()
    with ExitStack() as stack:
        stack.enter_context(disk.locked())
        loop = stack.enter_context(closing(MqttLoop()))
        pool = stack.enter_context(closing(WorkerPool(threads=1)))
        clock, rng = SystemClock(), system_rng()
        runtime = DeviceRuntime(config, loop, pool, clock=clock, rng=rng, trace_path=arguments.trace)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: loop.stop())
        stack.callback(runtime.stop)
        stack.callback(notifier.stopping)
        runtime.start()
        try:
            stack.enter_context(closing(ControlServer(loop, config.control, runtime)))
        except StorageError as error:
            _LOG.warning("pause, resume and rollback cannot reach this agent: %s", error)
        _open_endpoint(config, loop, runtime, stack)
        notifier.ready()
        _tell(loop, notifier, runtime)
        loop.run_forever()
    return 0


def _open_endpoint(config: DeviceConfig, loop: MqttLoop, runtime: DeviceRuntime, stack: ExitStack) -> None:
    """Let applications ask the model. What keeps the endpoint from listening may pass, and updates go on meanwhile."""
    if config.serving is None:
        return
    from device.adapters.endpoint import Endpoint  # noqa: PLC0415 - an agent without one does without HTTP
    from device.adapters.endpoint_requests import Limits  # noqa: PLC0415 - likewise

    limits = Limits(config.serving.requests_max, config.serving.request_s_max)
    try:
        endpoint = Endpoint(config.serving.listen, config.agent.family, runtime.executor.leases, limits)
    except StorageError as error:
        _LOG.error("applications cannot ask the model: %s", error)
        loop.call_later(_LISTEN_S, partial(_open_endpoint, config, loop, runtime, stack))
        return
    stack.callback(endpoint.close)
    _LOG.info("applications may ask the model at %s", endpoint.address)


def _tell(loop: MqttLoop, notifier: Notifier, runtime: DeviceRuntime) -> None:
    """Tell the service manager that the loop turns, and how things stand; a loop that hangs tells nothing."""
    status = runtime.status()
    serving = (
        f"{runtime.config.agent.family} {status.serving} answers" if status.serving else "no model answers"
    )
    connected = (
        f"connected to {status.broker}" if status.is_connected else f"no connection to {status.broker}"
    )
    paused = ""
    if status.paused_ms is not None:
        paused = ", updates are paused"
    elif status.held is not None:
        paused = f", updates wait ({status.held.code})"
    notifier.status(f"{serving}, {connected}, {status.state}{paused}")
    notifier.alive()
    loop.call_later(min(notifier.watchdog_s or _TELL_S, _TELL_S), partial(_tell, loop, notifier, runtime))


def _status(arguments: argparse.Namespace) -> int:
    config = load_config(arguments.config)
    record, agent = _record(config), _agent(config)
    if arguments.json:
        print(json.dumps(status_fields(config, record, agent), indent=2))
    else:
        print(*status_lines(config, record, agent), sep="\n")
    return 0


def _history(arguments: argparse.Namespace) -> int:
    history = _record(load_config(arguments.config)).history
    if arguments.json:
        print(json.dumps(msgspec.to_builtins(history), indent=2))
    else:
        print(*history_lines(history), sep="\n")
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from device.adapters.doctor import Level, examine, finding_lines  # noqa: PLC0415 - an agent does without

    findings = examine(arguments.config)
    if arguments.json:
        print(json.dumps(msgspec.to_builtins(findings), indent=2))
    else:
        print(*finding_lines(findings), sep="\n")
    return 1 if any(finding.level is Level.FAILED for finding in findings) else 0


def _order(arguments: argparse.Namespace) -> int:
    config = load_config(arguments.config)
    try:
        print(ask_agent(config.control, arguments.wish).text)
    except AgentNotRunningError:
        if arguments.wish == "rollback":
            raise
        _pause_at_rest(config, is_paused=arguments.wish == "pause")
    return 0


def _pause_at_rest(config: DeviceConfig, *, is_paused: bool) -> None:
    """Write down what the agent will find when it starts."""
    _become_owner(config.folder)
    record = _record(config)
    disk = RealDisk(config.folder)
    with disk.locked():
        journal = Journal(disk)
        record = journal.load() or record
        if is_paused != (record.paused_ms is not None):
            paused_ms = SystemClock().now_ms() if is_paused else None
            journal.save(msgspec.structs.replace(record, paused_ms=paused_ms))
    print(f"the agent does not run; updates {'are paused' if is_paused else 'go on'} once it does")


def _agent(config: DeviceConfig) -> Status | None:
    try:
        return ask_agent(config.control, "status").status
    except AgentNotRunningError:
        return None


def _infer(arguments: argparse.Namespace) -> int:
    config = load_config(arguments.config)
    record = _record(config)
    if record.active is None:
        raise RequestError("no version is installed", hint="provision the device first")
    if record.update is not None and record.update.is_in_place and record.state in REWRITING:
        raise RequestError(
            f"the model is being rewritten in place, in state {record.state.value}",
            hint="ask again after the update; `whimbrel-device status` shows it",
        )
    slot = record.slots[record.active]
    disk = RealDisk(config.folder)
    path = disk.path(slot_file(record.active, slot.main_file))
    adapter = disk.path(slot_file(record.active, slot.adapter_file)) if slot.adapter_file else ""
    model = LocalEngine().load(ModelSource(slot.runtime, path, adapter))
    try:
        print(model.answer(_prompt(arguments)))
    finally:
        model.close()
    return 0


def _prompt(arguments: argparse.Namespace) -> Prompt:
    if arguments.prompt is not None:
        return TextPrompt(name="question", prompt=arguments.prompt, completion=" ", logprob_mean_min=0.0)
    try:
        return ClassPrompt(
            name="question", input=msgspec.json.decode(_read(arguments.input), type=list[float]), label=0
        )
    except msgspec.MsgspecError as error:
        raise RequestError(
            f"{arguments.input}: {error}", hint="a JSON list of numbers is expected"
        ) from error


def _record(config: DeviceConfig) -> Record:
    record = Journal(RealDisk(config.folder)).load()
    if record is None:
        raise RequestError(f"{config.folder}: no device lives here", hint="run whimbrel-device provision")
    return record


def _read(path: Path) -> Any:
    try:
        return path.read_bytes()
    except OSError as error:
        raise RequestError(f"{path}: {error.strerror}") from error


if __name__ == "__main__":
    sys.exit(main())
