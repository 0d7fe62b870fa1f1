"""`make crash-points` at a reduced count, and with defects that it has to find."""

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from device import rewriting
from device.states import State
from device.update import Update as Updating
from tests.crash_points.__main__ import main, summary
from tests.crash_points.campaign import Campaign, Place, shares
from tests.crash_points.disk import CrashDisk
from tests.crash_points.updates import UPDATES, small_steps

COUNT = 3_000
SECOND = 600


@pytest.fixture(autouse=True)
def _small() -> Iterator[None]:
    with small_steps():
        yield


@pytest.mark.parametrize("in_place", [False, True], ids=["two slots", "in place"])
def test_no_power_cut_leaves_a_device_without_a_verified_model_or_with_less_than_it_knew(
    in_place: bool,
) -> None:
    names = [name for name, update in UPDATES.items() if update.is_in_place is in_place]
    count = COUNT // (4 if in_place else 1)
    campaign = Campaign(1, names)
    tally = campaign.run(count, count // 5, workers=1)
    assert not tally.violation_count, summary(campaign, tally, 0)
    assert tally.images >= count
    assert tally.second_images >= count // 5
    assert len(tally.seen) > tally.images // 4
    assert tally.finished > 50
    assert set(tally.updates) == set(names)


# --- defects -------------------------------------------------------------------------------------------------------


def no_file_sync(patch: pytest.MonkeyPatch) -> None:
    """What was written is never synced."""
    patch.setattr(CrashDisk, "sync", lambda *_: None)


def no_folder_sync(patch: pytest.MonkeyPatch) -> None:
    """A new name is not made durable."""
    patch.setattr(CrashDisk, "_sync_folder", lambda *_: None)


def one_copy(patch: pytest.MonkeyPatch) -> None:
    """The record is written over itself."""
    patch.setattr("device.journal._COPIES", ("record.0", "record.0"))


def unsynced_record(patch: pytest.MonkeyPatch) -> None:
    """Nobody waits until the record is durable."""
    sync = CrashDisk.sync
    patch.setattr(CrashDisk, "sync", lambda disk, name: name.startswith("record") or sync(disk, name))


def unsynced_slot(patch: pytest.MonkeyPatch) -> None:
    """What a delta gave is not synced before the checkpoint says that it is there."""
    sync = CrashDisk.sync
    patch.setattr(CrashDisk, "sync", lambda disk, name: name.startswith("slots") or sync(disk, name))


def untidy(patch: pytest.MonkeyPatch) -> None:
    """What a power cut brought back stays."""
    resume = Updating.resume_after_boot

    def resume_only(update: Updating) -> None:
        if update._desk.state not in {State.IDLE, State.ROLLED_BACK}:
            resume(update)

    patch.setattr(Updating, "resume_after_boot", resume_only)


def leftovers(patch: pytest.MonkeyPatch) -> None:
    """Journals that no manifest names stay."""
    patch.setattr(rewriting, "remove_leftovers", lambda _: None)


def moved_before_written_down(patch: pytest.MonkeyPatch) -> None:
    """A file moves out of the active slot although no manifest says durably that it did."""
    save = rewriting._save

    def lazy(disk: Any, manifest: rewriting.Manifest) -> None:
        save(_Lazy(disk), manifest)

    patch.setattr(rewriting, "_save", lazy)


class _Lazy:
    """A disk on which a rename is not made durable."""

    def __init__(self, disk: CrashDisk) -> None:
        self._disk = disk

    def __getattr__(self, name: str) -> Any:
        return getattr(self._disk, name)

    def replace(self, source: str, target: str) -> None:
        self._disk._rename(source, target)


@pytest.mark.parametrize(
    ("plant", "update", "found"),
    [
        (no_file_sync, "whole", "does not start"),
        (no_folder_sync, "whole", "does not start"),
        (one_copy, "whole", "does not start"),
        (unsynced_record, "delta", "went back|was forgotten"),
        (unsynced_slot, "delta", "no model answers"),
        (untidy, "rollback", "slots/.* is garbage"),
        (leftovers, "in-place-replaced", "inplace/.* is garbage"),
        (moved_before_written_down, "in-place", "no model answers"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_planted_defect_is_found_and_its_place_replays_it(
    monkeypatch: pytest.MonkeyPatch, plant: Callable[[pytest.MonkeyPatch], None], update: str, found: str
) -> None:
    plant(monkeypatch)
    campaign = Campaign(1, [update])
    tally = campaign.run(1_000, 0, workers=1)
    place = next(place for place, _, wrong in tally.violations if re.search(found, wrong))
    again = campaign.replay(Place.parse(str(place)))
    assert any(re.search(found, wrong) for _, _, wrong in again.violations), f"{place} does not replay"


# --- the work ------------------------------------------------------------------------------------------------------


def test_images_are_dealt_out_alike_and_nobody_gets_more_than_there_are() -> None:
    assert shares([1, 5, 1000, 1000], 106) == [1, 5, 50, 50]
    assert shares([1, 2], 100) == [1, 2]
    assert shares([1000, 1000], 110, [1.0, 0.1]) == [100, 10]


def test_workers_find_what_one_process_finds() -> None:
    alone, together = (Campaign(3, ["offline"]).run(400, 80, workers) for workers in (1, 2))
    assert (alone.images, alone.second_images) == (together.images, together.second_images)
    assert (alone.states, alone.calls) == (together.states, together.calls)
    assert (len(alone.seen), len(alone.second_seen)) == (len(together.seen), len(together.second_seen))


def test_the_command_prints_its_figures_and_replays_a_place(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--count", "300", "--second", "50", "--update", "withdrawn"]
    assert main(arguments) == 0
    assert re.search(r"crash images +3\d\d\n", capsys.readouterr().out)
    assert main([*arguments, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["violation_count"] == 0
    assert figures["images_distinct"] <= figures["images"]
    for place in ("withdrawn/40/1", "withdrawn/40/1/7/0"):
        assert main(["--replay", place]) == 0
        assert "nothing is wrong" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "nothing/1/2", "whole/1", "whole/1/2/3", "whole/a/b"])
def test_a_place_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        Place.parse(text)
