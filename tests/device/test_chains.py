"""Updates by several deltas, one after the other: real deltas, the real agent, a disk that forgets."""

import random
from collections import Counter

import pytest

from device import decoding, effects
from device.admission import MissingArtifactError, check_disk, plan_items, plan_update
from device.config import AgentConfig
from device.journal import InstallItem
from device.states import State
from protocol.chunks import build_tree
from protocol.delta.format import Profile
from protocol.ids import Digest, digest_of
from protocol.release import delta_target, file_target
from simulator.power import PowerCutError
from tests.device.harness import (
    DEVICE,
    FAMILY,
    FLEET,
    TOPICS,
    Cache,
    Device,
    fine_tuned,
    model_bytes,
)

V1 = model_bytes(1)
V2 = fine_tuned(V1, 2)
V3 = fine_tuned(V2, 3)
V4 = fine_tuned(V3, 4)
VERSIONS = {"v1": V1, "v2": V2, "v3": V3, "v4": V4}


@pytest.fixture(autouse=True)
def _short_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several checkpoints in each delta."""
    monkeypatch.setattr(decoding, "STEP_BYTES", 512 << 10)


@pytest.fixture
def cache() -> Cache:
    """Four versions and the deltas between neighbours."""
    cache = Cache()
    for version, model in VERSIONS.items():
        cache.publish(version, model)
    for base, result in ((V1, V2), (V2, V3), (V3, V4)):
        cache.publish_delta(base, result)
    return cache


def online(cache: Cache, config: dict[str, object] | None = None) -> Device:
    device = Device(cache, V1, config=config)
    device.connect()
    device.settle()
    return device


def ask(device: Device, version: str, *, sequence: int | None = None) -> None:
    device.deliver(TOPICS.desired(DEVICE), device.cache.desire(version, sequence=sequence))


def fetched(device: Device) -> set[str]:
    return {effect.blob for effect in device.effects if isinstance(effect, effects.WriteChunk)}


def planned(device: Device) -> InstallItem:
    (item,) = next(
        effect.record.update.items
        for effect in device.effects
        if isinstance(effect, effects.Persist) and effect.record.update and effect.record.update.items
    )
    return item


def config(**changes: object) -> AgentConfig:
    fields: dict[str, object] = {"device": DEVICE, "fleet": FLEET, "family": FAMILY}
    return AgentConfig(**{**fields, **changes})  # type: ignore[arg-type]  # a test's keyword arguments


def test_an_old_device_gets_to_the_newest_version_over_the_ones_between(cache: Cache) -> None:
    device = online(cache)
    ask(device, "v4")
    device.settle()
    assert device.answer() == digest_of(V4)
    assert not fetched(device) & {digest_of(model) for model in VERSIONS.values()}, "a whole file was fetched"
    assert [link.sha256 for link in planned(device).links] == [digest_of(each) for each in (V2, V3, V4)]
    update = device.reports[-1].update
    assert update is not None
    assert (update.outcome, update.redundant_chunks) == ("committed", 0)
    assert update.transfer_bytes_total < len(V4) / 20
    assert device.disk.names("blobs") == []
    assert device.disk.names("slots/b") == ["slots/b/model.onnx"]


def test_the_direct_delta_is_taken_once_there_is_one(cache: Cache) -> None:
    direct = cache.publish_delta(V1, V4)
    device = online(cache)
    ask(device, "v4")
    device.settle()
    assert device.answer() == digest_of(V4)
    assert planned(device).blob == direct
    assert planned(device).earlier == ()


def test_a_device_with_a_fast_link_and_a_slow_processor_takes_the_fast_profile(cache: Cache) -> None:
    fast = cache.publish_delta(V1, V2, profile=Profile.FAST)
    device = online(cache, {"link_bytes_per_s": 100_000, "processor_percent": 10})
    ask(device, "v2")
    device.settle()
    assert device.answer() == digest_of(V2)
    assert planned(device).blob == fast


def test_a_report_says_what_the_device_can_spend(cache: Cache) -> None:
    device = online(cache, {"link_bytes_per_s": 5_000, "processor_percent": 25})
    capacity = device.reports[-1].capacity
    assert capacity is not None
    assert (capacity.link_bytes_per_s, capacity.processor_percent, capacity.links_max) == (5_000, 25, 4)
    assert capacity.delta_memory_bytes == 128 << 20


def test_a_chain_of_which_one_delta_needs_too_much_memory_is_not_taken(cache: Cache) -> None:
    device = online(cache, {"delta_memory_bytes_max": 1 << 20})
    ask(device, "v4")
    device.settle()
    assert device.answer() == digest_of(V4)
    assert planned(device).action == "full"


def test_files_on_the_way_go_as_soon_as_the_next_is_made(cache: Cache) -> None:
    device = online(cache)
    ask(device, "v4")
    most = 0

    def watch() -> bool:
        nonlocal most
        most = max(most, len([name for name in device.disk.names("blobs") if "intermediate" in name]))
        return False

    device.settle(until=watch)
    assert most == 2  # the one that is read and the one that is written
    assert device.answer() == digest_of(V4)


def test_the_room_that_admission_counts_is_what_a_chain_takes_and_without_it_the_whole_file_comes(
    cache: Cache,
) -> None:
    """Finds by trial how little room a chain takes, and compares it with what admission counts."""
    device = online(cache, {"disk_reserve_bytes": 0})
    ask(device, "v4", sequence=1)
    least = device.disk.free_bytes()

    def watch() -> bool:
        nonlocal least
        least = min(least, device.disk.free_bytes())
        return False

    before = device.disk.free_bytes()
    device.settle(until=watch)
    used = before - least
    items = (planned(device),)
    check_disk(items, used + (1 << 20), config(disk_reserve_bytes=0))
    needed = 2 * len(V4) + sum(link.blob_length for link in items[0].links)
    assert abs(needed - used) < 64 << 10  # the checkpoint and records are in the slack
    again = Device(cache, V1, config={"disk_reserve_bytes": 0})
    again.disk.capacity_bytes -= again.disk.free_bytes() - needed
    again.connect()
    again.settle()
    assert planned(again).action == "full", "there was no room for the chain, and there was for the file"
    assert again.answer() == digest_of(V4)


def test_without_room_for_any_way_the_update_is_refused_before_its_first_byte(cache: Cache) -> None:
    device = online(cache)
    device.disk.capacity_bytes -= device.disk.free_bytes() - len(V4)
    ask(device, "v4")
    device.settle()
    update = device.reports[-1].update
    assert update is not None
    assert (update.outcome, update.code) == ("rejected", "admission.disk")
    assert device.state is State.REJECTED


def test_a_power_cut_at_any_effect_of_a_chain_costs_no_chunk_and_leads_to_the_new_version(
    cache: Cache,
) -> None:
    """Cuts the power before every single effect, with unsynced data kept, lost or torn."""
    reference = online(cache)
    ask(reference, "v3", sequence=1)
    reference.settle()
    count = len(reference.effects)
    steps = sum(isinstance(effect, effects.InstallStep) for effect in reference.effects)
    assert steps > 5
    whole = {digest_of(model) for model in VERSIONS.values()}
    for cut_at in range(count):
        device = Device(cache, V1, seed=cut_at)
        device.cut_at = cut_at
        try:
            device.connect()
            device.settle()
        except PowerCutError:
            device.disk.crash(random.Random(cut_at))
            device.cut_at = None
            device.boot()
            device.settle()
            assert device.answer() in {digest_of(V1), digest_of(V3)}, f"cut at {cut_at}"
            device.connect()
            device.settle()
        assert device.answer() == digest_of(V3), f"cut at {cut_at}: {device.rows}"
        assert not fetched(device) & whole, f"cut at {cut_at}: fell back to whole files"
        assert not [name for name in device.disk.names("blobs") if "intermediate" in name]


def test_a_power_cut_within_a_step_repeats_the_step_and_nothing_else(cache: Cache) -> None:
    """Cuts the power at every single operation of the disk while a chain is installed."""
    cache.desire("v3")
    cut_at = 0
    while True:
        device = Device(cache, V1)
        device.connect()
        device.settle(until=lambda device=device: device.state is State.INSTALLING)  # type: ignore[misc]  # bound now
        written = Counter(
            (effect.blob, effect.index) for effect in device.effects if isinstance(effect, effects.WriteChunk)
        )
        device.disk.operations_left = cut_at
        try:
            device.settle()
        except PowerCutError:
            device.disk.operations_left = None
            device.disk.crash(random.Random(cut_at))
            device.boot()
            device.connect()
            device.settle()
            assert device.answer() == digest_of(V3), f"cut at {cut_at}: {device.rows}"
            after = Counter(
                (effect.blob, effect.index)
                for effect in device.effects
                if isinstance(effect, effects.WriteChunk)
            )
            assert after == written, f"cut at {cut_at}: a chunk came again"
            cut_at += 1
            continue
        assert cut_at > 40
        return


def test_a_delta_that_is_not_what_its_signed_name_says_leads_to_whole_files(cache: Cache) -> None:
    liar = cache.files[digest_of(V2)][:-1] + b"?"
    cache.publish_delta(V2, V3, patch=_patch(V2, liar))
    device = online(cache)
    ask(device, "v3")
    device.settle()
    assert device.answer() == digest_of(V3)
    assert digest_of(V3) in fetched(device)
    assert "installing delta_unusable syncing" in device.rows
    assert "patch.invalid" in {report.update.code for report in device.reports if report.update is not None}


def test_a_file_on_the_way_that_the_disk_damaged_is_noticed_before_the_next_delta(cache: Cache) -> None:
    device = online(cache)
    ask(device, "v3")
    device.settle(until=lambda: any("intermediate" in name for name in device.disk.names("blobs")))
    (name,) = [name for name in device.disk.names("blobs") if "intermediate" in name]
    device.disk.write(name, 1000, b"rot")
    device.settle()
    assert device.answer() == digest_of(V3)
    assert digest_of(V3) in fetched(device)
    assert "patch.invalid" in {report.update.code for report in device.reports if report.update is not None}


def test_a_disk_that_fails_for_a_moment_while_installing_costs_the_installation_and_no_chunk(
    cache: Cache,
) -> None:
    device = online(cache)
    ask(device, "v3")
    steps = 0

    def third_step() -> bool:
        nonlocal steps
        steps += isinstance(device.effects[-1], effects.InstallStep)
        return steps >= 3

    device.settle(until=third_step)
    device.disk.is_read_only = True
    device.settle(until=lambda: device.state is State.FAILED)
    device.disk.is_read_only = False
    device.settle()
    assert device.answer() == digest_of(V3)
    stored = Counter(
        (effect.blob, effect.index) for effect in device.effects if isinstance(effect, effects.WriteChunk)
    )
    deltas = {Digest(link.blob) for link in planned(device).links}
    assert {stored[blob, 0] for blob in deltas} == {1}  # the description is read again with the metadata
    assert not fetched(device) & {digest_of(model) for model in VERSIONS.values()}


def test_a_chain_may_begin_with_a_whole_file_where_that_is_cheaper(cache: Cache) -> None:
    small = model_bytes(9, 100_000)
    large = small + b"\0" * 3_000_000
    cache.publish("s", small)
    cache.publish("l", large)
    cache.publish_delta(small, large)
    device = online(cache)
    ask(device, "l")
    device.settle()
    assert device.answer() == digest_of(large)
    assert digest_of(small) in fetched(device)
    assert digest_of(large) not in fetched(device)
    assert device.disk.names("slots/b") == ["slots/b/model.onnx"]


def test_a_target_that_was_retired_is_no_way_any_more(cache: Cache) -> None:
    cache.retire(delta_target(digest_of(V2), digest_of(V3)))
    device = online(cache)
    ask(device, "v4")
    device.settle()
    assert device.answer() == digest_of(V4)
    assert planned(device).action == "full"


def test_planning_says_when_nothing_signed_leads_to_a_file(cache: Cache) -> None:
    cache.retire(file_target(digest_of(V4)))
    release = cache.publish("v5", V4)
    cache.retire(file_target(digest_of(V4)))
    targets = cache.publisher.checked(cache.repository, 1_700_000_000_000).targets
    items = plan_items(release, targets, {"model.onnx": digest_of(V1)}, config(), links_max=4)
    assert [link.sha256 for link in items[0].links] == [digest_of(each) for each in (V2, V3, V4)]
    with pytest.raises(MissingArtifactError):
        plan_update(
            release, targets, {"model.onnx": digest_of(V1)}, config(), available_bytes=1 << 40, full_only=True
        )


def test_a_plan_without_chains_needs_what_it_needed_before() -> None:
    tree = build_tree([])[0]
    full = InstallItem(
        name="a",
        sha256=digest_of(V1),
        length=5_000_000,
        action="full",
        blob="x",
        blob_length=5_000_000,
        tree=tree,
    )
    with pytest.raises(Exception, match="update needs 6048576 bytes"):
        check_disk((full,), 0, config(disk_reserve_bytes=0))


def _patch(base: bytes, result: bytes) -> bytes:
    other = Cache()
    name = other.publish_delta(base, result)
    (chunk,) = [payload for topic, payload in other.retained.items() if f"/{name}." in topic]
    return chunk[40:]
