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
from pathlib import Path
from types import FrameType
from typing import Any, Final

import msgspec

from protocol.errors import WhimbrelError
from protocol.messages import Report
from server import (
    audit_cli,
    ceremony,
    delta_cli,
    diagnose_cli,
    identity_cli,
    keys_cli,
    operations,
    provenance_cli,
    requantize_cli,
    rollout_cli,
    rollout_orders,
    score_cli,
    tiers_cli,
    tradeoffs_cli,
    users_cli,
    verify_cli,
    webhooks_cli,
)
from server.arguments import integer
from server.config import (
    DEFAULT_FLEET,
    DEFAULT_FOLDER,
    DEFAULT_PORT,
    EMBEDDED,
    FOLDER_VARIABLE,
    WebSettings,
    parse_broker,
    read_config,
)
from server.display import bytes_text, instant_text, table
from server.home import KEYS_FOLDER
from server.ports import ReleaseRecord

_INTEGER_MAX: Final = 1 << 44
"""Above every count, size or time that makes sense here, and exact in every program that reads JSON."""


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
    rollout_cli.add_parser(commands, common, _print)
    devices = commands.add_parser(
        "devices", parents=[common], help="list the devices and what they run; see to their certificates"
    )
    devices.set_defaults(run=_devices)
    quiet = _common(argparse.SUPPRESS, as_json=argparse.SUPPRESS)
    rollout_cli.add_label_action(identity_cli.add_device_actions(devices, quiet, _print), quiet, _print)
    identity_cli.add_broker_parser(commands, common, _print)
    users_cli.add_parser(commands, common, _print)
    audit_cli.add_parser(commands, common, _print)
    webhooks_cli.add_parser(commands, common, _print)
    _add_serve(commands, common)
    delta_cli.add_parser(commands, common)
    keys_cli.add_parser(commands, common)
    verify_cli.add_parser(commands, common)
    diagnose_cli.add_parser(commands, common, _print)
    tiers_cli.add_parser(commands, common, _print)
    score_cli.add_parser(commands, common, _print)
    tradeoffs_cli.add_parser(commands, common, _print)
    requantize_cli.add_parser(commands, common, _print)
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
        "--port",
        type=integer(0, 65_535),
        default=DEFAULT_PORT,
        help="of the embedded broker (default: %(default)s)",
    )
    init.add_argument(
        "--database",
        default="",
        metavar="URL",
        help="postgresql://USER@HOST/DATABASE (default: an SQLite file in DIR)",
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
        "--adapter",
        metavar="FILE",
        type=Path,
        help="low-rank adapter (LoRA, GGUF) that the engine llama adds to the model's weights",
    )
    add.add_argument(
        "--memory-bytes",
        metavar="N",
        type=integer(0, _INTEGER_MAX),
        default=0,
        help="memory that a device needs to run it",
    )
    add.add_argument("--tier", action="append", default=[], help="hardware tier that may take it; repeatable")
    add.add_argument("--runtime-version-min", default="", help="oldest version of the engine")
    add.add_argument(
        "--encrypt",
        action=argparse.BooleanOptionalAction,
        help="let nobody read the files on the way but devices with a certificate (default: as the last release of the family)",
    )
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


def _add_serve(commands: Any, common: argparse.ArgumentParser) -> None:
    serve = commands.add_parser("serve", parents=[common], help="run the server until it is interrupted")
    serve.add_argument("--broker", metavar="HOST:PORT", help=f"instead of the configured one; or {EMBEDDED}")
    serve.add_argument(
        "--port", type=integer(0, 65_535), help="of the embedded broker, instead of the configured one"
    )
    serve.add_argument(
        "--web-port",
        type=integer(0, 65_535),
        metavar="PORT",
        help="show the page on this port of loopback, or of [web] host",
    )
    serve.set_defaults(run=_serve)


