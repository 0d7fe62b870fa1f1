"""In which directions a matrix of int8 has moved, and whether they are worth sending: SPEC section 6.11."""

import numpy as np
import numpy.typing as npt
import pytest

from protocol.delta.compression import compress
from protocol.delta.context import ContextModel
from protocol.delta.directions import RECORD_BYTES, fit_directions, is_matrix
from protocol.delta.layouts import LAYOUTS
from protocol.delta.runs import Basis, ContextRun, Flag
from protocol.tensors.regions import BytesSource, Layout, Region
from tests.protocol.context_segments import needs_library

Codes = npt.NDArray[np.int8]


def _codes(rows: int, columns: int, strengths: list[float], noise: float) -> tuple[Codes, Codes]:
    """Return a matrix, and what has become of it: rows go along as many directions as there are strengths, and a little anywhere."""
    rng = np.random.default_rng(44)
    weights = 30 * rng.standard_normal((rows, columns), np.float32)
    moved = weights + noise * rng.standard_normal(weights.shape, np.float32)
    for strength in strengths:
        moved += strength * np.outer(rng.standard_normal(rows), rng.standard_normal(columns)).astype(
            np.float32
        )
    return _rounded(weights), _rounded(moved)


def _rounded(values: npt.NDArray[np.float32]) -> Codes:
    return np.clip(np.rint(values), -127, 127).astype(np.int8)


def _fit(old: Codes, new: Codes) -> Basis | None:
    region = Region("w", Layout.I8, 0, new.size, row_bytes=new.shape[1])
    assert is_matrix(region)
    return fit_directions(BytesSource(old.tobytes()), BytesSource(new.tobytes()), region, region)


def _cost(old: Codes, new: Codes, basis: Basis | None) -> int:
    flags = Flag.START | Flag.BASE | Flag.SPARSE | (Flag.RANK if basis else Flag.NONE)
    columns = old.shape[1]
    run = ContextRun(LAYOUTS[Layout.I8].number, flags, 0, old.size, columns, 0, 0, None, basis)
    model = ContextModel()
    model.reset()
    side = len(compress(basis.pack(), "small")) + RECORD_BYTES if basis else 0
    return len(model.encode([run], old.tobytes(), new.tobytes())) + side


@needs_library
@pytest.mark.parametrize(
    ("shape", "strengths"),
    [((384, 384), [0.2, 0.12]), ((768, 128), [0.15]), ((256, 1024), [0.25, 0.15, 0.1]), ((384, 384), [])],
)
def test_as_many_directions_are_sent_as_pay(shape: tuple[int, int], strengths: list[float]) -> None:
    old, new = _codes(*shape, strengths, noise=0.2)
    basis = _fit(old, new)
    assert (basis.rank if basis else 0) == len(strengths)
    # They were chosen without encoding anything: what encoding says of each number of them is not better.
    cost = _cost(old, new, basis)
    cuts = [None] if basis is None else [None, *(basis.cut(rank) for rank in range(1, basis.rank))]
    assert cost == min([cost, *(_cost(old, new, cut) for cut in cuts)])


def test_of_a_large_matrix_a_part_is_looked_at() -> None:
    rows, columns = 12_000, 256
    assert _fit(*_codes(rows, columns, [], noise=0.2)) is None
    basis = _fit(*_codes(rows, columns, [0.05], noise=0.2))
    assert basis is not None
    assert basis.rank == 1


def test_a_matrix_of_which_hardly_anything_changed_gets_no_directions() -> None:
    old, _ = _codes(128, 64, [], noise=0)
    assert _fit(old, old) is None
    new = old.copy()
    new[5, 7] ^= 1
    assert _fit(old, new) is None
    new[6] = old[6][
        ::-1
    ]  # a row that is another: the strongest direction of all, and of no use to any other row
    assert _fit(old, new) is None


def test_the_same_matrix_gives_the_same_directions() -> None:
    old, new = _codes(256, 256, [0.2], noise=0.2)
    found = _fit(old, new)
    assert found is not None
    assert found == _fit(old, new)


def test_a_matrix_whose_counterpart_has_not_even_one_row_gets_no_directions() -> None:
    new = _codes(128, 64, [], noise=0)[0]
    region = Region("w", Layout.I8, 0, new.size, row_bytes=64)
    short = Region("w", Layout.I8, 0, 63, row_bytes=64)
    assert fit_directions(BytesSource(bytes(63)), BytesSource(new.tobytes()), short, region) is None
