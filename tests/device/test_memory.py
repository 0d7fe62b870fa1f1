"""What is in memory at a time during an update, and what is refused because of it."""

import json

import pytest

from device.admission import MemoryBudgetError, Running, check_memory, check_release_fits
from device.config import AgentConfig
from device.journal import Record
from device.slots import SlotName
from device.states import State
from protocol.constants import CHUNK_BYTES
from protocol.ids import digest_of
from protocol.messages import UpdateReport
from protocol.release import Release, ReleaseFile, Resources, delta_target
from tests.device.harness import (
    DEVICE,
    FAMILY,
    FLEET,
    TOPICS,
    Cache,
    Device,
    fine_tuned,
    good_evidence,
    health,
    model_bytes,
)

MB = 1 << 20
V1 = model_bytes(1, 4 * CHUNK_BYTES)
V2 = fine_tuned(V1, 2)


def release(memory_mb: int, weights_mb: int = 50) -> Release:
    return Release(
        family=FAMILY,
        version="v2",
        runtime="llama",
        runtime_version_min="0.1",
        files=[ReleaseFile(name="m.gguf", length=weights_mb * MB, sha256="0" * 64)],
        resources=Resources(memory_bytes=memory_mb * MB),
        health=health(),
    )


def config(**changes: object) -> AgentConfig:
    fields: dict[str, object] = {"device": DEVICE, "fleet": FLEET, "family": FAMILY}
    return AgentConfig(**{**fields, **changes})  # type: ignore[arg-type]  # a test's keyword arguments


@pytest.mark.parametrize(("total_mb", "decoder_mb"), [(150, 80), (198, 128), (400, 128)])
def test_a_decoder_gets_what_the_version_that_answers_leaves(total_mb: int, decoder_mb: int) -> None:
    limits = config(memory_total_bytes_max=total_mb * MB)
    assert check_memory(release(80), Running("v1", 70 * MB), limits, 1 << 40) == decoder_mb * MB


def test_two_versions_that_do_not_fit_beside_each_other_are_refused_with_their_parts() -> None:
    limits = config(memory_total_bytes_max=150 * MB - 1)
    with pytest.raises(MemoryBudgetError) as caught:
        check_memory(release(80), Running("v1", 70 * MB), limits, 1 << 40)
    assert caught.value.message == (
        "v2 needs 80.0 MB of memory (50.0 MB of weights, 30.0 MB of caches and runtime) beside 70.0 MB for v1, "
        "which answers until then, this device gives 150.0 MB to all together"
    )
    assert caught.value.code == "admission.memory"


def test_the_machine_bounds_what_the_configuration_gives() -> None:
    limits = config(memory_total_bytes_max=1 << 40)
    with pytest.raises(MemoryBudgetError, match=r"gives 100.0 MB to all together"):
        check_memory(release(80), Running("v1", 70 * MB), limits, 100 * MB)


def test_nothing_answers_while_a_device_updates_in_place() -> None:
    limits = config(memory_total_bytes_max=90 * MB, is_in_place=True)
    assert check_memory(release(80), Running("v1", 70 * MB), limits, 1 << 40) == 90 * MB
    with pytest.raises(MemoryBudgetError, match=r"runtime\), this device gives 90.0 MB"):
        check_memory(release(91), Running("v1", 70 * MB), limits, 1 << 40)


def test_a_release_that_says_nothing_counts_with_its_files() -> None:
    limits = config(memory_total_bytes_max=119 * MB)
    with pytest.raises(MemoryBudgetError, match=r"needs 50.0 MB of memory \(its files; it does not say"):
        check_memory(release(0), Running("v1", 70 * MB), limits, 1 << 40)


def test_without_a_total_only_the_model_itself_counts_and_its_refusal_names_the_parts() -> None:
    assert check_memory(release(800), Running("v1", 700 * MB), config(), 1) == 128 * MB
    with pytest.raises(MemoryBudgetError) as caught:
        check_release_fits(release(80), config(memory_bytes_max=70 * MB), {"llama": "0.3.1"})
    assert caught.value.message == (
        "model needs 80.0 MB of memory (50.0 MB of weights, 30.0 MB of caches and runtime), "
        "this device gives 70.0 MB to a model"
    )


# --- an agent ----------------------------------------------------------------------------------------------


@pytest.fixture
def cache() -> Cache:
    cache = Cache()
    cache.publish("v1", V1)
    cache.publish("v2", V2)
    cache.publish(
        "v3", model_bytes(3, 2 * CHUNK_BYTES), changes={"resources": Resources(memory_bytes=5 * MB)}
    )
    return cache


def updated(cache: Cache, version: str, **config: object) -> Device:
    device = Device(cache, V1, config=config)
    device.connect()
    want(device, version)
    return device


def want(device: Device, version: str) -> None:
    device.settle()
    device.deliver(TOPICS.desired(DEVICE), device.cache.desire(version))
    device.settle()


def last_update(device: Device) -> UpdateReport:
    found = device.reports[-1].update
    assert found is not None
    return found


def actions(record: Record) -> list[str]:
    assert record.update is not None
    return [item.action for item in record.update.items]


def test_a_version_counts_with_what_its_trial_measured(cache: Cache) -> None:
    device = Device(cache, V1, config={"memory_total_bytes_max": 8 * MB})
    device.engine.evidence[digest_of(V2)] = good_evidence(memory_peak_bytes=4 * MB)
    device.connect()
    want(device, "v2")
    assert device.answer() == digest_of(V2)
    assert device.record.slots[SlotName.B].memory_bytes == 4 * MB
    want(device, "v3")
    assert (device.state, device.answer()) == (State.REJECTED, digest_of(V2))
    assert last_update(device).code == "admission.memory"
    assert "v3 needs 5.0 MB of memory" in last_update(device).detail
    assert "beside 4.0 MB for v2" in last_update(device).detail
    assert last_update(device).received_bytes < 10_000  # its description


def test_a_first_version_without_a_record_of_it_counts_with_its_files(cache: Cache) -> None:
    assert updated(cache, "v3", memory_total_bytes_max=5 * MB + len(V1)).state is State.IDLE
    device = updated(cache, "v3", memory_total_bytes_max=5 * MB + len(V1) - 1)
    assert last_update(device).code == "admission.memory"


def test_a_delta_whose_decoder_does_not_fit_beside_the_old_version_gives_way_to_the_whole_file(
    cache: Cache,
) -> None:
    cache.publish_delta(V1, V2)
    signed = json.loads(dict(cache.repository.documents.delegated)["artifacts"])["signed"]["targets"]
    needed = signed[delta_target(digest_of(V1), digest_of(V2))]["custom"]["memory_bytes"]
    assert needed > 1000
    device = updated(cache, "v2", memory_total_bytes_max=len(V1) + needed)
    assert actions(device.record) == ["delta"]
    device = updated(cache, "v2", memory_total_bytes_max=len(V1) + needed - 1)
    assert (actions(device.record), device.answer()) == (["full"], digest_of(V2))
