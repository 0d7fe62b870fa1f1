"""Updates that rewrite the file itself: real deltas, the real agent, a disk that forgets, and power that goes at any operation."""

import copy
import random
from collections import Counter

import msgspec
import pytest

from device import decoding, effects, events, rewriting
from device.admission import DiskBudgetError, NotInPlaceError, check_disk, plan_update
from device.config import AgentConfig
from device.decoding import LocalDecoder, RewriteJob
from device.events import Wish
from device.install import discard_installation
from device.journal import Journal
from device.ports import Disk
from device.slots import SlotHealth, SlotName, slot_file
from device.states import State
from protocol import trust
from protocol.chunks import build_tree
from protocol.delta import undo_journal
from protocol.errors import StorageError
from protocol.ids import Digest, digest_of
from protocol.release import (
    ArtifactCustom,
    InPlaceNeeds,
    Release,
    ReleaseFile,
    Resources,
    delta_target,
    file_target,
)
from protocol.topics import ChunkTopic
from protocol.trust import Target
from simulator.power import PowerCutError
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

IN_PLACE: dict[str, object] = {"is_in_place": True}
MB = 1 << 20


def trained(model: bytes, seed: int, *, header: int = 0) -> bytes:
    """The model with changes everywhere, and more or fewer bytes near its beginning."""
    rng = random.Random(seed)
    changed = bytearray(model)
    for at in range(40_000, len(changed) - 500, 60_000):
        changed[at : at + 400] = rng.randbytes(400)
    if header >= 0:
        return bytes(changed[:1000] + rng.randbytes(header) + changed[1000:])
    return bytes(changed[:1000] + changed[1000 - header :])


V1 = model_bytes(1)
V2 = trained(V1, 2, header=700)
V3 = trained(V2, 3, header=-900)
VOCABULARY = model_bytes(7, 3_000)
MODEL_A, MODEL_B = slot_file(SlotName.A, "model.onnx"), slot_file(SlotName.B, "model.onnx")


