"""Plans: what a segment holds, and where in its tensor each run lies."""

from protocol.delta.layouts import LAYOUTS
from protocol.delta.matching import match_regions
from protocol.delta.planner import Planner, SegmentPlan, TensorPlace
from protocol.tensors import BytesSource, Layout, map_regions
from tests.protocol.model_files import GgufBuilder, GgufTensor, blocks


def _plan(base: bytes, new: bytes, segment_bytes: int) -> list[SegmentPlan]:
    base_regions, new_regions = map_regions(BytesSource(base)), map_regions(BytesSource(new))
    matches = match_regions(base_regions, new_regions, BytesSource(base), BytesSource(new))
    planner = Planner(BytesSource(base), BytesSource(new), segment_bytes, base_regions)
    return list(planner.plan(new_regions, matches))


def _places(plans: list[SegmentPlan]) -> list[TensorPlace]:
    assert all(len(plan.runs) == len(plan.places) for plan in plans)
    return [place for plan in plans for place in plan.places if place is not None]


def _two_tensors(rows: int) -> bytes:
    matrix = blocks(Layout.Q4_0, 4 * rows, seed=1)
    return GgufBuilder(
        [GgufTensor("w", (128, rows), 2, matrix), GgufTensor("norm", (64,), 0, bytes(256))]
    ).build()


def test_every_run_knows_its_row_length_and_where_in_its_tensor_it_starts() -> None:
    data = _two_tensors(rows=64)
    plans = _plan(data, data, segment_bytes=1024)
    places = _places(plans)
    matrix = [place for place in places if place.tensor_blocks == 4 * 64]
    assert len(matrix) > 3
    assert {place.row_codes for place in matrix} == {128}
    assert len({place.tensor for place in matrix}) == 1
    blocks_of = [
        run.blocks for plan in plans for run in plan.runs if run.layout == LAYOUTS[Layout.Q4_0].number
    ]
    starts = [sum(blocks_of[:i]) for i in range(len(blocks_of))]
    assert [place.first_block for place in matrix] == starts


def test_a_vector_is_one_row_and_a_tensor_of_its_own() -> None:
    data = _two_tensors(rows=2)
    matrix, vector = _places(_plan(data, data, segment_bytes=65536))
    assert (vector.row_codes, vector.first_block, vector.tensor_blocks) == (64, 0, 64)
    assert vector.tensor != matrix.tensor


def test_rows_that_were_appended_go_on_where_the_based_rows_of_the_tensor_end() -> None:
    first, second, _ = _places(_plan(_two_tensors(rows=8), _two_tensors(rows=10), segment_bytes=65536))
    assert first.tensor == second.tensor
    assert (first.first_block, second.first_block) == (0, 32)
    assert first.tensor_blocks == second.tensor_blocks == 40


def test_segments_end_with_a_row_where_rows_are_short() -> None:
    data = _two_tensors(rows=64)
    starts = [place.first_block for place in _places(_plan(data, data, segment_bytes=1024))]
    assert len(starts) > 3
    assert all(start % 4 == 0 for start in starts)


def test_rows_longer_than_an_eighth_of_a_segment_are_cut_anywhere() -> None:
    data = GgufBuilder([GgufTensor("w", (1024, 8), 2, blocks(Layout.Q4_0, 256, seed=1))]).build()
    plans = _plan(data, data, segment_bytes=1024)
    lengths = [run.length for plan in plans for run in plan.runs]
    assert sum(lengths) > 8 * 576
    assert lengths.count(1024 // 18 * 18) >= 3


def test_unrelated_tensors_are_planned_without_a_base() -> None:
    def model(seed: int) -> bytes:
        return GgufBuilder([GgufTensor("w", (128, 64), 2, blocks(Layout.Q4_0, 256, seed))]).build()

    plans = _plan(model(1), model(2), segment_bytes=1 << 20)
    number = LAYOUTS[Layout.Q4_0].number
    assert [run.base_offset for plan in plans for run in plan.runs if run.layout == number] == [None]
