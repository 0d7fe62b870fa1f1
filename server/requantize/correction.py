"""What is really lost by a candidate: the gradient of its KL divergence from the float model, by every weight.

The metric of `calibration.py` looks at each matrix as if all others were exact. Errors of many layers add up, and cancel; this
gradient sees it, at the candidate's own weights and with its own inputs.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

from server.adapters.blobs import storage_errors
from server.requantize.calibration import Calibration
from server.requantize.model import OUTPUT_NORM, head_of, opened_gguf, read_shape, tensor_name
from server.requantize.passes import LayerPass, save
from server.requantize.transformer import (
    MATRICES,
    Array,
    Shape,
    Taps,
    Weights,
    backward_layer,
    distilled_head,
    forward_layer,
)


@dataclass(frozen=True, slots=True)
class Slopes:
    """Gradients on disk.

    Attributes:
        folder: Where they lie.
        divergence: KL of the candidate from the float model on the calibration text, nats per token.
    """

    folder: Path
    divergence: float

    def of(self, name: str) -> Array | None:
        """How much each weight's growth lowers the divergence, nats per token; None of what was not looked at."""
        path = self.folder / f"{name}.npy"
        return np.load(path, mmap_mode="r") if path.exists() else None


def measure_divergence(
    new: Path,
    candidate: Path,
    calibration: Calibration,
    folder: Path,
    report: Callable[[str], None],
    *,
    workers: int | None = None,
    runs_max: int | None = None,
) -> float:
    """KL of a candidate from the float model on the calibration text, nats per token. As `measure_slopes`, without the way back.

    Args:
        new: The float model.
        candidate: A quantized file of it.
        calibration: Of the float model.
        folder: Takes states between layers; emptied before.
        report: Takes lines about the progress.
        workers: Threads; None for as many as there are processors.
        runs_max: How many of the runs of tokens are read, taken at even distances; None for all.
    """
    shutil.rmtree(folder, ignore_errors=True)
    every = 1 if runs_max is None else -(-calibration.sequences // runs_max)
    with _opened(candidate, calibration, folder / "states", report, workers, "divergence", every) as through:
        divergence, _ = _compare(through, new, calibration, every)
    shutil.rmtree(folder)
    return divergence


def measure_slopes(
    new: Path,
    candidate: Path,
    calibration: Calibration,
    folder: Path,
    report: Callable[[str], None],
    *,
    workers: int | None = None,
) -> Slopes:
    """Go through the candidate with the calibration's text, forward and back.

    Args:
        new: The float model.
        candidate: A quantized file of it.
        calibration: Of the float model: its tokens, and what its head takes.
        folder: Takes the gradients, four bytes for each weight of the layers; emptied before.
        report: Takes lines about the progress.
        workers: Threads; None for as many as there are processors.
    """
    shutil.rmtree(folder, ignore_errors=True)
    with _opened(candidate, calibration, folder / "states", report, workers, "correction") as through:
        divergence, upstream = _compare(through, new, calibration)
        through.begin_backward(upstream)

        def keep(layer: int, parts: list[Taps]) -> None:
            def slope(name: str) -> Array:
                inputs = np.concatenate([part[name][0] for part in parts])
                at_outputs = np.concatenate([part[name][1] for part in parts])
                return np.asarray(at_outputs.T @ inputs / np.float32(-through.runs.size))

            for name, values in zip(MATRICES, through.pool.map(slope, MATRICES), strict=True):
                save(folder / f"{tensor_name(layer, name)}.npy", values)

        through.backward(_layer_taps, keep)
    shutil.rmtree(folder / "states")
    return Slopes(folder, divergence)


@contextmanager
def _opened(
    candidate: Path,
    calibration: Calibration,
    states: Path,
    report: Callable[[str], None],
    workers: int | None,
    what: str,
    every: int = 1,
) -> Iterator[LayerPass]:
    with storage_errors(states):
        states.mkdir(parents=True)
    with (
        opened_gguf(candidate) as opened,
        threadpool_limits(1),
        ThreadPoolExecutor(workers or len(os.sched_getaffinity(0))) as pool,
    ):
        yield LayerPass(opened, read_shape(opened), calibration.runs()[::every], states, pool, report, what)


def _compare(through: LayerPass, new: Path, calibration: Calibration, every: int = 1) -> tuple[float, Array]:
    """The mean divergence, and its gradient at the last layer's output, by which the sum over tokens grows."""
    hidden = through.forward()
    normed = calibration.normed()
    teacher_normed = normed.reshape(*calibration.runs().shape, normed.shape[-1])[::every]
    model = through.model
    norm, head = model.values(OUTPUT_NORM), model.values(head_of(model))
    with opened_gguf(new) as fresh:
        teacher_head = fresh.values(head_of(fresh))
    epsilon = through.shape.epsilon
    said = list(
        through.pool.map(
            lambda run: distilled_head(hidden[run], norm, head, epsilon, teacher_normed[run], teacher_head),
            range(len(hidden)),
        )
    )
    divergence = sum(each for each, _ in said) / through.runs.size
    return divergence, np.stack([at_hidden for _, at_hidden in said])


def _layer_taps(shape: Shape, weights: Weights, hidden: Array, upstream: Array) -> tuple[Array, Taps]:
    _, trace = forward_layer(shape, weights, hidden)
    return backward_layer(shape, weights, trace, upstream)
