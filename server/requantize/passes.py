"""Through a model layer by layer, forward and back, with the states between layers on disk.

Memory holds one layer's weights and what is measured of it, whatever the size of the model; what was interrupted goes on at the layer
where it stood. Runs of tokens go through a layer in batches of one size, several at a time: sums do not depend on how many.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

import numpy as np
import numpy.typing as npt

from server.adapters.blobs import storage_errors
from server.requantize.model import EMBEDDING, ModelFile, read_layer
from server.requantize.transformer import Array, Shape, Weights, forward_layer

_BATCH: Final = 2
"""Runs that go through a layer together."""

Measured = TypeVar("Measured")
Tokens = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class LayerPass:
    """One model and some runs of tokens.

    Attributes:
        model: The model.
        shape: Its size.
        runs: Tokens, shape (runs, tokens).
        states: Folder of the states between layers: `hidden.n` is what layer n takes, `upstream.n` the gradient there.
        pool: Threads.
        report: Takes lines about the progress.
        what: Names the pass in these lines.
    """

    model: ModelFile
    shape: Shape
    runs: Tokens
    states: Path
    pool: ThreadPoolExecutor
    report: Callable[[str], None]
    what: str

    def forward(self) -> Array:
        """States after the last layer, shape (runs, tokens, width)."""
        layers = self.shape.layers
        first = max((n for n in range(layers + 1) if self._hidden(n).exists()), default=None)
        if first is None:
            save(self._hidden(0), self.model.values(EMBEDDING)[self.runs])
            first = 0
        for layer in range(first, layers):
            self.report(f"{self.what}: forward through layer {layer + 1} of {layers}")
            weights, hidden = read_layer(self.model, layer), np.load(self._hidden(layer))
            parts = self.pool.map(
                lambda part, w=weights, h=hidden: forward_layer(self.shape, w, h[part])[0], self._batches()
            )
            save(self._hidden(layer + 1), np.concatenate(list(parts)))
        return np.asarray(np.load(self._hidden(layers)))

    def begin_backward(self, upstream: Array) -> None:
        """Take the gradient at the last layer's output."""
        save(self._upstream(self.shape.layers), upstream)

    @property
    def is_backward(self) -> bool:
        """Whether the way back has begun."""
        return any(self._upstream(layer).exists() for layer in range(self.shape.layers + 1))

    def backward(
        self,
        measure: Callable[[Shape, Weights, Array, Array], tuple[Array, Measured]],
        keep: Callable[[int, list[Measured]], None],
    ) -> Array:
        """Go back through all layers that are left.

        Args:
            measure: From a layer's inputs and the gradient at its output to the gradient at its inputs, and what was measured.
            keep: Stores what was measured of a layer, batch by batch.

        Returns:
            The gradient at the first layer's inputs.
        """
        layers = self.shape.layers
        first = min(layer for layer in range(layers + 1) if self._upstream(layer).exists())
        for layer in range(first - 1, -1, -1):
            self.report(f"{self.what}: backward through layer {layer + 1} of {layers}")
            weights = read_layer(self.model, layer)
            hidden, upstream = np.load(self._hidden(layer)), np.load(self._upstream(layer + 1))
            parts = list(
                self.pool.map(
                    lambda part, w=weights, h=hidden, u=upstream: measure(self.shape, w, h[part], u[part]),
                    self._batches(),
                )
            )
            keep(layer, [measured for _, measured in parts])
            save(self._upstream(layer), np.concatenate([before for before, _ in parts]))
            self._upstream(layer + 1).unlink()
            self._hidden(layer + 1).unlink(missing_ok=True)
        return np.asarray(np.load(self._upstream(0)))

    def _hidden(self, layer: int) -> Path:
        return self.states / f"hidden.{layer}.npy"

    def _upstream(self, layer: int) -> Path:
        return self.states / f"upstream.{layer}.npy"

    def _batches(self) -> list[slice]:
        return [slice(start, start + _BATCH) for start in range(0, len(self.runs), _BATCH)]


def save(path: Path, values: Array) -> None:
    """Write an array, under its name only when it is whole.

    Raises:
        StorageError: It cannot be written.
    """
    partial = path.with_name(f".partial-{path.name}")
    with storage_errors(path):
        with partial.open("wb") as file:
            np.save(file, values)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
