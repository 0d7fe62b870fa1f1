"""Distillation among codes: a chosen file reads text, and codes that keep saying something else than the float model would are moved.

The metric of `calibration.py` looks at each matrix alone, and sees nothing where the new model is sure of what it says: labels that are
drawn from it do not vary there, and what a narrow task changed is just that. Here the gradient of the KL divergence is taken at the
candidate itself, through all layers, over and over on other text (Hinton et al., 2015), and moves latent codes (`latents.py`).

The codes of the layers' matrices move. Token embedding and output matrix stay as they were chosen: their steps are fine and their rows
many, so that a code of theirs brings little.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np

from server.adapters.blobs import storage_errors
from server.requantize.codes import CodedRows, Codes
from server.requantize.latents import NEAREST, Latents, threshold_for
from server.requantize.model import ModelFile, coded_rows, read_layer, tensor_name
from server.requantize.student import Student, Tokens, coded_matrices, gradient_of, rate_at
from server.requantize.transformer import MATRICES, Array, Taps

STEPS_MAX: Final = 2_000

RATE: Final = 0.002
"""Steps of a code that a typical latent goes at the start; at the end a twentieth."""

_RATE_END: Final = 0.05
_WARM_UP: Final = 5
"""Steps until the rate is reached: the first gradients are of little text."""

_SEED: Final = 11
_REPORT_EVERY: Final = 4


@dataclass(slots=True)
class Distillation:
    """A file on its way nearer to the float model.

    Attributes:
        new: The new model in floats.
        installed: The quantized file that devices have.
        candidate: The file that is begun with: its scales and float tensors, and all codes that are not of the layers' matrices.
        text: What is read, tokens.
        pool: Threads; how many changes nothing but the time.
        report: Takes lines about the progress.
    """

    new: ModelFile
    installed: ModelFile
    candidate: ModelFile
    text: Tokens
    pool: ThreadPoolExecutor
    report: Callable[[str], None]
    _latents: dict[str, Latents] = field(default_factory=dict)
    _installed: dict[str, Codes] = field(default_factory=dict)
    _threshold: float = NEAREST

    def begin(self) -> None:
        """Take latents from the candidate's codes and the new weights."""
        names = coded_matrices(self.candidate)

        def latents(number: int, name: str) -> Latents:
            rows, target = self._rows(name), self.new.floats(name)
            draws = np.random.default_rng((_SEED, number))
            return Latents.begin(rows, rows.codes, self._installed[name], target, draws)

        self._installed = {name: coded_rows(self.installed, name).codes for name in names}
        self._latents = dict(zip(names, self.pool.map(latents, range(len(names)), names), strict=True))
        self._threshold = NEAREST

    def moved(self) -> int:
        """How many codes of the layers' matrices the candidate has that differ from the installed ones."""
        return sum(
            int(np.count_nonzero(self._rows(name).codes != installed))
            for name, installed in self._installed.items()
        )

    def room_for(self, codes: int) -> None:
        """From now on about so many codes of the layers' matrices differ from the installed ones, or fewer."""
        self._threshold = threshold_for(self._latents.values(), codes)

    def run(self, steps: int, room: int) -> None:
        """Read as many steps of text.

        Args:
            steps: 1 to `STEPS_MAX`.
            room: As `room_for`.
        """
        student = Student.begin(self.new, self.candidate, self.text, steps, self.pool, self.report)
        divergences: list[float] = []
        for step in range(steps):
            self.room_for(room)
            follow = partial(self._follow, RATE * rate_at(step, steps, _WARM_UP, _RATE_END), step)
            divergences.append(student.step(step, self._layer, follow))
            if step % _REPORT_EVERY == _REPORT_EVERY - 1 or step == steps - 1:
                mean = sum(divergences[-_REPORT_EVERY:]) / len(divergences[-_REPORT_EVERY:])
                self.report(f"distillation: step {step + 1} of {steps}, divergence {mean:.4g}")
        self.room_for(room)

    def write(self, out: Path) -> dict[str, int]:
        """Put the codes into a file of the candidate's layout; says how many differ from the installed ones, by tensor.

        Raises:
            StorageError: It cannot be written.
        """
        changed = {}
        with storage_errors(out), out.open("r+b") as file:
            for name in self._latents:
                rows = self._rows(name)
                codes = self._codes(name, rows)
                file.seek(self.candidate.region(name).offset)
                file.write(rows.joined(codes))
                changed[name] = int(np.count_nonzero(codes != self._installed[name]))
        return changed

    def _follow(self, rate: float, step: int, layer: int, taps: list[Taps]) -> None:
        """Move the latents of a layer against the gradients that were measured of it."""
        list(self.pool.map(lambda name: self._follow_matrix(rate, step, layer, taps, name), MATRICES))

    def _follow_matrix(self, rate: float, step: int, layer: int, taps: list[Taps], name: str) -> None:
        full = tensor_name(layer, name)
        latents = self._latents.get(full)
        if latents is None:
            return
        latents.follow(gradient_of(taps, name, self._rows(full).steps), rate, step)

    def _layer(self, layer: int) -> dict[str, Array]:
        """The candidate's weights with the codes that the latents say now."""
        matrices = self.pool.map(lambda name: self._matrix(tensor_name(layer, name)), MATRICES)
        return read_layer(self.candidate, layer, ()) | dict(zip(MATRICES, matrices, strict=True))

    def _matrix(self, name: str) -> Array:
        if name not in self._latents:
            return self.candidate.values(name)
        rows = self._rows(name)
        return rows.weights(self._codes(name, rows))

    def _codes(self, name: str, rows: CodedRows) -> Codes:
        return self._latents[name].codes(rows, self._installed[name], self._threshold)

    def _rows(self, name: str) -> CodedRows:
        """As the candidate was to begin with."""
        return coded_rows(self.candidate, name)
