"""A live run from beginning to end: a fleet is brought up, gets a good release, then a bad one, and is judged."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from rich.console import Console

from protocol.errors import RequestError, StorageError
from server import operations
from server.runtime import Server
from simulator.live.brokers import broker_setting
from simulator.live.display import Display, shown
from simulator.live.fleet import Fleet
from simulator.live.models import Models, build_digits, load_models
from simulator.live.observer import Observer
from simulator.live.options import Options
from simulator.live.population import make_population
from simulator.live.server import running_server
from simulator.live.world import FLEET_NAME, World, publish
from simulator.report.record import Run

SERVER_FOLDER: Final = "server"


def run_live(options: Options, console: Console) -> Run:
    """Run and judge.

    Args:
        options: What was asked for.
        console: Takes the progress.

    Raises:
        WhimbrelError: Something needed is missing or gave up; everything that was started has been stopped.
    """
    plans = make_population(options.devices, options.seed)
    observer = Observer()
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(_workplace(options))
        world = World(options, observer, folder / SERVER_FOLDER)
        title = f"Whimbrel: {options.devices} devices, seed {options.seed}, broker {options.broker}"
        display, refresh = stack.enter_context(shown(observer, world.progress, title, console))
        world.refresh = refresh
        setting = stack.enter_context(broker_setting(options.broker, folder))
        models = _models(options, folder, display)
        server = stack.enter_context(_server(folder / SERVER_FOLDER, setting, models))
        fleet = Fleet(plans, folder / "devices", server.broker_address, models, observer, world.on_lost)
        stack.callback(fleet.stop)
        world.enter(models, server, fleet)
        stack.callback(world.saboteur.stop)
        world.bring_up()
        world.roll_out_good()
        world.roll_out_bad()
        world.collect()
    return world.judge()


@contextlib.contextmanager
def _workplace(options: Options) -> Iterator[Path]:
    if options.folder is not None:
        folder = options.folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if any(folder.iterdir()):
                raise RequestError(f"{folder} is not empty", hint="choose another --dir")
        except OSError as error:
            raise StorageError(f"{folder}: {error.strerror}", hint="choose another --dir") from error
        yield folder
        return
    folder = Path(tempfile.mkdtemp(prefix="whimbrel-"))
    try:
        yield folder
    finally:
        if not options.keep:
            shutil.rmtree(folder, ignore_errors=True)


def _models(options: Options, folder: Path, display: Display) -> Models:
    if options.models is not None:
        return load_models(options.models, options.kind)
    if options.kind != "digits":
        raise RequestError("--llm needs --models DIR", hint="run `make demo-llm`, which builds them")
    display.tell("Training and quantizing three versions of a digit classifier")
    target = folder / "models"
    build_digits(target, options.seed, display.tell)
    return load_models(target, options.kind)


@contextlib.contextmanager
def _server(folder: Path, setting: str, models: Models) -> Iterator[Server]:
    operations.init_repository(folder, FLEET_NAME, broker=setting, port=0)
    publish(folder, models, "v1")
    with running_server(folder) as server:
        yield server
