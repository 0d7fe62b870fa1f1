"""The `whimbrel` command: releases, rollouts, the server.

Exit codes: 0 done, 1 it could not be done (one line on stderr says why), 2 wrong usage, 130 interrupted.
"""

import argparse
import contextlib
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any, Final

import msgspec

from protocol.errors import WhimbrelError
from server import (
    ceremony,
    delta_cli,
    identity_cli,
    keys_cli,
    operations,
    provenance_cli,
    score_cli,
    verify_cli,
)
from server.config import (
    DEFAULT_FLEET,
    DEFAULT_FOLDER,
    DEFAULT_PORT,
    EMBEDDED,
    FOLDER_VARIABLE,
    parse_broker,
    read_config,
)
from server.display import bytes_text, table
from server.home import KEYS_FOLDER
from server.operations import RolloutStatus
from server.ports import ReleaseRecord
from server.runtime import Server

_INTEGER_MAX: Final = 1 << 44
"""Above every count, size or time that makes sense here, and exact in every program that reads JSON."""

_NOT_SERVED: Final = "no server runs on this folder: this takes effect once `whimbrel serve` does"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Arguments without the program's name; None takes those of the process.

    Returns:
        Exit code.
    """
    try:
        code = _run(argv)
        sys.stdout.flush()
    except WhimbrelError as error:
        print(f"whimbrel: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read our output has enough. Python would complain once more when it flushes at its end.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code


def _run(argv: Sequence[str] | None) -> int:
    try:
        arguments = _parser().parse_args(argv)
    except SystemExit as ended:  # --help, --version or wrong usage; argparse has printed already
        return int(ended.code or 0)
    run: Callable[[argparse.Namespace], int] = arguments.run
    return run(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="whimbrel", description="Ships model updates to a fleet of devices as signed deltas over MQTT."
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    common = _common(Path(os.environ.get(FOLDER_VARIABLE) or DEFAULT_FOLDER), as_json=False)
    _add_init(commands)
    _add_release(commands, common)
    _add_rollout(commands, common)
    devices = commands.add_parser(
        "devices", parents=[common], help="list the devices and what they run; see to their certificates"
    )
    devices.set_defaults(run=_devices)
    identity_cli.add_device_actions(devices, _common(argparse.SUPPRESS, as_json=argparse.SUPPRESS), _print)
    identity_cli.add_broker_parser(commands, common, _print)
    _add_serve(commands, common)
    delta_cli.add_parser(commands, common)
    keys_cli.add_parser(commands, common)
    verify_cli.add_parser(commands, common)
    score_cli.add_parser(commands, common, _print)
    return parser


def _common(folder: Path | str, *, as_json: bool | str) -> argparse.ArgumentParser:
    """Options of every command, with their defaults; suppressed ones leave what was given before the action."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--dir",
        type=Path,
        default=folder,
        help=f"folder of the server (default: ${FOLDER_VARIABLE}, else ./{DEFAULT_FOLDER})",
    )
    common.add_argument("--json", action="store_true", default=as_json, help="print JSON for programs")
    return common


def _add_init(commands: Any) -> None:
    init = commands.add_parser("init", help="make keys, an empty signed repository and a database")
    init.add_argument("folder", metavar="DIR", type=Path, help="new or empty folder")
    init.add_argument("--fleet", default=DEFAULT_FLEET, help="name of the fleet (default: %(default)s)")
    init.add_argument(
        "--broker", default=EMBEDDED, metavar="HOST:PORT", help="broker to use (default: an embedded one)"
    )
    init.add_argument(
        "--port", type=_port, default=DEFAULT_PORT, help="of the embedded broker (default: %(default)s)"
    )
    init.add_argument("--json", action="store_true", help="print JSON for programs")
    init.set_defaults(run=_init)


