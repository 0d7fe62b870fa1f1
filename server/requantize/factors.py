"""A low-rank adapter from two versions of a model: of each matrix the change of few directions that is worth most to the outputs.

The error that an adapter B A leaves of a change D costs 1/2 sum_i G_i (D - B A)_i H (D - B A)_i^T nats per token (`calibration.py`). With H = L L^T that is
the squared distance of sqrt(G) B A L from sqrt(G) D L, which is least where B A is the truncated singular value decomposition of the latter (Eckart and
Young, 1936); for errors of quantization: Zhang et al., QERA, 2024.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np
from threadpoolctl import threadpool_limits

from protocol.errors import ModelFileError, RequestError
from server.diagnosis.weights import Floats
from server.releases.adapter_files import DOWN, UP
from server.requantize.adapter_file import Parts, architecture_of, write_packed
from server.requantize.calibration import Calibration
from server.requantize.model import ModelFile, opened_gguf, read_shape, tensor_name
from server.requantize.transformer import MATRICES, Array
from server.requantize.work import DAMPING

_WORTH_MIN: Final = 1e-6  # of the mean: an output that the text never needed is not divided by nothing


def write_factored(
    target: Path,
    base: Path,
    calibration: Calibration,
    rank: int,
    out: Path,
    report: Callable[[str], None],
    workers: int | None = None,
) -> None:
    """Write the adapter that leads from one model to another as far as its rank goes. Embedding, head and norms stay as they are.

    Args:
        target: In floats, GGUF.
        base: What the adapter shall be added to, or the same in floats.
        calibration: Of the target.
        rank: Of each matrix.
        out: Appears under its name when it is whole.
        report: Takes lines about the progress.
        workers: Threads; None for as many as there are processors.

    Raises:
        RequestError: A matrix has no more rows or columns than the rank.
        ModelFileError: The files do not belong together, or one is damaged.
        StorageError: The result cannot be written.
    """
    parts: Parts = {}
    with opened_gguf(target) as new, opened_gguf(base) as old, threadpool_limits(workers):
        layers = read_shape(new).layers
        for layer in range(layers):
            for name in (tensor_name(layer, matrix) for matrix in MATRICES):
                change = _change(new, old, name)
                if rank >= min(change.shape):
                    raise RequestError(
                        f"a rank of {rank} is none for {name}, which has {change.shape[0]} x {change.shape[1]} weights",
                        hint="take a lower one",
                    )
                if not change.any():
                    continue
                down, up = factors(change, *_metric(calibration, name, change), rank)
                parts |= {f"{name}{DOWN}": down, f"{name}{UP}": up}
            report(f"adapter of rank {rank}: layer {layer + 1} of {layers}")
        if not parts:
            raise RequestError(
                f"{target} and {base} have the same matrices: an adapter has nothing to change"
            )
        write_packed(out, architecture_of(new), float(rank), parts)


def factors(change: Array, inputs: Array, outputs: Array, rank: int) -> tuple[Floats, Floats]:
    """A and B of the B A that is nearest to a change.

    Args:
        change: D, shape (rows, columns).
        inputs: H, positive definite, shape (columns, columns).
        outputs: G, positive, shape (rows,).
        rank: Columns of B.

    Returns:
        A of shape (rank, columns) and B of shape (rows, rank), of like size.
    """
    root = np.linalg.cholesky(inputs.astype(np.float64))
    worth = np.sqrt(outputs.astype(np.float64))[:, None]
    weighted: Array = worth * (change.astype(np.float64) @ root)
    # The decomposition by the eigenvectors of the smaller of both products: what is projected onto them is its truncation.
    if weighted.shape[0] <= weighted.shape[1]:
        left = _strongest(weighted @ weighted.T, rank)
        right: Array = left.T @ weighted
    else:
        right = _strongest(weighted.T @ weighted, rank).T
        left = weighted @ right.T
    up = left / worth
    down = np.linalg.solve(root.T, right.T).T
    # A row of A and the column of B that belongs to it may share their size in any way: alike, so that few bits hold both.
    tiny = np.finfo(np.float64).tiny
    balance = np.sqrt(np.linalg.norm(up, axis=0) / np.maximum(np.linalg.norm(down, axis=1), tiny))
    down, up = down * balance[:, None], up / np.maximum(balance, tiny)
    return down.astype(np.float32), up.astype(np.float32)


def _strongest(symmetric: Array, count: int) -> Array:
    """Eigenvectors of the largest eigenvalues, as columns."""
    vectors: Array = np.linalg.eigh(symmetric)[1]
    return vectors[:, -count:]


def _change(new: ModelFile, old: ModelFile, name: str) -> Floats:
    target, base = new.floats(name), old.values(name)
    if target.shape != base.shape:
        raise ModelFileError(
            f"{new.path}: {name} has the shape {target.shape}, in {old.path} it is {base.shape}",
            hint="give two versions of one model",
        )
    change = np.asarray(target - base, np.float32)
    if not np.isfinite(change).all():
        raise ModelFileError(f"{name}: there are weights that are no numbers")
    return change


def _metric(calibration: Calibration, name: str, change: Floats) -> tuple[Array, Array]:
    inputs, outputs = calibration.inputs(name), calibration.outputs(name)
    if inputs is None or outputs is None:
        raise ModelFileError(f"{calibration.folder}: nothing was measured of {name}", hint="calibrate again")
    moments = np.array(inputs, np.float64)
    diagonal = np.einsum("ii->i", moments)
    diagonal += max(DAMPING * diagonal.mean(), np.finfo(np.float32).tiny)
    worth = np.asarray(outputs, np.float64)
    worth = np.maximum(worth, max(_WORTH_MIN * worth.mean(), np.finfo(np.float32).tiny))
    assert (len(worth), len(moments)) == change.shape
    return moments, worth
