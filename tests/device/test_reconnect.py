"""How soon a device comes back after it lost its broker: soon where a connection was good for something, ever later where none was."""

import random

import pytest

from device.effects import WriteChunk
from device.reconnect import RECONNECT_BASE_S, RECONNECT_CAP_S, STABLE_S, Backoff
from protocol.constants import CHUNK_BYTES
from tests.device.harness import DEVICE, TOPICS, Cache, Device

SEEDS = range(200)
SOON_S = 4.0
"""The longest wait after progress that did not last."""


def waits(seed: int, connections: list[tuple[float, bool]]) -> list[float]:
    """Return how long a device waits after each connection, of which is given how long it held and whether it brought anything; 0 s for none."""
    backoff = Backoff(random.Random(seed))
    found = []
    for connected_s, has_progress in connections:
        if has_progress:
            backoff.progressed()
        if connected_s:
            backoff.ended(connected_s)
        found.append(backoff.wait_s())
    return found


def longest(connections: list[tuple[float, bool]]) -> list[float]:
    """Return the longest of each wait; of 200 devices it is near the end of the window."""
    return [max(each) for each in zip(*(waits(seed, connections) for seed in SEEDS), strict=True)]


@pytest.mark.parametrize("short", [(0.0, False), (0.1, False), (STABLE_S, False)])
def test_a_connection_that_carried_nothing_is_tried_less_and_less_often(short: tuple[float, bool]) -> None:
    windows = [min(RECONNECT_BASE_S * 2**attempt, RECONNECT_CAP_S) for attempt in range(12)]
    assert longest([short] * 12) == pytest.approx(windows, rel=0.1)


def test_progress_before_a_cut_makes_the_next_attempt_come_soon() -> None:
    outage = [(0.0, False)] * 10
    assert longest([*outage, (1.0, False)])[-1] > 0.9 * RECONNECT_CAP_S
    assert longest([*outage, (1.0, True)])[-1] <= SOON_S
    # Twice within five seconds, and as often as it likes: each connection brings something.
    assert max(longest([*outage, *[(1.0, True)] * 20])[10:]) <= SOON_S


def test_a_fleet_of_which_everybody_is_served_a_little_and_dropped_stays_spread_out() -> None:
    last = sorted(waits(seed, [(0.2, True)] * 10)[-1] for seed in SEEDS)
    # A window of four seconds, evenly: nowhere is more than twice its share of the fleet.
    for second in range(4):
        assert sum(second <= wait < second + 1 for wait in last) < 2 * len(last) / 4


def test_what_was_brought_once_is_not_counted_twice() -> None:
    after = longest([(1.0, True), *[(1.0, False)] * 10])
    assert after[-1] > 0.9 * RECONNECT_CAP_S


def test_a_connection_that_held_begins_anew() -> None:
    assert longest([*[(0.0, False)] * 10, (STABLE_S + 1, False)])[-1] <= RECONNECT_BASE_S


def test_chunks_that_are_stored_are_progress_and_nothing_else_is() -> None:
    cache = Cache()
    device = Device(cache, b"the first model")
    cache.publish("v2", random.Random(1).randbytes(3 * CHUNK_BYTES))
    device.connect()
    device.settle()
    assert device.progress == 0  # metadata comes with every connection
    device.deliver(TOPICS.desired(DEVICE), cache.desire("v2"))
    device.settle()
    assert device.rows[-1] == "committing committed idle"
    stored = sum(isinstance(effect, WriteChunk) for effect in device.effects)
    assert device.progress == stored > 3
