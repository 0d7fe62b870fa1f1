"""Which deltas pay to be built for a fleet, and which ones nobody needs any more."""

from collections import Counter

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.delta.format import Profile
from protocol.delta_graph import LINKS_MAX
from protocol.ids import DeviceId, Digest, Family, Version, digest_of
from protocol.messages import Capacity, Desired, Outcome, Report, UpdateReport
from protocol.release import DeltaName, InPlaceNeeds, Release, delta_target
from protocol.trust import Target
from server.fleet.registry import DeviceRecord, Registry
from server.releases.catalog import blob_target
from server.releases.delta_garbage import ABSENT_MS, has_open_offer, head_releases, needed_deltas
from server.releases.delta_graph import (
    BUILD_BYTES_PER_S,
    BUILD_WEIGHT,
    BUILDS_MAX,
    GROUPS_MAX,
    FleetGraph,
    Group,
    device_class,
)
from server.releases.delta_stock import DeltaStock
from server.rollouts.records import RolloutRecord
from server.rollouts.states import RolloutState
from tests.server.samples import NOW_MS, model_bytes, paper_catalog, paper_release, report, stored

RELEASES = {version: paper_release(version) for version in "12345"}
FILES = {version: digest_of(model_bytes(version)) for version in RELEASES}
CELL = Capacity(
    link_bytes_per_s=16_384, processor_percent=64, delta_memory_bytes=1 << 27, links_max=LINKS_MAX
)
WIRED = Capacity(
    link_bytes_per_s=1 << 20, processor_percent=64, delta_memory_bytes=1 << 27, links_max=LINKS_MAX
)