def _add_name(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("family", metavar="FAMILY", help="model family, for example digits")
    parser.add_argument("version", metavar="VERSION", help="for example 2.0")


# Commands


def _init(arguments: argparse.Namespace) -> int:
    root = operations.init_repository(
        arguments.folder,
        arguments.fleet,
        broker=arguments.broker,
        port=arguments.port,
        database=arguments.database,
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
    said = provenance_cli.provenance_of(arguments)
    record = operations.add_release(
        arguments.dir,
        arguments.family,
        arguments.version,
        arguments.files,
        runtime=arguments.runtime,
        health=arguments.health,
        adapter=arguments.adapter,
        memory_bytes=arguments.memory_bytes,
        tiers=arguments.tier,
        runtime_version_min=arguments.runtime_version_min,
        provenance=said,
        is_encrypted=arguments.encrypt,
    )
    name = f"{arguments.family} {arguments.version}"
    how = ", encrypted" if record.is_encrypted else ""
    lines = [
        f"Draft {name}: {bytes_text(record.release.bytes_total)} in {len(record.release.files)} file(s){how}",
        *tiers_cli.added_lines(arguments, record.release.resources.tiers),
        *provenance_cli.added_lines(arguments, said),
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
        "shut_out": operations.devices_shut_out(arguments.dir, arguments.family, arguments.version),
        "scorecard": msgspec.to_builtins(details.scorecard),
    }
    lines = provenance_cli.details_lines(details, state) + rollout_cli.shut_out_lines(value["shut_out"])
    _print(arguments, value, lines)
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
    how = ", encrypted" if record.is_encrypted else ""
    if record.published_ms is None:
        return f"draft{how}"
    return f"withdrawn{how}" if is_withdrawn else f"published {instant_text(record.published_ms)}{how}"


def _devices(arguments: argparse.Namespace) -> int:
    devices = operations.list_devices(arguments.dir)
    labels = rollout_orders.list_labels(arguments.dir)
    rows = [
        [
            device.device,
            "online" if device.is_online else "offline",
            device.family,
            device.version or "-",
            _state_text(device.report),
            (device.report.update.code if device.report and device.report.update else "") or "-",
            str(device.report.root) if device.report and device.report.root else "-",
            instant_text(device.seen_ms) if device.seen_ms else "-",
            ", ".join(labels.get(device.device, ())),
        ]
        for device in devices
    ]
    lines = table(
        ["DEVICE", "LINK", "FAMILY", "VERSION", "STATE", "CODE", "ROOT", "LAST SEEN", "LABELS"], rows
    )
    values = [{**msgspec.to_builtins(each), "labels": labels.get(each.device, ())} for each in devices]
    _print(arguments, values, lines or ["No device has reported yet"])
    return 0


def _state_text(report: Report | None) -> str:
    if report is None:
        return "-"
    return f"{report.state} ({report.alarm})" if report.alarm else report.state


def _serve(arguments: argparse.Namespace) -> int:
    from server.runtime import Server  # noqa: PLC0415 - brings the broker, paho and the coder: no other command needs them

    logging.basicConfig(format="whimbrel: %(message)s", level=logging.WARNING)
    logging.getLogger("server").setLevel(logging.INFO)
    config = read_config(arguments.dir)
    if arguments.broker is not None:
        parse_broker(arguments.broker)
        config = msgspec.structs.replace(config, broker=arguments.broker)
    if arguments.port is not None:
        config = msgspec.structs.replace(config, port=arguments.port)
    if arguments.web_port is not None:
        web_settings = msgspec.structs.replace(config.web or WebSettings(), port=arguments.web_port)
        config = msgspec.structs.replace(config, web=web_settings)
    stop = threading.Event()

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    server = Server(config)
    server.start()
    web = None
    try:
        if config.web is not None:
            from server.web.serving import WebServer  # noqa: PLC0415 - half a second that only the page costs

            web = WebServer(server, config.web)
            web.start()
        host, port = server.broker_address
        kind = "embedded broker on" if server.broker is not None else "broker"
        lines = [f"Serving fleet {config.fleet} through the {kind} {host}:{port}; Ctrl-C ends it"]
        if web is not None:
            lines.append(f"The page is at {web.url}")
            if not operations.has_users(arguments.dir):
                lines.append("Nobody can sign in yet: `whimbrel users add NAME --role approver`")
        url = None if web is None else web.url
        _print(arguments, {"fleet": config.fleet, "host": host, "port": port, "url": url}, lines)
        sys.stdout.flush()
        while not stop.wait(0.2):
            if server.wait_stopped(0):
                break
    finally:
        if web is not None:
            web.stop()
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


if __name__ == "__main__":
    sys.exit(main())
