import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from protocol.ids import digest_of
from protocol.release import DeltaName, ReleaseFile, delta_target
from protocol.trust import Target
from server.releases.catalog import Catalog, blob_target, target_blobs
from server.releases.delta_graph import FleetGraph
from server.releases.delta_planner import (
    can_build,
    is_worthwhile,
    pairs_for,
    plan_cache,
)
from tests.server.samples import model_bytes, paper_catalog, paper_release, report, stored

ONE, TWO = paper_release("1"), paper_release("2")
FILE_1, FILE_2 = digest_of(model_bytes("1")), digest_of(model_bytes("2"))


def _delta(length: int = 1000) -> Target:
    return blob_target(delta_target(FILE_1, FILE_2), stored(b"d" * length))


def test_the_base_of_a_delta_is_the_file_that_the_device_measured() -> None:
    assert pairs_for(TWO, report("a", 1, "1")) == [(FILE_1, FILE_2)]


def test_a_file_that_is_named_otherwise_is_matched_by_its_place() -> None:
    assert pairs_for(TWO, report("a", 1, "1", files={"digits-1.onnx": FILE_1})) == [(FILE_1, FILE_2)]


@pytest.mark.parametrize(
    ("before", "now", "bases"),
    [
        pytest.param(2, 2, [1, 2], id="as many"),
        pytest.param(2, 3, [1, 2, 2], id="more"),
        pytest.param(3, 2, [1, 3], id="fewer"),
        pytest.param(1, 4, [1, 1, 1, 1], id="one"),
        pytest.param(4, 1, [3], id="into one"),
    ],
)
def test_a_shard_goes_with_the_one_that_lay_where_it_lies(before: int, now: int, bases: list[int]) -> None:
    def shards(stem: str, count: int) -> dict[str, str]:
        names = [f"{stem}-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1)]
        return {name: digest_of(name.encode()) for name in names}

    old, new = shards("m-v1", before), shards("m-v2", now)
    files = [ReleaseFile(name=name, length=1, sha256=digest) for name, digest in new.items()]
    pairs = pairs_for(replace(TWO, files=files), report("a", 1, "1", files=old))
    assert [list(old.values()).index(base) + 1 for base, _ in pairs] == bases
    assert [result for _, result in pairs] == list(new.values())


def test_a_base_that_only_the_device_knows_already_needs_nothing() -> None:
    assert pairs_for(TWO, report("a", 1, "2")) == []
    catalog = paper_catalog(ONE, TWO, extra=(_delta(),))
    assert FleetGraph(catalog).artifacts(TWO, report("a", 1, "2")) == [catalog.description(TWO)]


def test_a_device_without_files_needs_no_delta_but_the_whole_file() -> None:
    assert pairs_for(TWO, report("a", 1, "")) == []
    assert pairs_for(TWO, None) == []
    catalog = paper_catalog(ONE, TWO, extra=(_delta(),))
    assert FleetGraph(catalog).artifacts(TWO, None) == [catalog.description(TWO), catalog.file(FILE_2)]


def test_a_base_that_only_the_device_knows_leads_to_the_whole_file() -> None:
    catalog = paper_catalog(ONE, TWO)
    foreign = digest_of(b"made at home")
    assert not can_build(catalog, (foreign, FILE_2))
    assert can_build(catalog, (FILE_1, FILE_2))
    artifacts = FleetGraph(catalog).artifacts(TWO, report("a", 1, "1", files={"model.onnx": foreign}))
    assert artifacts == [catalog.description(TWO), catalog.file(FILE_2)]


def test_a_file_is_known_with_those_beside_it_in_a_published_release() -> None:
    catalog = paper_catalog(ONE, TWO)
    assert catalog.files_beside(FILE_2) == tuple(TWO.files)
    assert paper_catalog(ONE).files_beside(FILE_2) == ()


def test_a_signed_delta_is_preferred_to_the_whole_file() -> None:
    catalog = paper_catalog(ONE, TWO, extra=(_delta(),))
    assert FleetGraph(catalog).artifacts(TWO, report("a", 1, "1")) == [catalog.description(TWO), _delta()]


def test_a_delta_that_saves_next_to_nothing_is_not_worthwhile() -> None:
    assert is_worthwhile(900, 1000)
    assert not is_worthwhile(901, 1000)
    assert not is_worthwhile(1200, 1000)


def test_what_most_devices_need_is_retained_first() -> None:
    catalog = paper_catalog(ONE, TWO, extra=(_delta(),))
    whole = catalog.file(FILE_2)
    assert whole is not None
    assert list(plan_cache([[_delta()], [_delta()], [whole]], 2000)) == [_delta().digest]


def test_index_blobs_travel_with_their_artifact() -> None:
    whole = paper_catalog(TWO).file(FILE_2)
    assert whole is not None
    blobs = dict(target_blobs(whole))
    assert len(blobs) == 2
    assert plan_cache([[whole]], 1 << 30) == blobs
    assert plan_cache([[whole]], sum(blobs.values()) - 1) == {}


@given(
    lengths=st.lists(st.integers(0, 300_000), max_size=12),
    devices=st.lists(st.lists(st.integers(0, 11), max_size=4), max_size=12),
    bytes_max=st.integers(0, 600_000),
)
def test_the_cache_never_passes_its_budget_and_never_holds_half_an_artifact(
    lengths: list[int], devices: list[list[int]], bytes_max: int
) -> None:
    targets = []
    for number, length in enumerate(lengths):
        blob = stored(b"%d" % number * length)
        targets.append(blob_target(f"files/{number}", blob))
    needs = [[targets[index] for index in device if index < len(targets)] for device in devices]
    planned = plan_cache(needs, bytes_max)
    assert sum(planned.values()) <= bytes_max
    for target in targets:
        parts = [name for name, length in target_blobs(target) if length]
        assert all(name in planned for name in parts) or target.digest not in planned


def test_the_catalog_knows_every_blob_that_devices_may_ask_for() -> None:
    catalog = paper_catalog(ONE, TWO, extra=(_delta(),))
    for path, target in catalog.targets.items():
        for name, length in target_blobs(target):
            assert catalog.blob_chunks(name) == -(-length // 65_496), path
    assert catalog.blob_chunks(digest_of(b"never signed")) is None
    assert catalog.deltas() == [DeltaName(FILE_1, FILE_2)]


def test_a_release_that_is_not_signed_is_not_in_the_catalog() -> None:
    catalog = Catalog.of(paper_catalog(ONE).targets, [ONE, TWO], 0)
    assert list(catalog.releases.values()) == [ONE]
