"""The `whimbrel-device` command: provision a device, run its agent, look at it, ask its model.

Exit codes: 0 done, 1 it could not be done (one line says why), 2 wrong usage, 130 interrupted.
"""

import argparse
import json
import logging
import signal
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec

from device.adapters.clock import SystemClock, system_rng
from device.adapters.disk import RealDisk
from device.adapters.engines import LocalEngine
from device.adapters.mqtt import MqttLoop
from device.adapters.workers import WorkerPool
from device.config import DeviceConfig, load_config
from device.journal import Journal, Record
from device.ports import ModelSource
from device.runtime import DeviceRuntime, install_factory
from device.slots import slot_file
from device.states import REWRITING
from protocol.errors import RequestError, WhimbrelError
from protocol.release import ClassPrompt, Prompt, TextPrompt, decode_release


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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="whimbrel-device", description="The agent of one device.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--config", type=Path, default=Path("/etc/whimbrel/device.toml"), help="default: %(default)s"
    )
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
    run = commands.add_parser("run", parents=[common], help="run the agent until it is stopped")
    run.add_argument("--trace", type=Path, help="append a line of JSON per transition and stored chunk")
    run.set_defaults(command=_run)
    status = commands.add_parser("status", parents=[common], help="show slots and the last update")
    status.add_argument("--json", action="store_true", help="for programs")
    status.set_defaults(command=_status)
    infer = commands.add_parser("infer", parents=[common], help="ask the active model")
    question = infer.add_mutually_exclusive_group(required=True)
    question.add_argument("--prompt", help="a text")
    question.add_argument("--input", type=Path, help="file with a JSON list of numbers")
    infer.set_defaults(command=_infer)
    return parser


def _provision(arguments: argparse.Namespace) -> int:
    release_path, root_path = arguments.release, arguments.root
    if arguments.folder is not None:
        release_path = release_path or arguments.folder / "release.json"
        root_path = root_path or arguments.folder / "root.json"
    if release_path is None or root_path is None:
        arguments.refuse("give --from FOLDER, or --release, --file and --root")
    config = load_config(arguments.config)
    release = decode_release(_read(release_path))
    named = {path.name: path for path in arguments.file}
    if len(release.files) == 1 and len(arguments.file) == 1:
        named = {release.files[0].name: arguments.file[0]}
    if arguments.folder is not None:
        named = {file.name: arguments.folder / file.name for file in release.files} | named
    with RealDisk(config.folder).locked():
        install_factory(config, release, named, _read(root_path))
    print(f"{config.agent.device} is provisioned with {release.family} {release.version}")
    return 0


def _run(arguments: argparse.Namespace) -> int:
    config = load_config(arguments.config)
    logging.basicConfig(stream=sys.stdout, format="%(asctime)s %(message)s")
    logging.getLogger("device").setLevel(logging.INFO)
    disk = RealDisk(config.folder)
    with disk.locked(), closing(MqttLoop()) as loop, closing(WorkerPool(threads=1)) as pool:
        clock, rng = SystemClock(), system_rng()
        runtime = DeviceRuntime(config, loop, pool, clock=clock, rng=rng, trace_path=arguments.trace)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: loop.stop())
        try:
            runtime.start()
            loop.run_forever()
        finally:
            runtime.stop()
    return 0


def _status(arguments: argparse.Namespace) -> int:
    config = load_config(arguments.config)
    record = _record(config)
    if arguments.json:
        fields = msgspec.to_builtins(record)
        fields["device"] = config.agent.device
        if fields["update"] is not None:
            fields["update"].pop("release", None)  # long, and to be found in the signed description
        print(json.dumps(fields, indent=2))
        return 0
    agent = config.agent
    print(f"device   {agent.device}   fleet {agent.fleet}   family {agent.family}   tier {agent.tier or '-'}")
    print(f"state    {record.state.value}")
    for name, slot in record.slots.items():
        mark = "x" if name is record.active else "o"
        print(f"slot {name.value}   [{mark}] {slot.version or '-':<12} {slot.health.value}")
        for file, sha256 in slot.files.items():
            print(f"           {sha256[:16]} {file}")
    if record.update is not None:
        update = record.update
        reason = f": {update.detail}" if update.detail else ""
        print(
            f"update   {update.desired.version} {update.outcome}{' ' + update.code if update.code else ''}{reason}"
        )
        print(f"         {update.counters.received_bytes} bytes received, {update.tries} trials")
    print("         x is active, o is the other slot")
    return 0


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
    path = RealDisk(config.folder).path(slot_file(record.active, slot.main_file))
    model = LocalEngine().load(ModelSource(slot.runtime, path))
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
