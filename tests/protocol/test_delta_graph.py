"""The cheapest way over deltas and whole files, against a search that tries every way."""

import itertools
from collections.abc import Iterable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.chunks import build_tree
from protocol.constants import CHUNK_BYTES
from protocol.delta.format import Profile
from protocol.delta_graph import (
    LINKS_MAX,
    UNSTATED,
    Edge,
    Route,
    cheapest_routes,
    edge_cost_us,
    edges_of,
    leading_to,
    release_routes,
    wire_bytes,
)
from protocol.ids import Digest, digest_of
from protocol.messages import Capacity
from protocol.release import (
    ArtifactCustom,
    ClassPrompt,
    DeltaName,
    HealthPlan,
    Release,
    ReleaseFile,
    Resources,
    delta_target,
    file_target,
    parse_delta_target,
)
from protocol.trust import Target

FILES = [digest_of(bytes([number])) for number in range(6)]
A, B, C, D, E, F = FILES
CAPACITY = Capacity(
    link_bytes_per_s=64_000, processor_percent=100, delta_memory_bytes=1 << 20, links_max=LINKS_MAX
)


def delta(
    base: Digest,
    result: Digest,
    wire: int,
    *,
    profile: Profile = Profile.SMALL,
    memory: int = 0,
    size: int = 10_000,
) -> Edge:
    return Edge(delta_target(base, result, profile), base, result, wire, size, profile, memory)


def whole(result: Digest, size: int = 10_000) -> Edge:
    return Edge(file_target(result), None, result, size, size)


def release(*digests: Digest) -> Release:
    prompt = ClassPrompt(name="zero", input=[0.0], label=1)
    return Release(
        family="digits",
        version="2",
        runtime="onnx",
        runtime_version_min="1.17",
        files=[
            ReleaseFile(name=f"f{number}", length=9, sha256=sha256) for number, sha256 in enumerate(digests)
        ],
        resources=Resources(),
        health=HealthPlan(prompts=[prompt], latency_p99_ms_max=100, memory_peak_bytes_max=1 << 30),
    )


def every_way(
    edges: list[Edge], held: list[Digest], result: Digest, capacity: Capacity
) -> Iterator[tuple[Edge, ...]]:
    """All ways to a file, by brute force."""
    usable = [edge for edge in edges if edge.memory_bytes <= capacity.delta_memory_bytes]

    def grown(way: tuple[Edge, ...], at: Digest | None) -> Iterator[tuple[Edge, ...]]:
        if at == result:
            yield way
        if len(way) < min(capacity.links_max, LINKS_MAX):
            for edge in usable:
                if edge.base == at:
                    yield from grown((*way, edge), edge.result)

    for start in (None, *held):
        yield from grown((), start)


def rank(way: Iterable[Edge], capacity: Capacity) -> tuple[int, int, int, tuple[str, ...]]:
    way = list(way)
    return (
        sum(edge_cost_us(edge, capacity) for edge in way),
        len(way),
        sum(edge.wire_bytes for edge in way),
        tuple(edge.path for edge in way),
    )


EDGES = st.lists(
    st.one_of(
        st.builds(
            delta,
            st.sampled_from(FILES),
            st.sampled_from(FILES),
            st.integers(0, 3000),
            profile=st.sampled_from(Profile),
            memory=st.sampled_from([0, 5, 50]),
            size=st.sampled_from([0, 10_000, 400_000]),
        ),
        st.builds(whole, st.sampled_from(FILES), st.sampled_from([0, 100, 9_000])),
    ),
    max_size=14,
    unique_by=lambda edge: edge.path,
)
CAPACITIES = st.builds(
    Capacity,
    link_bytes_per_s=st.sampled_from([1, 1_000, 64_000, 1 << 40]),
    processor_percent=st.sampled_from([1, 25, 10_000]),
    delta_memory_bytes=st.sampled_from([0, 5, 50]),
    links_max=st.integers(1, 7),
)


@settings(max_examples=200, deadline=None)
@given(edges=EDGES, held=st.lists(st.sampled_from(FILES), max_size=2, unique=True), capacity=CAPACITIES)
def test_the_way_is_the_best_of_all_ways_within_the_limits_of_the_device(
    edges: list[Edge], held: list[Digest], capacity: Capacity
) -> None:
    found = cheapest_routes(edges, held, capacity)
    for result in FILES:
        ways = [rank(way, capacity) for way in every_way(edges, held, result, capacity)]
        assert (result in found) == bool(ways)
        if ways:
            assert found[result].rank == min(ways)
            assert found[result].cost_us == min(ways)[0]


@settings(max_examples=100, deadline=None)
@given(edges=EDGES, capacity=CAPACITIES, held=st.lists(st.sampled_from(FILES), max_size=2, unique=True))
def test_the_order_of_edges_and_files_changes_nothing(
    edges: list[Edge], capacity: Capacity, held: list[Digest]
) -> None:
    assert cheapest_routes(edges, held, capacity) == cheapest_routes(edges[::-1], held[::-1], capacity)


@settings(max_examples=100, deadline=None)
@given(edges=EDGES, capacity=CAPACITIES, held=st.lists(st.sampled_from(FILES), max_size=2, unique=True))
def test_every_delta_that_any_way_uses_leads_to_its_end(
    edges: list[Edge], capacity: Capacity, held: list[Digest]
) -> None:
    for result in FILES:
        paths = {edge.path for edge in leading_to(edges, [result])}
        for way in every_way(edges, held, result, capacity):
            assert {edge.path for edge in way if edge.base is not None} <= paths