def delta(pair: str, length: int, *, memory: int = 4096, in_place: InPlaceNeeds | None = None) -> Target:
    name = named(pair)
    return blob_target(
        delta_target(*name), stored(pair.encode() * (length // len(pair) + 1)), memory, in_place
    )


def named(pair: str) -> DeltaName:
    versions, _, profile = pair.partition("/")
    base, result = versions.split("-")
    return DeltaName(FILES[base], FILES[result], Profile[profile.upper() or "SMALL"])


def graph_of(*deltas: Target) -> FleetGraph:
    return FleetGraph(paper_catalog(*RELEASES.values(), extra=deltas))


def fleet(graph: FleetGraph, release: Release, *kinds: tuple[str, int, Capacity | None]) -> Counter[Group]:
    """Groups of devices: what they run, how many there are, what they can spend."""
    groups: Counter[Group] = Counter()
    for version, count, capacity in kinds:
        groups[graph.group(release, report("a", 1, version, capacity=capacity))] += count
    return groups


def builds(graph: FleetGraph, to: str, *kinds: tuple[str, int, Capacity | None]) -> set[DeltaName]:
    release = RELEASES[to]
    return set(graph.builds(release, fleet(graph, release, *kinds), lambda _: False))


def test_a_version_without_any_delta_gets_one_in_the_profile_that_suits_its_devices() -> None:
    assert builds(graph_of(), "2", ("1", 1, None)) == {named("1-2")}
    assert builds(graph_of(), "2", ("1", 1, CELL)) == {named("1-2")}
    slow = Capacity(link_bytes_per_s=1 << 20, processor_percent=4, delta_memory_bytes=1 << 27, links_max=1)
    assert (
        builds(graph_of(), "2", ("1", 9, slow)) == set()
    )  # the whole file is there sooner than any delta is applied
    cabled = Capacity(link_bytes_per_s=1 << 17, processor_percent=8, delta_memory_bytes=1 << 27, links_max=1)
    assert builds(graph_of(), "2", ("1", 9, cabled)) == {named("1-2/fast")}


def test_devices_that_rewrite_their_files_get_a_delta_although_the_whole_file_would_be_there_sooner() -> None:
    slow = Capacity(
        link_bytes_per_s=1 << 20,
        processor_percent=4,
        delta_memory_bytes=1 << 27,
        links_max=1,
        in_place=True,
    )
    planned = builds(graph_of(), "2", ("1", 1, slow))
    assert len(planned) == 1
    release, needs = RELEASES["2"], InPlaceNeeds(base_bytes=1000, reach_bytes=0, inverse_bytes=100)
    ordinary, marked = graph_of(delta("1-2", 300)), graph_of(delta("1-2", 300, in_place=needs))
    for graph, kind in ((ordinary, [None]), (marked, [FILES["1"]])):
        (route,) = graph.routes(release, graph.group(release, report("a", 1, "1", capacity=slow))).values()
        assert [edge.base for edge in route.edges] == kind


def test_a_device_that_is_rewriting_its_file_is_not_asked_before_it_says_which_it_has() -> None:
    capacity = msgspec.structs.replace(CELL, links_max=1, in_place=True)
    stock = DeltaStock(Registry(), list)
    list(stock.start(paper_catalog(*RELEASES.values()), (), (), NOW_MS))

    def asked(*, files: dict[str, str], outcome: Outcome = "running", is_online: bool = True) -> bool:
        update = UpdateReport(rollout="r1", sequence=7, version="2", outcome=outcome)
        said = report("a", 1, "1", update, files=files, capacity=capacity)
        device = DeviceRecord(device=DeviceId("a"), report=said, is_online=is_online)
        ready, _ = stock.ready(RELEASES["2"], [device], NOW_MS)
        return ready == [device]

    assert not asked(files={})
    assert asked(files={}, is_online=False), "nobody waits for one that may be gone for good"
    assert asked(files={}, outcome="failed"), "it has nothing, and may have room for a whole file"
    assert asked(files={"model.onnx": FILES["2"]})


def test_both_profiles_are_built_where_two_kinds_of_devices_gain_enough_from_their_own() -> None:
    slow = Capacity(link_bytes_per_s=1 << 17, processor_percent=8, delta_memory_bytes=1 << 27, links_max=1)
    both = builds(graph_of(), "2", ("1", 500, CELL), ("1", 500, slow))
    assert both == {named("1-2"), named("1-2/fast")}


def test_a_few_stragglers_are_left_to_the_chain_that_is_there_and_many_get_a_delta_of_their_own() -> None:
    graph = graph_of(delta("1-2", 3_000), delta("2-3", 3_000))
    assert builds(graph, "3", ("1", 1, CELL)) == set()
    assert builds(graph, "3", ("1", 1000, CELL)) != set()
    (route,) = graph.routes(
        RELEASES["3"], graph.group(RELEASES["3"], report("a", 1, "1", capacity=CELL))
    ).values()
    assert [edge.path for edge in route.edges] == [delta_target(*named("1-2")), delta_target(*named("2-3"))]


def test_an_agent_that_takes_no_chains_gets_the_direct_delta_all_the_same() -> None:
    graph = graph_of(delta("1-2", 300), delta("2-3", 300))
    assert builds(graph, "3", ("1", 1, None)) == {named("1-3")}


def test_one_delta_at_the_end_of_a_chain_serves_those_who_come_through_it() -> None:
    graph = graph_of(delta("1-2", 300))
    release = RELEASES["3"]
    groups = fleet(graph, release, ("2", 900, CELL), ("1", 1, CELL))
    planned = graph.builds(release, groups, lambda _: False)
    assert named("2-3") in planned
    assert not any(name.base == FILES["1"] for name in planned), "one straggler is no reason to build"
    assert set(planned[named("2-3")]) == set(groups), "and waits for the delta of the others"


def test_a_chain_that_would_become_too_long_counts_for_nothing() -> None:
    graph = graph_of(delta("1-2", 300), delta("2-3", 300))
    release = RELEASES["4"]
    short = msgspec.structs.replace(CELL, links_max=2)
    groups = fleet(graph, release, ("3", 900, CELL), ("1", 1, short))
    (many, straggler) = groups
    planned = graph.builds(release, groups, lambda _: False)
    assert planned[named("3-4")] == [many]
    assert planned[named("1-4")] == [straggler]


def test_what_was_tried_before_is_not_built_again() -> None:
    graph = graph_of()
    release = RELEASES["2"]
    groups = fleet(graph, release, ("1", 5, CELL))
    assert graph.builds(release, groups, lambda name: name.base == FILES["1"]) == {}


def test_devices_that_run_the_release_already_ask_for_nothing() -> None:
    assert builds(graph_of(), "2", ("2", 100, CELL)) == set()


def test_a_base_that_nobody_signed_leads_to_the_whole_file() -> None:
    graph = graph_of(delta("1-2", 300))
    said = report("a", 1, "1", files={"model.onnx": digest_of(b"made at home")}, capacity=CELL)
    group = graph.group(RELEASES["2"], said)
    assert group == Group(frozenset(), (), CELL)
    assert graph.builds(RELEASES["2"], {group: 1000}, lambda _: False) == {}
    assert [target.path for target in graph.artifacts(RELEASES["2"], said)][1:] == [f"files/{FILES['2']}"]


def test_what_a_device_fetches_are_all_deltas_of_its_way() -> None:
    graph = graph_of(delta("1-2", 300), delta("2-3", 300), delta("3-4", 300))
    paths = [target.path for target in graph.artifacts(RELEASES["4"], report("a", 1, "1", capacity=CELL))]
    assert paths == ["releases/digits/4.json"] + [
        delta_target(*named(pair)) for pair in ("1-2", "2-3", "3-4")
    ]
    paths = [target.path for target in graph.artifacts(RELEASES["4"], report("a", 1, "1"))]
    assert paths == ["releases/digits/4.json", f"files/{FILES['4']}"]


def test_a_hostile_fleet_does_not_make_a_plan_long() -> None:
    graph = graph_of()
    release = RELEASES["2"]
    groups = {
        Group(
            frozenset({FILES["1"]}),
            ((FILES["1"], FILES["2"]),),
            msgspec.structs.replace(CELL, delta_memory_bytes=n),
        ): 1
        for n in range(1, 3 * GROUPS_MAX)
    }
    planned = graph.builds(release, groups, lambda _: False)
    assert len(planned) <= BUILDS_MAX
    assert max(len(users) for users in planned.values()) == GROUPS_MAX


def test_devices_that_differ_by_little_are_one_class() -> None:
    said = Capacity(
        link_bytes_per_s=70_000, processor_percent=100, delta_memory_bytes=128 << 20, links_max=64
    )
    alike = msgspec.structs.replace(said, link_bytes_per_s=120_000, processor_percent=64)
    assert device_class(said) == device_class(alike)
    assert device_class(said) == Capacity(
        link_bytes_per_s=65_536, processor_percent=64, delta_memory_bytes=128 << 20, links_max=LINKS_MAX
    )
    assert device_class(None) is None


KINDS = st.lists(
    st.tuples(st.sampled_from("1234"), st.integers(1, 500), st.sampled_from([None, CELL, WIRED])), max_size=5
)
DELTAS = st.lists(
    st.tuples(
        st.sampled_from(["1-2", "2-3", "3-4", "1-3", "4-5", "2-5/fast", "3-5"]), st.integers(100, 150_000)
    ),
    max_size=5,
    unique_by=lambda each: each[0],
)


@settings(max_examples=60, deadline=None)
@given(kinds=KINDS, deltas=DELTAS)
def test_whatever_is_built_saves_the_fleet_more_than_it_takes_and_nothing_that_does_is_left(
    kinds: list[tuple[str, int, Capacity | None]], deltas: list[tuple[str, int]]
) -> None:
    """Builds what is planned, with the length that was expected, until nothing is planned: it ends, and it paid."""
    there = [delta(pair, length) for pair, length in deltas]
    release = RELEASES["5"]
    built: set[DeltaName] = set()
    while True:
        graph = graph_of(*there)
        groups = fleet(graph, release, *kinds)
        planned = graph.builds(release, groups, lambda _: False)
        assert not set(planned) & {named(pair) for pair, _ in deltas} | set(planned) & built
        if not planned:
            break
        before = fleet_cost_us(graph, release, groups)
        for name in planned:
            edge = graph._expected(name)
            blob = stored(f"{name}".encode().ljust(edge.wire_bytes, b".")[: edge.wire_bytes])
            there.append(blob_target(delta_target(*name), blob, 4096))
        built |= set(planned)
        after = graph_of(*there)
        saved_us = before - fleet_cost_us(after, release, fleet(after, release, *kinds))
        assert (
            saved_us >= len(planned) * len(model_bytes("5")) * 1_000_000 * BUILD_WEIGHT // BUILD_BYTES_PER_S
        )
    assert len(built) <= 8


def fleet_cost_us(graph: FleetGraph, release: Release, groups: Counter[Group]) -> int:
    return sum(
        count * sum(route.cost_us for route in graph.routes(release, group).values())
        for group, count in groups.items()
    )


# Garbage


def rollout(number: int, version: str, state: RolloutState) -> RolloutRecord:
    return RolloutRecord(
        id=f"r{number}", family=Family("digits"), version=Version(version), state=state, created_ms=NOW_MS
    )


def record(
    name: str,
    version: str,
    *,
    asked: str = "",
    outcome: Outcome | None = None,
    seen_ms: int = NOW_MS,
    capacity: Capacity | None = CELL,
) -> DeviceRecord:
    update = None
    if outcome is not None:
        update = UpdateReport(rollout="r1", sequence=7, version=asked, outcome=outcome)
    said: Report = report(name, 1, version, update, capacity=capacity)
    desired = Desired(sequence=7, rollout="r1", family="digits", version=asked) if asked else None
    return DeviceRecord(
        device=DeviceId(name),
        report=said,
        desired=desired,
        desired_sequence=7 if asked else 0,
        seen_ms=seen_ms,
    )


def needed(graph: FleetGraph, heads: str, *devices: DeviceRecord) -> set[str]:
    paths = needed_deltas(graph, devices, [RELEASES[version] for version in heads], NOW_MS)
    by_path = {delta_target(*name): name for name in graph.catalog.deltas()}
    versions = {digest: version for version, digest in FILES.items()}
    return {f"{versions[by_path[path].base]}-{versions[by_path[path].result]}" for path in paths}


STEPS = graph_of(delta("1-2", 300), delta("2-3", 300), delta("1-3", 100_000), delta("3-4", 300))


def test_deltas_on_the_way_of_the_fleet_stay_and_the_others_may_go() -> None:
    assert needed(STEPS, "3", record("a", "1")) == {"1-2", "2-3"}
    assert needed(STEPS, "3", record("a", "2")) == {"2-3"}
    assert needed(STEPS, "3", record("a", "3")) == set()
    assert needed(STEPS, "34", record("a", "2")) == {"2-3", "3-4"}
    assert needed(STEPS, "", record("a", "1")) == set()
    assert needed(STEPS, "3", record("a", "1", capacity=None)) == {"1-3"}


def test_whatever_leads_to_what_a_device_was_asked_to_run_stays_until_it_has_answered() -> None:
    every = {"1-2", "2-3", "1-3"}
    assert needed(STEPS, "", record("a", "1", asked="3")) == every
    assert needed(STEPS, "", record("a", "1", asked="3", outcome="running")) == every
    for outcome in ("committed", "rolled_back", "rejected", "failed"):
        assert needed(STEPS, "", record("a", "1", asked="3", outcome=outcome)) == set()
    assert not has_open_offer(record("a", "3", asked="3"))


def test_a_device_that_was_not_heard_of_for_a_season_keeps_nothing_alive() -> None:
    assert needed(STEPS, "3", record("a", "1", asked="3", seen_ms=NOW_MS - ABSENT_MS + 1)) == {
        "1-2",
        "2-3",
        "1-3",
    }
    absent = record("a", "1", asked="3", seen_ms=NOW_MS - ABSENT_MS)
    assert needed(STEPS, "3", absent) == set()
    connected = msgspec.structs.replace(absent, is_online=True)  # and silent, as it had nothing to say
    assert needed(STEPS, "3", connected) == {"1-2", "2-3", "1-3"}


def test_devices_are_on_their_way_to_what_is_rolled_out_and_to_what_was_rolled_out_last() -> None:
    catalog = paper_catalog(*RELEASES.values())
    rollouts = [
        rollout(1, "1", RolloutState.FINISHED),
        rollout(2, "2", RolloutState.FINISHED),
        rollout(3, "3", RolloutState.STOPPED),
        rollout(4, "4", RolloutState.RUNNING),
        rollout(5, "never-published", RolloutState.CREATED),
    ]
    assert {release.version for release in head_releases(catalog, rollouts)} == {"2", "4"}
    assert head_releases(catalog, []) == []


@settings(max_examples=80, deadline=None)
@given(
    deltas=DELTAS,
    version=st.sampled_from("1234"),
    capacity=st.sampled_from([None, CELL, WIRED]),
    asked=st.sampled_from(["", "5"]),
)
def test_without_what_nobody_needs_every_device_still_goes_the_way_it_went(
    deltas: list[tuple[str, int]], version: str, capacity: Capacity | None, asked: str
) -> None:
    device = record("a", version, asked=asked, capacity=capacity)
    graph = graph_of(*(delta(pair, length) for pair, length in deltas))
    kept = needed_deltas(graph, [device], [RELEASES["5"]], NOW_MS)
    left = [target for path, target in graph.catalog.targets.items() if path in kept]
    after = graph_of(*left)
    assert after.artifacts(RELEASES["5"], device.report) == graph.artifacts(RELEASES["5"], device.report)
    assert kept <= {delta_target(*name) for name in graph.catalog.deltas()}
    assert Digest(FILES[version]) in {name.base for name in after.catalog.deltas()} or not left or asked
