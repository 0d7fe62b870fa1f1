"""A whole agent as its own process, with a real server and broker: rollouts swap the model while applications ask."""

import http.client
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from device.config import load_config
from server import operations
from server.config import read_config
from server.runtime import Server
from tests.kill.__main__ import FAMILY, Operator
from tests.kill.__main__ import Outcome as Updates
from tests.kill.device import Device
from tests.kill.models import VERSIONS, write_models
from tests.server.brokers import free_port
from tests.swap_load.clients import CLIENTS, Clients, Outcome, Questions

UPDATE_S_MAX: Final = 120.0
HOOK_S_MAX: Final = 20.0


def run(
    folder: Path,
    questions: Questions,
    *,
    count: int,
    swaps: int,
    seed: int,
    requests_per_s: float,
    in_place: bool = False,
    progress: Callable[[str], None] = lambda _text: None,
) -> Outcome:
    """Roll out `swaps` versions, one after the other, while at least `count` requests are made.

    With `in_place` nothing answers while the only copy is rewritten: requests are then refused for now, and that is all that may happen to them.
    """
    home = folder / "server"
    root = operations.init_repository(home, "lab", port=0)
    models = write_models(folder, seed)
    releases = {}
    for version, (model, plan) in models.items():
        questions.learn(version, model)
        file = model.rename(folder / "model.onnx")
        releases[version] = operations.add_release(
            home, FAMILY, version, [file], runtime="onnx", health=plan
        ).release
        file.rename(model)
        operations.publish_release(home, FAMILY, version)
    port = free_port()
    with Server(read_config(home), seed=seed) as server:
        device = Device(folder, server.broker_port, releases, in_place=in_place)
        drop_in = folder / "device.d" / "serving.toml"
        drop_in.parent.mkdir()
        hooked = folder / "hooked"
        hook = ["sh", "-c", f'echo "$WHIMBREL_REASON $WHIMBREL_VERSION" >> {hooked}']
        drop_in.write_text(
            f'[serving]\nlisten = "127.0.0.1:{port}"\n[hooks]\nafter_swap = {json.dumps(hook)}\n'
        )
        assert load_config(folder / "device.toml").serving is not None
        device.provision(VERSIONS[0], {"model.onnx": models[VERSIONS[0]][0]}, root)
        updates = Updates()
        operator = Operator(home, device, updates)
        device.start()
        try:
            assert device.wait_for(lambda: _answers(port), UPDATE_S_MAX), _said(device)
            clients = Clients(("127.0.0.1", port), FAMILY, questions, seed, pause_s=CLIENTS / requests_per_s)
            try:
                _roll_out(device, operator, updates, clients, count, swaps, progress)
            finally:
                outcome = clients.stop()
            device.wait_for(lambda: len(_lines(hooked)) > updates.updates, HOOK_S_MAX)
            code = device.stop()
        finally:
            device.close()
    outcome.swaps = updates.updates
    outcome.may_refuse = in_place
    outcome.problems += updates.violations
    told = _lines(hooked)
    if told != _expected(max(len(told), updates.updates + 1)):  # one more may be under way
        outcome.problems.append(f"the hook was told of {told}")
    if code != 0:
        outcome.problems.append(f"asked to end, the agent left with {code}")
    return outcome


def _roll_out(
    device: Device,
    operator: Operator,
    updates: Updates,
    clients: Clients,
    count: int,
    swaps: int,
    progress: Callable[[str], None],
) -> None:
    seen, until_s = 0, time.monotonic() + UPDATE_S_MAX
    while updates.updates < swaps or clients.asked < count:
        if updates.updates < swaps:
            operator.look()
        device.wait_for(lambda: False, 0.05)
        if updates.updates > seen:
            seen, until_s = updates.updates, time.monotonic() + UPDATE_S_MAX
            progress(f"{seen} of {swaps} swaps, {clients.asked} requests")
        if updates.violations or not device.is_running or time.monotonic() > until_s:
            updates.violations.append(f"updates do not come through: {_said(device)}")
            return


def _expected(count: int) -> list[str]:
    """What the hook is told of: the start, and the versions that the operator brings, in their order."""
    swaps = [f"swap {VERSIONS[number % len(VERSIONS)]}" for number in range(1, count)]
    return [f"start {VERSIONS[0]}", *swaps]


def _lines(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.exists() else []


def _answers(port: int) -> bool:
    """Whether a model answers."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def _said(device: Device) -> str:
    """The last lines of the agent's log."""
    lines = device.log.read_text("utf-8", "replace").splitlines() if device.log.exists() else []
    return " | ".join(lines[-3:])