def test_a_cost_is_time_on_the_link_and_time_on_the_processor() -> None:
    edge = delta(A, B, 64_000, size=6_000_000)
    assert edge_cost_us(edge, CAPACITY) == 1_000_000 + 60_000 + 1_000_000
    assert edge_cost_us(whole(B, 64_000), CAPACITY) == 1_000_000 + 640
    slow = Capacity(link_bytes_per_s=64_000, processor_percent=25, delta_memory_bytes=0, links_max=1)
    assert edge_cost_us(edge, slow) == 1_000_000 + 240_000 + 4_000_000


def test_two_small_deltas_beat_a_large_one_until_the_link_is_fast() -> None:
    edges = [
        delta(A, B, 1_000, size=6_000_000),
        delta(B, C, 1_000, size=6_000_000),
        delta(A, C, 300_000, size=6_000_000),
    ]
    assert [edge.path for edge in cheapest_routes(edges, [A], CAPACITY)[C].edges] == [
        edges[0].path,
        edges[1].path,
    ]
    fast = Capacity(link_bytes_per_s=10_000_000, processor_percent=100, delta_memory_bytes=0, links_max=4)
    assert [edge.path for edge in cheapest_routes(edges, [A], fast)[C].edges] == [edges[2].path]


def test_a_slow_processor_on_a_fast_link_takes_the_fast_profile_and_a_slow_link_the_small_one() -> None:
    small = delta(A, B, 4_000_000, size=92_000_000)
    fast = delta(A, B, 5_000_000, profile=Profile.FAST, size=92_000_000)
    wired = Capacity(link_bytes_per_s=2_000_000, processor_percent=25, delta_memory_bytes=0, links_max=1)
    cell = Capacity(link_bytes_per_s=15_000, processor_percent=25, delta_memory_bytes=0, links_max=1)
    assert cheapest_routes([small, fast], [A], wired)[B].edges == (fast,)
    assert cheapest_routes([small, fast], [A], cell)[B].edges == (small,)


def test_a_delta_that_needs_more_memory_than_the_device_gives_is_no_way() -> None:
    edges = [delta(A, B, 10, memory=CAPACITY.delta_memory_bytes + 1), whole(B)]
    assert cheapest_routes(edges, [A], CAPACITY)[B].edges == (edges[1],)


def test_a_chain_is_never_longer_than_the_limit_whatever_a_device_says_of_itself() -> None:
    steps = [delta(base, result, 1) for base, result in itertools.pairwise(FILES)]
    boastful = Capacity(link_bytes_per_s=1, processor_percent=1, delta_memory_bytes=0, links_max=64)
    assert len(cheapest_routes(steps, [A], boastful)[E].edges) == LINKS_MAX
    assert F not in cheapest_routes(steps, [A], boastful)


def test_a_device_that_says_nothing_of_itself_gets_one_small_delta_or_a_whole_file() -> None:
    edges = [delta(A, B, 1), delta(B, C, 1), delta(A, C, 1, profile=Profile.FAST), whole(C), delta(A, C, 999)]
    assert cheapest_routes(edges, [A], None)[C].edges == (edges[4],)
    assert cheapest_routes(edges[:4], [A], None)[C].edges == (edges[3],)
    assert UNSTATED.links_max == 1


def test_a_file_that_is_there_needs_nothing() -> None:
    assert cheapest_routes([whole(A)], [A], CAPACITY)[A] == Route()


def test_a_whole_file_may_be_where_a_chain_begins_but_not_one_that_the_release_itself_has() -> None:
    edges = [whole(A, 10), delta(A, B, 10), whole(B, 100_000)]
    assert release_routes(release(B), edges, [], CAPACITY)[B].edges == (edges[0], edges[1])
    assert release_routes(release(A, B), edges, [], CAPACITY)[B].edges == (edges[2],)


def signed(path: str, length: int, *, digest: Digest = A, memory: int = 0) -> Target:
    return Target(path, length, digest, ArtifactCustom(chunks=build_tree([])[0], memory_bytes=memory))


def test_signed_targets_become_edges_and_what_is_no_delta_does_not() -> None:
    targets = [
        signed(file_target(B), 3 * CHUNK_BYTES, digest=B),
        signed(delta_target(A, B), 500, memory=7),
        signed(delta_target(A, B, Profile.FAST), 600),
        signed(delta_target(B, C), 70),  # nobody says how long C is
        signed("releases/digits/2.json", 9),
        signed(f"deltas/{A}/{B}/quick", 9),
        signed(f"deltas/{A}/short", 9),
        signed(f"files/{A}", 9, digest=B),
    ]
    edges = edges_of({target.path: target for target in targets}, {D: 1})
    assert edges == [
        Edge(file_target(B), None, B, 3 * CHUNK_BYTES + 96, 3 * CHUNK_BYTES),
        Edge(delta_target(A, B), A, B, 500, 3 * CHUNK_BYTES, Profile.SMALL, 7),
        Edge(delta_target(A, B, Profile.FAST), A, B, 600, 3 * CHUNK_BYTES, Profile.FAST),
    ]
    assert wire_bytes(0) == 0


@pytest.mark.parametrize("profile", Profile)
def test_the_name_of_a_delta_is_read_back(profile: Profile) -> None:
    assert parse_delta_target(delta_target(A, B, profile)) == DeltaName(A, B, profile)
    assert parse_delta_target(delta_target(A, B, profile) + "/") is None