def _add_release(commands: Any, common: argparse.ArgumentParser) -> None:
    release = commands.add_parser("release", help="add, show, publish, list and export releases")
    actions = release.add_subparsers(metavar="ACTION", required=True)
    add = actions.add_parser("add", parents=[common], help="check a model file and keep it as a draft")
    _add_name(add)
    add.add_argument("files", metavar="FILE", nargs="+", type=Path, help="the model, then its other files")
    add.add_argument("--runtime", required=True, choices=["onnx", "llama"], help="engine that loads it")
    add.add_argument(
        "--health", required=True, type=Path, help="JSON file: what a device must see in its trial"
    )
    add.add_argument(
        "--memory-bytes", metavar="N", type=_count, default=0, help="memory that a device needs to run it"
    )
    add.add_argument("--tier", action="append", default=[], help="hardware tier that may take it; repeatable")
    add.add_argument("--runtime-version-min", default="", help="oldest version of the engine")
    provenance_cli.add_options(add)
    add.set_defaults(run=_release_add)
    show = actions.add_parser(
        "show", aliases=["inspect"], parents=[common], help="show one release, and where its files come from"
    )
    _add_name(show)
    show.set_defaults(run=_release_show)
    publish = actions.add_parser("publish", parents=[common], help="sign a draft, for good")
    _add_name(publish)
    publish.set_defaults(run=_release_publish)
    withdraw = actions.add_parser(
        "withdraw", parents=[common], help="take a published release out of the signed metadata"
    )
    _add_name(withdraw)
    withdraw.set_defaults(run=_release_withdraw)
    export = actions.add_parser(
        "export", parents=[common], help="write what a new device is provisioned with into a folder"
    )
    _add_name(export)
    export.add_argument(
        "-o", "--output", type=Path, required=True, metavar="FOLDER", help="made if it is not there"
    )
    export.set_defaults(run=_release_export)
    listing = actions.add_parser("list", parents=[common], help="list drafts and published releases")
    listing.set_defaults(run=_release_list)


def _add_rollout(commands: Any, common: argparse.ArgumentParser) -> None:
    rollout = commands.add_parser("rollout", help="start rollouts and see how they go")
    actions = rollout.add_subparsers(metavar="ACTION", required=True)
    start = actions.add_parser("start", parents=[common], help="bring a published release to the fleet")
    _add_name(start)
    start.add_argument(
        "--canary",
        metavar="N",
        type=_positive,
        default=2,
        help="devices that go first (default: %(default)s)",
    )
    start.add_argument(
        "--wave-timeout",
        type=_positive,
        default=3600,
        metavar="S",
        help="seconds that a device may take before it counts as failed (default: %(default)s)",
    )
    start.add_argument(
        "--max-failures",
        metavar="K",
        type=_count,
        default=0,
        help="failures in a wave that are accepted (default: %(default)s)",
    )
    start.set_defaults(run=_rollout_start)
    status = actions.add_parser("status", parents=[common], help="show one rollout, or all")
    status.add_argument("rollout", metavar="ID", nargs="?", help="for example r1")
    status.set_defaults(run=_rollout_status)
    listing = actions.add_parser("list", parents=[common], help="list all rollouts")
    listing.set_defaults(run=_rollout_status, rollout=None)


def _add_serve(commands: Any, common: argparse.ArgumentParser) -> None:
    serve = commands.add_parser("serve", parents=[common], help="run the server until it is interrupted")
    serve.add_argument("--broker", metavar="HOST:PORT", help=f"instead of the configured one; or {EMBEDDED}")
    serve.add_argument("--port", type=_port, help="of the embedded broker, instead of the configured one")
    serve.set_defaults(run=_serve)


