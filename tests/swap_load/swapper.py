"""A device's executor, its slots on a real disk and the endpoint, swapped again and again while applications ask."""

import shutil
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from device import effects, events
from device.adapters.disk import RealDisk
from device.adapters.endpoint import Endpoint
from device.adapters.engines import LocalEngine
from device.adapters.workers import WorkerPool
from device.executor import Executor
from device.leases import Lease, Leases
from device.ports import Model
from device.slots import SlotName, slot_file
from protocol.release import RuntimeName
from tests.swap_load.clients import Clients, Outcome, Questions

FAMILY: Final = "swapped"
SWAP_S_MAX: Final = 60.0


class CountingLeases(Leases):
    """Counts the swaps at which somebody used the model that went: only those show anything."""

    swaps_in_use = 0

    def swap(self, model: Model, version: str) -> bool:
        is_used = super().swap(model, version)
        self.swaps_in_use += is_used
        return is_used


class UnsafeClosingLeases(CountingLeases):
    """Closes a model under those who use it."""

    def swap(self, model: Model, version: str) -> bool:
        before = self.model
        is_used = super().swap(model, version)
        if before is not None:
            before.close()
        return is_used


class UnsafeFollowingLease(Lease):
    """Changes to another model in the middle of a request."""

    @property
    def model(self) -> Model:
        return self._leases.model or super().model


class UnsafeFollowingLeases(CountingLeases):
    """What a request that asks for "the" model again and again would be."""

    def lease(self) -> Lease:
        return UnsafeFollowingLease(self, super().lease()._held)


class _NoTransport:
    """A transport without a connection: what is sent is dropped."""

    def subscribe(self, filters: tuple[str, ...], qos: int) -> None:
        del filters, qos

    def unsubscribe(self, filters: tuple[str, ...]) -> None:
        del filters

    def publish(self, topic: str, payload: bytes, qos: int, *, retain: bool) -> None:
        del topic, payload, qos, retain

    def progressed(self) -> None:
        pass


class Swapper:
    """The device; versions are numbers, the n-th of them is the n-th model, round and round."""

    def __init__(
        self, folder: Path, runtime: RuntimeName, models: Sequence[Path], leases: CountingLeases
    ) -> None:
        self.generation = -1
        self._runtime: RuntimeName = runtime
        self._models = models
        self._disk = RealDisk(folder)
        self._disk.prepare()
        self._pool = WorkerPool(threads=1)
        self._answered = threading.Event()
        self._answer: events.Event | None = None
        self.executor = Executor(
            disk=self._disk,
            transport=_NoTransport(),
            engine=LocalEngine(),
            workers=self._pool.for_device(self._failed),
            post=self._posted,
            leases=leases,
        )
        self.swap()
        self.endpoint = Endpoint(("127.0.0.1", 0), FAMILY, leases)
        host, _, port = self.endpoint.address.rpartition(":")
        self.address = (host, int(port))

    def swap(self) -> None:
        """What an update does to the model that answers: another slot is filled, loaded, and pointed to."""
        number = self.generation + 1
        slot = (SlotName.A, SlotName.B)[number % 2]
        self.executor.run((effects.EmptySlot(slot),))
        self._barrier()
        target = Path(self._disk.path(slot_file(slot, "model")))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self._models[number % len(self._models)], target)
        self._answered.clear()
        self.executor.run((effects.Serve(number + 1, slot, self._runtime, "model", str(number)),))
        assert self._answered.wait(SWAP_S_MAX), "the swap does not end"
        assert self._answer == events.ServingStarted(number + 1), self._answer
        self.generation = number
        self.executor.run((effects.PointCurrent(slot),))

    def close(self) -> None:
        self.endpoint.close()
        self.executor.close()
        self._pool.close()
        self._disk.close()

    def _barrier(self) -> None:
        """Long effects are done one after the other: wait for those so far."""
        done = threading.Event()
        self.executor._workers.submit(done.set)
        assert done.wait(SWAP_S_MAX)

    def _posted(self, event: events.Event) -> None:
        self._answer = event
        self._answered.set()

    def _failed(self, error: Exception) -> None:
        raise error


def run(
    folder: Path,
    runtime: RuntimeName,
    models: Sequence[Path],
    questions: Questions,
    *,
    count: int,
    swaps: int,
    seed: int,
    leases: CountingLeases | None = None,
    progress: Callable[[str], None] = lambda _text: None,
) -> Outcome:
    """Swap `swaps` times, evenly spread over `count` requests."""
    leases = leases or CountingLeases()
    for number in range(swaps + 1):
        if number < len(models):
            questions.learn(str(number), models[number])
    swapper = Swapper(folder, runtime, models, leases)
    clients = Clients(
        swapper.address,
        FAMILY,
        _RoundAndRound(questions, len(models)),
        seed,
        generation=lambda: swapper.generation,
    )
    try:
        for number in range(1, swaps + 1):
            while clients.asked < count * number // (swaps + 1):
                time.sleep(0.002)
            swapper.swap()
            progress(f"{number} of {swaps} swaps, {clients.asked} requests")
        while clients.asked < count:
            time.sleep(0.002)
    finally:
        outcome = clients.stop()
        swapper.close()
    outcome.swaps = swapper.generation
    outcome.swaps_in_use = leases.swaps_in_use
    return outcome


class _RoundAndRound:
    """Questions for versions that are numbers."""

    def __init__(self, questions: Questions, models: int) -> None:
        self._models = models
        self.learn = questions.learn
        self.draw = questions.draw
        self.read = questions.read
        self._expected = questions.expected

    def expected(self, version: str, key: object) -> object:
        return self._expected(str(int(version) % self._models), key)