@pytest.fixture(autouse=True)
def _short_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several steps in each application, and several answers to the agent."""
    monkeypatch.setattr(undo_journal, "STEP_BYTES", 256 << 10)
    monkeypatch.setattr(decoding, "REWRITE_STEPS", 2)


@pytest.fixture
def cache() -> Cache:
    """Three versions with deltas in place between neighbours; the second brings a file that the third keeps."""
    cache = Cache()
    cache.publish("v1", V1)
    for version, model in (("v2", V2), ("v3", V3)):
        cache.publish("vocabulary", VOCABULARY)  # signs the file
        files = [
            ReleaseFile(name=name, length=len(data), sha256=digest_of(data))
            for name, data in (("model.onnx", model), ("vocabulary.txt", VOCABULARY))
        ]
        cache.publish(version, model, changes={"files": files})
    cache.publish_delta(V1, V2, in_place=True)
    cache.publish_delta(V2, V3, in_place=True)
    return cache


def online(cache: Cache, config: dict[str, object] | None = None) -> Device:
    device = Device(cache, V1, config={**IN_PLACE, **(config or {})})
    device.connect()
    device.settle()
    return device


def ask(device: Device, version: str, *, sequence: int | None = None) -> None:
    device.deliver(TOPICS.desired(DEVICE), device.cache.desire(version, sequence=sequence))


def until_rewriting(device: Device, steps: int = 2) -> None:
    """Up to the middle of an installation."""
    device.settle(until=lambda: _count(device, effects.InstallStep) > steps)
    assert device.state is State.INSTALLING
    assert device.disk.length(MODEL_A) is None


def _count(device: Device, kind: type) -> int:
    return sum(isinstance(effect, kind) for effect in device.effects)


def content(device: Device, name: str) -> bytes:
    return device.disk.read(name, 0, device.disk.length(name) or 0)


def outcome(device: Device) -> tuple[str, str]:
    update = device.reports[-1].update
    assert update is not None
    return update.outcome, update.code


def fetched(device: Device) -> set[str]:
    return {effect.blob for effect in device.effects if isinstance(effect, effects.WriteChunk)}


# --- the path of an update -------------------------------------------------------------------------------------


def test_the_file_itself_becomes_the_new_version_and_nothing_answers_meanwhile(cache: Cache) -> None:
    device = online(cache)
    ask(device, "v2")
    answers: dict[State, bool] = {}

    def note() -> bool:
        answers[device.state] = device.executor.model is not None
        return False

    device.settle(until=note)
    assert device.answer() == digest_of(V2)
    assert outcome(device) == ("committed", "")
    assert digest_of(V2) not in fetched(device)
    assert answers[State.DOWNLOADING]
    assert not answers[State.TRIAL]
    assert content(device, MODEL_B) == V2
    assert device.disk.length(MODEL_A) is None
    assert device.disk.links["current"] == "slots/b"
    assert device.disk.names("blobs") == []


def test_the_next_update_removes_what_led_back_to_the_version_before(cache: Cache) -> None:
    device = online(cache)
    ask(device, "v2")
    device.settle()
    assert rewriting.remains_bytes(device.disk, SlotName.A) > 0
    ask(device, "v3")
    device.settle()
    assert device.answer() == digest_of(V3)
    assert content(device, MODEL_A) == V3
    assert content(device, slot_file(SlotName.A, "vocabulary.txt")) == VOCABULARY
    assert rewriting.remains_bytes(device.disk, SlotName.A) == 0
    assert digest_of(V3) not in fetched(device)


def test_putting_back_is_ordered_once_however_long_it_takes(cache: Cache) -> None:
    device = online(cache)
    device.engine.evidence[digest_of(V2)] = good_evidence(prompts_passed=1)
    ask(device, "v2")
    device.settle(until=lambda: device.state is State.ROLLING_BACK)
    assert len(device.jobs) == 1
    assert device.agent.deadline() is None
    device.settle()
    assert device.answer() == digest_of(V1)


@pytest.mark.parametrize("way", ["trial", "load"])
def test_a_version_that_fails_is_turned_back_into_the_one_before(cache: Cache, way: str) -> None:
    device = online(cache)
    if way == "trial":
        device.engine.evidence[digest_of(V2)] = good_evidence(prompts_passed=1)
    else:
        device.engine.unloadable.add(digest_of(V2))
    ask(device, "v2")
    device.settle()
    assert outcome(device) == ("rolled_back", {"trial": "trial.answers", "load": "engine.failed"}[way])
    assert device.answer() == digest_of(V1)
    assert content(device, MODEL_A) == V1
    assert device.disk.names("slots/b") == []
    assert device.disk.links.get("current", "slots/a") == "slots/a"
    assert device.record.quarantine
    assert rewriting.remains_bytes(device.disk, SlotName.A) == 0


def test_a_committed_version_that_cannot_be_served_later_is_turned_back(cache: Cache) -> None:
    device = online(cache)
    ask(device, "v2")
    device.settle()
    device.engine.unloadable.add(digest_of(V2))
    device.boot()
    device.settle()
    assert device.answer() == digest_of(V1)
    assert content(device, MODEL_A) == V1
    assert device.record.active is SlotName.A
    assert device.record.slots[SlotName.B].health is SlotHealth.BAD


@pytest.mark.parametrize("wish", ["v1", "v3"])
def test_another_wish_while_the_file_is_rewritten_puts_it_back_first(cache: Cache, wish: str) -> None:
    device = online(cache)
    ask(device, "v2")
    until_rewriting(device)
    assert device.executor.model is None
    device.disconnect()
    device.deliver(TOPICS.desired(DEVICE), cache.desire(wish))
    device.settle()
    assert device.answer() == digest_of(V1), (
        "the version before answers while the next wish waits for the network"
    )
    assert content(device, MODEL_A) == V1
    device.connect()
    device.settle()
    assert device.answer() == digest_of({"v1": V1, "v3": V3}[wish])


def test_a_whole_file_is_taken_where_there_is_room_and_no_delta(cache: Cache) -> None:
    device = online(cache)
    ask(device, "v3")
    device.settle()
    assert device.answer() == digest_of(V3)
    assert digest_of(V3) in fetched(device)
    assert content(device, MODEL_A) == V1, "with room for both, the version before stays as it is"


def test_what_led_back_goes_before_a_whole_file_comes(cache: Cache) -> None:
    cache.retire(delta_target(digest_of(V2), digest_of(V3)))
    device = online(cache)
    ask(device, "v2")
    device.settle()
    ask(device, "v3")
    device.settle(until=lambda: device.state is State.INSTALLING)
    assert device.disk.names("inplace") == ["inplace/manifest"]
    device.settle()
    assert device.answer() == digest_of(V3)


def test_emptying_the_slot_of_a_half_rewritten_file_puts_it_back_first(cache: Cache) -> None:
    device = online(cache)
    ask(device, "v2")
    until_rewriting(device)
    assert content(device, MODEL_B) not in {V1, V2}
    discard_installation(device.disk, SlotName.B)
    assert content(device, MODEL_A) == V1
    assert device.disk.names("slots/b") == []


def test_a_start_that_finds_everything_fetched_serves_nothing_that_is_being_rewritten(cache: Cache) -> None:
    """The version before is being loaded while the only blob is looked at."""
    tuned = fine_tuned(V1, 4)
    cache.publish("v4", tuned)
    cache.publish_delta(V1, tuned, in_place=True)
    cache.desire("v4", sequence=1)
    reference = online(cache)
    downloaded = next(
        number
        for number, effect in enumerate(reference.effects)
        if isinstance(effect, effects.Trace) and effect.row.target is State.INSTALLING
    )
    device = Device(cache, V1, config=IN_PLACE)
    device.engine.evidence[digest_of(tuned)] = good_evidence(prompts_passed=1)
    device.cut_at = downloaded
    device.connect()
    with pytest.raises(PowerCutError):
        device.settle()
    device.cut_at = None
    device.disk.crash(random.Random(1))
    device.boot()
    device.connect()
    models = watch_models(device)
    assert models[State.TRIAL] == ""
    assert models[State.ROLLED_BACK] == digest_of(V1), (
        "the update is not over before the version before answers"
    )


def test_a_link_that_cannot_be_moved_leaves_the_commit_as_it_is(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = online(cache)
    ask(device, "v2")
    device.settle(until=lambda: device.state is State.TRIAL)

    def fail(name: str, target: str) -> None:
        monkeypatch.undo()
        raise StorageError(f"{name}: cannot point to {target}")

    monkeypatch.setattr(device.disk, "point", fail)
    models = watch_models(device)
    assert State.ROLLED_BACK not in models
    assert outcome(device)[0] == "committed"
    assert device.answer() == digest_of(V2)
    assert device.record.quarantine == ()


def watch_models(device: Device) -> dict[State, str]:
    """Carry everything out; what answers at the first look into each state, empty for nothing."""
    models: dict[State, str] = {}

    def note() -> bool:
        models.setdefault(device.state, device.answer() if device.executor.model else "")
        return False

    device.settle(until=note)
    return models


def test_journals_and_inverses_that_lead_nowhere_are_removed_at_the_next_start(cache: Cache) -> None:
    """A power cut came before a manifest named them, or took back that they had been removed."""
    device = online(cache)
    ask(device, "v2")
    device.settle()
    led_back = [name for name in device.disk.names("inplace") if name != "inplace/manifest"]
    assert len(led_back) == 2
    for name in ("inplace/other.journal", "inplace/other.inverse"):
        device.disk.create(name, 1000)
    device.boot()
    device.settle()
    assert device.disk.names("inplace") == sorted(["inplace/manifest", *led_back])


# --- what is refused -------------------------------------------------------------------------------------------


def test_without_a_delta_in_place_and_without_room_the_update_is_refused_before_its_first_byte(
    cache: Cache,
) -> None:
    cache.publish_delta(V1, V3)  # an ordinary one
    device = online(cache)
    device.disk.capacity_bytes -= device.disk.free_bytes() - len(V3)
    before = fetched(device)
    ask(device, "v3")
    device.settle()
    assert outcome(device) == ("rejected", "admission.not_in_place")
    update = device.reports[-1].update
    assert update is not None
    assert "bytes of disk" in update.detail
    assert not (fetched(device) - before) & {digest_of(V3)}
    assert device.answer() == digest_of(V1)


def test_the_room_that_admission_counts_is_what_an_update_in_place_takes(cache: Cache) -> None:
    device = online(cache, {"disk_reserve_bytes": 0})
    ask(device, "v2")
    before = least = device.disk.free_bytes()

    def watch() -> bool:
        nonlocal least
        least = min(least, device.disk.free_bytes())
        return False

    device.settle(until=watch)
    used = before - least
    items = next(
        effect.record.update.items
        for effect in device.effects
        if isinstance(effect, effects.Persist) and effect.record.update and effect.record.update.items
    )
    with pytest.raises(DiskBudgetError) as caught:
        check_disk(items, 0, config(disk_reserve_bytes=0))
    assert used < caught.value.needed_bytes < used + 2 * MB  # of which one is slack for records
    assert device.answer() == digest_of(V2)


@pytest.mark.parametrize("lie", ["late segment", "base", "reach"])
def test_a_delta_that_is_not_what_was_signed_leaves_the_version_before(cache: Cache, lie: str) -> None:
    patch = bytearray(_patch(V1, V2))
    needs = needs_of(cache, V1, V2)
    if lie == "late segment":
        patch[-3000] ^= 1
    elif lie == "base":
        patch = bytearray(_patch(V3, V2))
    else:
        needs = InPlaceNeeds(base_bytes=len(V1), reach_bytes=needs.reach_bytes + 1, inverse_bytes=MB)
    cache.publish_delta(V1, V2, patch=bytes(patch), needs=needs)
    device = online(cache)
    ask(device, "v2")
    device.settle(until=lambda: "installing delta_unusable syncing" in device.rows)
    device.disk.capacity_bytes -= device.disk.free_bytes() - len(V1)
    device.settle()
    assert outcome(device) == ("rejected", "admission.disk")
    assert device.answer() == digest_of(V1)
    assert content(device, MODEL_A) == V1


def test_an_inverse_that_grows_beyond_its_room_fails_the_update_for_good_and_puts_the_file_back(
    cache: Cache,
) -> None:
    other = V1[:200_000] + random.Random(4).randbytes(600_000) + V1[800_000:]
    cache.publish("v4", other)
    cache.publish_delta(V1, other, in_place=True)
    needs = needs_of(cache, V1, other)
    assert needs.inverse_bytes > 2 * needs.reach_bytes  # which there is room for, too
    short = InPlaceNeeds(base_bytes=needs.base_bytes, reach_bytes=needs.reach_bytes, inverse_bytes=1000)
    cache.publish_delta(V1, other, in_place=True, needs=short)
    device = online(cache)
    ask(device, "v4")
    device.settle()
    assert outcome(device) == ("failed", "storage.inverse_full")
    assert device.answer() == digest_of(V1)
    assert content(device, MODEL_A) == V1


def needs_of(cache: Cache, base: bytes, result: bytes) -> InPlaceNeeds:
    targets = cache.publisher.checked(cache.repository, 1_700_000_000_000).targets
    needs = targets[delta_target(digest_of(base), digest_of(result))].custom.in_place
    assert needs is not None
    return needs


def _patch(base: bytes, result: bytes) -> bytes:
    other = Cache()
    name = other.publish_delta(base, result, in_place=True)
    chunks = {
        parsed.index: payload[40:]
        for topic, payload in other.retained.items()
        if isinstance(parsed := TOPICS.parse(topic), ChunkTopic) and parsed.blob == name
    }
    return b"".join(chunks[index] for index in sorted(chunks))


# --- power cuts ------------------------------------------------------------------------------------------------


def assert_can_be_put_back(device: Device, when: str) -> None:
    """On a copy of the disk: the version that the record names is there, or can be put back, byte for byte."""
    disk = copy.deepcopy(device.disk)
    disk.operations_left = None
    record = Journal(disk).load()
    assert record is not None
    assert record.active is not None
    rewriting.put_back(disk, record.active)
    name = slot_file(record.active, "model.onnx")
    data = disk.read(name, 0, disk.length(name) or 0)
    assert digest_of(data) == record.active_slot.files["model.onnx"], when


def stored(device: Device) -> Counter[tuple[str, int]]:
    return Counter(
        (effect.blob, effect.index) for effect in device.effects if isinstance(effect, effects.WriteChunk)
    )


@pytest.mark.parametrize("is_good", [True, False], ids=["commit", "rollback"])
def test_a_power_cut_at_any_operation_of_the_disk_loses_no_version_and_no_chunk(
    cache: Cache, is_good: bool
) -> None:
    """Cuts the power at every operation from the first step on, and at another one while the next life mends it."""
    cache.desire("v2")
    expected = V2 if is_good else V1
    cuts = 0
    while True:
        rng = random.Random(cuts)
        device = Device(cache, V1, config=IN_PLACE)
        if not is_good:
            device.engine.evidence[digest_of(V2)] = good_evidence(prompts_passed=1)
        device.connect()
        device.settle(until=lambda device=device: device.state is State.INSTALLING)  # type: ignore[misc]  # bound now
        before = stored(device)
        device.disk.operations_left = cuts
        lives = 0
        while True:
            try:
                device.settle()
            except PowerCutError:
                lives += 1
                device.disk.operations_left = rng.randrange(60) if lives < 3 else None
                device.disk.crash(rng)
                assert_can_be_put_back(device, f"cut at {cuts}, life {lives}")
                device.boot()
                device.connect()
            else:
                break
        device.disk.operations_left = None
        assert device.answer() == digest_of(expected), f"cut at {cuts}: {device.rows}"
        assert content(device, MODEL_B if is_good else MODEL_A) == expected
        assert stored(device) == before, f"cut at {cuts}: a chunk came again"
        assert outcome(device)[0] == ("committed" if is_good else "rolled_back")
        if not lives:
            break
        cuts += 1
    assert cuts > 80


def test_a_second_name_of_the_file_that_a_power_cut_brought_back_does_not_stop_the_update(
    cache: Cache,
) -> None:
    device = online(cache)
    ask(device, "v2")
    device.settle(until=lambda: device.state is State.INSTALLING)
    assert device.record.update is not None
    items = device.record.update.items
    rewriting.begin(device.disk, SlotName.A, SlotName.B, digest_of(msgspec.msgpack.encode(items)))
    device.disk.link(MODEL_A, MODEL_B)
    device.settle()
    assert device.answer() == digest_of(V2)
    assert device.disk.length(MODEL_A) is None


def test_a_power_cut_at_any_effect_leads_to_the_new_version(cache: Cache) -> None:
    reference = online(cache)
    ask(reference, "v2", sequence=1)
    reference.settle()
    for cut_at in range(len(reference.effects)):
        device = Device(cache, V1, seed=cut_at, config=IN_PLACE)
        device.cut_at = cut_at
        try:
            device.connect()
            device.settle()
        except PowerCutError:
            device.disk.crash(random.Random(cut_at))
            assert_can_be_put_back(device, f"cut at {cut_at}")
            device.cut_at = None
            device.boot()
            device.settle()
            if device.state not in {State.TRIAL, State.INSTALLING, State.VERIFYING}:
                assert device.answer() in {digest_of(V1), digest_of(V2)}, f"cut at {cut_at}"
            device.connect()
            device.settle()
        assert device.answer() == digest_of(V2), f"cut at {cut_at}: {device.rows}"
        assert outcome(device) == ("committed", "")


def test_a_power_cut_while_a_committed_version_is_turned_back_leads_to_the_one_before(cache: Cache) -> None:
    reference = online(cache)
    ask(reference, "v2")
    reference.settle()
    cut_at = 0
    while True:
        kept: tuple[object, ...] = (
            trust,
            reference.executor,
        )  # a module is not copied; a boot makes another executor
        device = copy.deepcopy(reference, {id(each): each for each in kept})
        device.engine.unloadable.add(digest_of(V2))
        device.boot()
        device.disk.operations_left = cut_at
        try:
            device.settle()
        except PowerCutError:
            device.disk.operations_left = None
            device.disk.crash(random.Random(cut_at))
            device.boot()
            device.settle()
            assert device.answer() == digest_of(V1), f"cut at {cut_at}"
            assert content(device, MODEL_A) == V1
            cut_at += 1
            continue
        assert cut_at > 15
        return


# --- a disk that fails -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", [State.INSTALLING, State.TRIAL])
def test_a_disk_that_fails_for_a_while_delays_the_version_before_and_blames_nobody(
    cache: Cache, state: State
) -> None:
    device = online(cache)
    ask(device, "v2")
    device.settle(until=lambda: device.state is state and device.executor.model is None)
    device.disk.is_read_only = True
    for _ in range(400):
        if not device.step():
            break
    deadline = device.agent.deadline()
    assert deadline is not None, "another try is due"
    assert device.executor.model is None
    device.disk.is_read_only = False
    device.settle()
    assert device.answer() == digest_of(V2 if state is State.INSTALLING else V1)
    assert device.record.quarantine == ()


def test_a_commit_that_does_not_become_durable_goes_back_once_the_disk_can_be_written(cache: Cache) -> None:
    device = online(cache)
    ask(device, "v2")
    device.settle(until=lambda: isinstance(device.effects[-1], effects.StartTrial))
    device.settle(until=lambda: not device.jobs)
    device.disk.is_read_only = True
    for _ in range(200):
        if not device.step():
            break
    assert device.record.active is SlotName.A
    assert content(device, MODEL_B) == V2, "nothing is put back before that is written down"
    device.disk.is_read_only = False
    device.settle()
    assert device.answer() == digest_of(V1)
    assert device.record.quarantine == ()


def test_an_inverse_that_the_disk_damaged_leaves_room_for_a_whole_file(cache: Cache) -> None:
    device = online(cache)
    device.engine.evidence[digest_of(V2)] = good_evidence(prompts_passed=1)
    ask(device, "v2")
    device.settle(until=lambda: device.state is State.TRIAL)
    (inverse,) = [name for name in device.disk.names("inplace") if name.endswith(".inverse")]
    device.disk.write(inverse, 3000, b"rot")
    device.settle()
    assert device.executor.model is None, "neither version is whole"
    ask(device, "v3")
    device.settle()
    assert device.answer() == digest_of(V3)


# --- planning --------------------------------------------------------------------------------------------------

OLD, NEW = digest_of(b"old"), digest_of(b"new")
GIB = 1 << 30
TREE = build_tree([])[0]


def config(**changes: object) -> AgentConfig:
    fields: dict[str, object] = {"device": DEVICE, "fleet": FLEET, "family": FAMILY, **IN_PLACE}
    return AgentConfig(**{**fields, **changes})  # type: ignore[arg-type]  # a test's keyword arguments


def release(*names: str, sha256: Digest = NEW) -> Release:
    return Release(
        family=FAMILY,
        version="v2",
        runtime="llama",
        runtime_version_min="0",
        files=[ReleaseFile(name=name, length=4 * GIB, sha256=sha256) for name in names],
        resources=Resources(),
        health=health(),
    )


def targets(needs: InPlaceNeeds | None) -> dict[str, Target]:
    delta = Target(
        delta_target(OLD, NEW), 200 * MB, digest_of(b"delta"), ArtifactCustom(chunks=TREE, in_place=needs)
    )
    whole = Target(file_target(NEW), 4 * GIB, NEW, ArtifactCustom(chunks=TREE))
    return {each.path: each for each in (delta, whole)}


NEEDS = InPlaceNeeds(base_bytes=4 * GIB, reach_bytes=MB, inverse_bytes=300 * MB)


def test_a_large_model_needs_room_for_delta_journal_and_inverse_only() -> None:
    measured: dict[str, str] = {"model.gguf": OLD}
    (item,) = plan_update(
        release("model.gguf"), targets(NEEDS), measured, config(), available_bytes=560 * MB, full_only=False
    )
    assert item.in_place == NEEDS
    with pytest.raises(DiskBudgetError, match=r"update needs \d+ bytes of disk, 524288000 are free"):
        plan_update(
            release("model.gguf"),
            targets(NEEDS),
            measured,
            config(),
            available_bytes=500 * MB,
            full_only=False,
        )
    with pytest.raises(DiskBudgetError):  # as ever, with two slots
        plan_update(
            release("model.gguf"),
            targets(NEEDS),
            measured,
            config(is_in_place=False),
            available_bytes=560 * MB,
            full_only=False,
        )
    with pytest.raises(NotInPlaceError, match=r"update needs \d+ bytes of disk, 587202560 are free"):
        plan_update(
            release("model.gguf"),
            targets(None),
            measured,
            config(),
            available_bytes=560 * MB,
            full_only=False,
        )


@pytest.mark.parametrize(
    "measured",
    [{"model.gguf": OLD, "copy.gguf": OLD}, {"other.gguf": NEW, "model.gguf": OLD, "copy.gguf": OLD}],
    ids=["two files are alike", "and one is the new one"],
)
def test_a_file_that_may_have_two_names_is_not_rewritten(measured: dict[str, str]) -> None:
    items = plan_update(
        release("model.gguf"), targets(NEEDS), measured, config(), available_bytes=20 * GIB, full_only=False
    )
    assert [item.in_place for item in items] == [None]


def test_a_device_in_place_says_so_and_makes_one_file_at_a_time() -> None:
    capacity = config().capacity
    assert (capacity.in_place, capacity.links_max) == (True, 1)
    assert not config(is_in_place=False).capacity.in_place


# --- what an operator asks for ---------------------------------------------------------------------------------


def told(device: Device, wish: Wish) -> effects.AnswerOperator:
    device.queue.append(events.OperatorAsked(len(device.effects) + 1, wish))
    serial = len(device.effects) + 1
    device.settle()
    return next(
        effect
        for effect in device.effects
        if isinstance(effect, effects.AnswerOperator) and effect.serial == serial
    )


def test_a_rewriting_that_is_paused_is_completed_since_nothing_answers_meanwhile(cache: Cache) -> None:
    device = online(cache)
    ask(device, "v2")
    until_rewriting(device)
    assert "rewritten in place" in told(device, Wish.PAUSE).text
    assert device.answer() == digest_of(V2)
    assert outcome(device) == ("committed", "")
    ask(device, "v3")
    device.settle()
    assert device.answer() == digest_of(V2)  # paused now
    told(device, Wish.RESUME)
    assert device.answer() == digest_of(V3)


def test_a_device_without_a_second_copy_does_not_go_back_at_a_word(cache: Cache) -> None:
    device = online(cache)
    ask(device, "v2")
    device.settle()
    before = {name: content(device, name) for name in device.disk.names("slots")}
    assert told(device, Wish.ROLLBACK).code == "operator.in_place"
    assert device.answer() == digest_of(V2)
    assert {name: content(device, name) for name in device.disk.names("slots")} == before
    assert device.state is State.IDLE


class _Counting(LocalDecoder):
    """Notes what it is asked for."""

    def __init__(self) -> None:
        self.jobs: list[RewriteJob] = []

    def rewrite(self, disk: Disk, job: RewriteJob) -> bool:
        self.jobs.append(job)
        return super().rewrite(disk, job)


@pytest.mark.parametrize("ending", ["rolled back", "withdrawn"])
def test_every_way_to_a_file_and_back_goes_through_the_decoder_of_the_device(
    cache: Cache, ending: str
) -> None:
    """On a real device that is a process of its own: none of them may decode in the agent's."""
    device = online(cache)
    counting = device.executor._decoder = _Counting()
    if ending == "rolled back":
        device.engine.evidence[digest_of(V2)] = good_evidence(prompts_passed=1)
    ask(device, "v2")
    if ending == "withdrawn":
        device.settle(until=lambda: bool(counting.jobs))
        ask(device, "v1")
    device.settle()
    assert content(device, MODEL_A) == V1
    assert {job.is_back for job in counting.jobs} == {False, True}