def _add_name(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("family", metavar="FAMILY", help="model family, for example digits")
    parser.add_argument("version", metavar="VERSION", help="for example 2.0")


# Commands


def _init(arguments: argparse.Namespace) -> int:
    root = operations.init_repository(
        arguments.folder, arguments.fleet, broker=arguments.broker, port=arguments.port
    )
    lines = [
        f"Repository of fleet {arguments.fleet} in {arguments.folder}",
        f"Devices start their trust from {root}",
        f"Keys are in {arguments.folder / KEYS_FOLDER}: whoever reads them decides what devices run",
        "Keep a copy; `whimbrel keys` gives them to several people",
    ]
    _print(arguments, {"folder": str(arguments.folder), "fleet": arguments.fleet, "root": str(root)}, lines)
    return 0


def _release_add(arguments: argparse.Namespace) -> int:
    record = operations.add_release(
        arguments.dir,
        arguments.family,
        arguments.version,
        arguments.files,
        runtime=arguments.runtime,
        health=arguments.health,
        memory_bytes=arguments.memory_bytes,
        tiers=arguments.tier,
        runtime_version_min=arguments.runtime_version_min,
        provenance=provenance_cli.provenance_of(arguments),
    )
    name = f"{arguments.family} {arguments.version}"
    lines = [
        f"Draft {name}: {bytes_text(record.release.bytes_total)} in {len(record.release.files)} file(s)",
        f"Publish it with `whimbrel release publish {name}`",
    ]
    _print(arguments, _release_json(record), lines)
    return 0


def _release_publish(arguments: argparse.Namespace) -> int:
    record = operations.publish_release(arguments.dir, arguments.family, arguments.version)
    name = f"{arguments.family} {arguments.version}"
    lines = [f"Published {name}", f"Bring it to the fleet with `whimbrel rollout start {name}`"]
    if record.published_ms is None:
        waiting = [each.standing for each in ceremony.status(arguments.dir).pending]
        lines = [
            f"{name} waits for signatures:",
            *keys_cli.waiting_text(waiting),
            "Each signs with `whimbrel keys sign`",
        ]
    _print(arguments, _release_json(record), lines)
    return 0


def _release_show(arguments: argparse.Namespace) -> int:
    details = operations.show_release(arguments.dir, arguments.family, arguments.version)
    (is_withdrawn,) = operations.is_withdrawn(arguments.dir, [details.record])
    state = _release_state(details.record, is_withdrawn=is_withdrawn)
    value = {
        **_release_json(details.record),
        "digest": details.digest,
        "provenance": msgspec.to_builtins(details.provenance),
        "scorecard": msgspec.to_builtins(details.scorecard),
    }
    _print(arguments, value, provenance_cli.details_lines(details, state))
    return 0


def _release_withdraw(arguments: argparse.Namespace) -> int:
    waiting = operations.withdraw_release(arguments.dir, arguments.family, arguments.version)
    name = f"{arguments.family} {arguments.version}"
    lines = [f"Withdrawn {name}", "Devices that run it go on until a rollout leads them to another version"]
    if waiting:
        lines = [
            f"{name} is withdrawn once it is signed:",
            *keys_cli.waiting_text(waiting),
            "Each signs with `whimbrel keys sign`",
        ]
    value = {"is_published": not waiting, "waiting": msgspec.to_builtins(waiting)}
    _print(arguments, value, lines)
    return 0


def _release_export(arguments: argparse.Namespace) -> int:
    operations.export_release(arguments.dir, arguments.family, arguments.version, arguments.output)
    lines = [
        f"{arguments.output} holds {arguments.family} {arguments.version} and the start of trust",
        f"Put it on a device with `whimbrel-device provision --config device.toml --from {arguments.output}`",
    ]
    _print(arguments, {"folder": str(arguments.output)}, lines)
    return 0


def _release_list(arguments: argparse.Namespace) -> int:
    records = operations.list_releases(arguments.dir)
    withdrawn = operations.is_withdrawn(arguments.dir, records)
    rows = [
        [
            record.release.family,
            record.release.version,
            record.release.runtime,
            bytes_text(record.release.bytes_total),
            _release_state(record, is_withdrawn=is_withdrawn),
        ]
        for record, is_withdrawn in zip(records, withdrawn, strict=True)
    ]
    lines = table(["FAMILY", "VERSION", "RUNTIME", "SIZE", "STATE"], rows)
    values = [
        _release_json(record) | {"is_withdrawn": is_withdrawn}
        for record, is_withdrawn in zip(records, withdrawn, strict=True)
    ]
    _print(arguments, values, lines or ["No release yet"])
    return 0


def _release_state(record: ReleaseRecord, *, is_withdrawn: bool) -> str:
    if record.published_ms is None:
        return "draft"
    return "withdrawn" if is_withdrawn else f"published {_instant(record.published_ms)}"


def _rollout_start(arguments: argparse.Namespace) -> int:
    record = operations.start_rollout(
        arguments.dir,
        arguments.family,
        arguments.version,
        canary_count=arguments.canary,
        wave_timeout_ms=arguments.wave_timeout * 1000,
        failures_max=arguments.max_failures,
    )
    is_served = operations.is_served(arguments.dir)
    lines = [f"Rollout {record.id} of {record.family} {record.version}: {record.canary_count} canaries first"]
    lines.append(
        f"Follow it with `whimbrel rollout status {record.id}`" if is_served else f"Note: {_NOT_SERVED}"
    )
    _print(arguments, {**msgspec.to_builtins(record), "is_served": is_served}, lines)
    return 0


def _rollout_status(arguments: argparse.Namespace) -> int:
    if arguments.rollout is None:
        statuses = operations.list_rollouts(arguments.dir)
        rows = [
            [
                status.rollout.id,
                status.rollout.family,
                status.rollout.version,
                status.rollout.state,
                _counts(status),
                status.rollout.reason,
            ]
            for status in statuses
        ]
        lines = table(["ID", "FAMILY", "VERSION", "STATE", "DEVICES", "REASON"], rows)
        _print(arguments, [_status_json(status) for status in statuses], lines or ["No rollout yet"])
        return 0
    status = operations.rollout_status(arguments.dir, arguments.rollout)
    _print(
        arguments,
        {**_status_json(status), "members": msgspec.to_builtins(status.members)},
        _status_lines(status),
    )
    return 0


def _devices(arguments: argparse.Namespace) -> int:
    devices = operations.list_devices(arguments.dir)
    rows = [
        [
            device.device,
            "online" if device.is_online else "offline",
            device.family,
            device.version or "-",
            device.report.state if device.report else "-",
            _instant(device.seen_ms),
        ]
        for device in devices
    ]
    lines = table(["DEVICE", "LINK", "FAMILY", "VERSION", "STATE", "LAST SEEN"], rows)
    _print(arguments, msgspec.to_builtins(devices), lines or ["No device has reported yet"])
    return 0


def _serve(arguments: argparse.Namespace) -> int:
    logging.basicConfig(format="whimbrel: %(message)s", level=logging.WARNING)
    logging.getLogger("server").setLevel(logging.INFO)
    config = read_config(arguments.dir)
    if arguments.broker is not None:
        parse_broker(arguments.broker)
        config = msgspec.structs.replace(config, broker=arguments.broker)
    if arguments.port is not None:
        config = msgspec.structs.replace(config, port=arguments.port)
    stop = threading.Event()

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    server = Server(config)
    server.start()
    try:
        host, port = server.broker_address
        kind = "embedded broker on" if server.broker is not None else "broker"
        lines = [f"Serving fleet {config.fleet} through the {kind} {host}:{port}; Ctrl-C ends it"]
        _print(arguments, {"fleet": config.fleet, "host": host, "port": port}, lines)
        sys.stdout.flush()
        while not stop.wait(0.2):
            if server.wait_stopped(0):
                break
    finally:
        server.stop()
    if isinstance(server.failure, WhimbrelError):
        raise server.failure
    return 1 if server.failure else 0


# Output


def _print(arguments: argparse.Namespace, value: Any, lines: list[str]) -> None:
    print(json.dumps(value) if arguments.json else "\n".join(lines))


def _release_json(record: ReleaseRecord) -> dict[str, Any]:
    value: dict[str, Any] = msgspec.to_builtins(record)
    value["release"]["health"]["prompts"] = len(record.release.health.prompts)
    return value


def _status_json(status: RolloutStatus) -> dict[str, Any]:
    return {**msgspec.to_builtins(status.rollout), "counts": status.counts}


def _status_lines(status: RolloutStatus) -> list[str]:
    rollout = status.rollout
    lines = [
        f"Rollout {rollout.id}: {rollout.family} {rollout.version}, {rollout.state}"
        + (f": {rollout.reason}" if rollout.reason else ""),
        f"Devices: {_counts(status) or 'none asked yet'}",
    ]
    rows = []
    for member in status.members:
        update = member.update
        received = (
            f"{bytes_text(update.received_bytes)} of {bytes_text(update.full_bytes_total)}" if update else "-"
        )
        rows.append(
            [member.device, member.wave, member.status, received, member.code or "-", member.detail[:60]]
        )
    return lines + table(["DEVICE", "WAVE", "STATUS", "RECEIVED", "CODE", "DETAIL"], rows)


def _counts(status: RolloutStatus) -> str:
    return ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in sorted(status.counts.items()))


def _instant(at_ms: int) -> str:
    return datetime.fromtimestamp(at_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S UTC") if at_ms else "-"


def _integer(text: str, low: int, high: int) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no integer") from None
    if not low <= value <= high:
        raise argparse.ArgumentTypeError(f"{value} is not between {low} and {high}")
    return value


def _count(text: str) -> int:
    return _integer(text, 0, _INTEGER_MAX)


def _positive(text: str) -> int:
    return _integer(text, 1, _INTEGER_MAX)


def _port(text: str) -> int:
    return _integer(text, 0, 65_535)


if __name__ == "__main__":
    sys.exit(main())
