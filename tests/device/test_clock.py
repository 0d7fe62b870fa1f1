"""When a machine's clock is to be believed, and what the time is where it is not (SPEC 8.5)."""

from pathlib import Path

import pytest

from device.adapters import clock
from device.adapters.clock import SystemClock, is_clock_set, system_rng
from device.timekeeping import CLOCK_BEHIND_MS_MAX, CLOCK_MS_MIN, Timekeeping

NOW_MS = 1_800_000_000_000


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A board whose kernel knows of no reference, with a clock that did not set the time."""
    monkeypatch.setattr(clock, "_is_synchronized", lambda: False)
    rtc = tmp_path / "sys/class/rtc/rtc0"
    rtc.mkdir(parents=True)
    (rtc / "hctosys").write_text("0\n")
    return tmp_path


def test_a_board_whose_clock_nobody_has_set_says_so(machine: Path) -> None:
    assert not is_clock_set(machine)
    assert not is_clock_set(machine / "nothing")


def test_the_network_or_a_clock_with_a_battery_sets_it(machine: Path) -> None:
    (machine / "sys/class/rtc/rtc0/hctosys").write_text("1\n")
    assert is_clock_set(machine)
    (machine / "sys/class/rtc/rtc0/hctosys").write_bytes(b"\xff")
    assert not is_clock_set(machine)
    (machine / "run/systemd/timesync").mkdir(parents=True)
    (machine / "run/systemd/timesync/synchronized").touch()
    assert is_clock_set(machine)


def test_asking_the_kernel_changes_nothing_and_says_yes_or_no() -> None:
    before_ms = SystemClock().now_ms()
    assert is_clock_set() in {True, False}
    assert 0 <= SystemClock().now_ms() - before_ms < 60_000


def test_numbers_that_are_used_once_differ() -> None:
    rng = system_rng()
    assert len({rng.randbytes(16) for _ in range(100)}) == 100


def test_a_right_clock_counts_and_is_never_before_what_was_signed() -> None:
    time = Timekeeping(is_clock_set=True)
    assert time.time_ms(NOW_MS, 0) == NOW_MS
    assert time.time_ms(NOW_MS, NOW_MS + 5) == NOW_MS + 5
    assert not time.is_clock_right(NOW_MS, NOW_MS + CLOCK_BEHIND_MS_MAX + 1)
    assert not time.is_clock_right(CLOCK_MS_MIN - 1, 0)


def test_a_wrong_clock_only_counts_what_passes_since_somebody_has_said_the_time() -> None:
    time = Timekeeping(is_clock_set=False)
    assert time.time_ms(NOW_MS, NOW_MS) is None
    time.attested(NOW_MS, 1_000)
    assert time.time_ms(1_000, 0) == NOW_MS
    assert time.time_ms(4_000, 0) == NOW_MS + 3_000
    assert time.time_ms(4_000, NOW_MS + 9_000) == NOW_MS + 9_000
