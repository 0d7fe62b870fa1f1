"""Fits the basis of a matrix of codes whose scales are elsewhere (ONNX int8): in which few directions its rows have moved.

Only the writer comes here; floating point is allowed, because what it finds is sent. How many directions pay is worked out
from the fit: to encode a matrix in order to see what it costs would take as long as to write it.
"""

import math

import numpy as np
import numpy.typing as npt

from protocol.delta.basis import COEFFICIENT_UNIT, Matrix, single_thread
from protocol.delta.compression import compress
from protocol.delta.runs import COLUMNS_MAX, GROUP_CODES, VARIANCE_BITS_MAX, VARIANCE_BITS_MIN, Basis
from protocol.tensors.regions import Layout, ReadAt, Region

RECORD_BYTES = 60
"""Of a segment of its own and of the tables record before it, about."""

_ROWS_MIN = 64
_RANK_MAX = 4
_CODES_MAX = 1 << 21  # that are looked at: as floating point they take 8 MiB
_PIECES = 16  # of which what is looked at consists where that is not all
_LEVELS = 3  # of a direction, either way: it is noisy anyway, and has to be sent
_SWEEPS = 8
_CODE_UNITS = 256  # of the coder's unit in a step between codes
_LEARNING_BYTES = 30  # for each direction: more than the sum of what its coefficients should cost

Changes = npt.NDArray[np.int8]


def is_matrix(region: Region) -> bool:
    """Tell whether a basis may pay for a tensor whose scales are elsewhere."""
    columns, rows = region.row_bytes, region.length // max(region.row_bytes, 1)
    is_wide = 0 < columns <= COLUMNS_MAX and columns % GROUP_CODES == 0
    return region.layout in {Layout.I8, Layout.U8} and is_wide and rows >= _ROWS_MIN


def fit_directions(base: ReadAt, new: ReadAt, old_region: Region, region: Region) -> Basis | None:
    """Return the directions in which the rows of a matrix of codes have moved, strongest first; None if none pays for itself.

    Args:
        base: The base.
        new: The new file.
        old_region: The tensor in the base, with rows of the same length.
        region: The tensor in the new file; `is_matrix`.
    """
    rows = min(region.length, old_region.length) // region.row_bytes
    pieces = _pieces(base, new, old_region, region)
    # Directions fit rows that they were fitted to better than others, so that others are asked, if there are any.
    some, others = np.concatenate(pieces[::2]), np.concatenate(pieces[1::2] or pieces)
    fitted, judged = _changed_rows(some), _changed_rows(others)
    if not len(fitted) or not len(judged):
        return None
    rates = np.sqrt((fitted**2).mean(axis=0, keepdims=True) + 1e-3)
    with single_thread():
        vectors = _leading(fitted / rates, _RANK_MAX)
        basis = _basis(fitted, vectors * rates, len(some))
        scaled = judged / rates
        energies = ((scaled @ vectors.T) ** 2).mean(axis=0) / (scaled**2).mean()
    if basis is None:
        return None
    saved = _saved_bytes(energies, rows * len(judged) / len(others))
    return _best_cut(basis, saved)


def _pieces(base: ReadAt, new: ReadAt, old_region: Region, region: Region) -> list[Changes]:
    """Return by how much codes have changed: of all rows, or of evenly spread pieces."""
    columns = region.row_bytes
    rows = min(region.length, old_region.length) // columns
    count, size = 1, rows
    if rows * columns > _CODES_MAX:
        count, size = _PIECES, _CODES_MAX // _PIECES // columns
    pieces: list[Changes] = []
    for index in range(count):
        first = rows * index // count * columns
        old, now = (
            np.frombuffer(source.read_at(start + first, size * columns), np.uint8).reshape(-1, columns)
            for source, start in ((base, old_region.offset), (new, region.offset))
        )
        pieces.append((now - old).view(np.int8))  # modulo 256: differences are small, signed or not
    return pieces


def _changed_rows(changes: Changes) -> Matrix:
    """Return the rows that have changed: others say nothing of where rows go, and cost nothing either."""
    return changes[changes.any(axis=1)].astype(np.float32)


def _leading(matrix: Matrix, rank: int) -> Matrix:
    """Return the strongest right singular vectors, by sweeps from a fixed start: the same files give the same delta."""
    start = np.random.default_rng(0).standard_normal((matrix.shape[1], rank), np.float32)
    vectors = np.linalg.qr(start)[0]
    for _ in range(_SWEEPS):
        vectors = np.linalg.qr(matrix.T @ (matrix @ vectors))[0]
    _, strengths, rotation = np.linalg.svd(matrix @ vectors, full_matrices=False)
    leading: Matrix = (vectors @ rotation.T).T[strengths > 0]
    return leading


def _basis(changes: Matrix, directions: Matrix, rows: int) -> Basis | None:
    """Return the directions as they are sent, of `rows` rows of which those that changed are given."""
    largest = np.abs(directions).max(axis=1, keepdims=True)
    if not len(directions) or not largest.all():
        return None
    directions = np.rint(np.rint(directions / largest * _LEVELS) * (127 / _LEVELS))
    normal = directions @ directions.T + 1e-6 * np.eye(len(directions), dtype=np.float32)
    coefficients = changes @ directions.T @ np.linalg.inv(normal) * _CODE_UNITS
    # A row has few changes, most of them chance: what remains of the mean square is what the direction explains.
    found = (coefficients**2).sum(axis=0) / rows
    chance = (changes**2).sum() / (rows * changes.shape[1]) * _CODE_UNITS**2 / np.diag(normal)
    variance = np.maximum(found - chance, found / 8) * COEFFICIENT_UNIT**2
    bits = np.clip(np.rint(np.log2(np.maximum(variance, 1))), VARIANCE_BITS_MIN, VARIANCE_BITS_MAX)
    prior = bits.astype(np.uint8).tobytes() + bytes(len(bits))
    return Basis(changes.shape[1], len(bits), directions.astype(np.int8).tobytes(), b"", prior)


def _saved_bytes(energies: npt.NDArray[np.floating], rows: float) -> npt.NDArray[np.floating]:
    """Estimate what each direction saves, from the mean square of its coefficients in units of what chance would give.

    To know a row's coefficient saves half its square in nepers. To learn it while the row is coded costs half the logarithm of
    how much less is known of it before the row than after (Clarke and Barron, IEEE Trans. Inf. Theory 36, 1990).
    """
    signal = np.maximum(energies - 1, 0)
    saved: npt.NDArray[np.floating] = rows * (signal - np.log1p(signal)) / (2 * 8 * math.log(2))
    return saved - _LEARNING_BYTES


def _best_cut(basis: Basis, saved: npt.NDArray[np.floating]) -> Basis | None:
    cuts = [basis.cut(rank) for rank in range(1, basis.rank + 1)]
    gains = np.cumsum(saved) - [len(compress(cut.pack(), "small")) + RECORD_BYTES for cut in cuts]
    best = int(gains.argmax())
    return cuts[best] if gains[best] > 0 else None
