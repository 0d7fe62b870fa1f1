"""Distillation among codes: a chosen file reads text, and codes that keep saying something else than the float model would are moved.

The metric of `calibration.py` looks at each matrix alone, and sees nothing where the new model is sure of what it says: labels that are
drawn from it do not vary there, and what a narrow task changed is just that. Here the gradient of the KL divergence is taken at the
candidate itself, through all layers, over and over on other text (Hinton et al., 2015), and moves latent codes (`latents.py`).

The codes of the layers' matrices move. Token embedding and output matrix stay as they were chosen: their steps are fine and their rows
many, so that a code of theirs brings little.
"""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from protocol.errors import RequestError
from server.adapters.blobs import storage_errors
from server.requantize.codes import LINEAR_LAYOUTS, CodedRows, Codes
from server.requantize.latents import NEAREST, Latents, threshold_for
from server.requantize.model import (
    EMBEDDING,
    OUTPUT_NORM,
    ModelFile,
    coded_rows,
    head_of,
    layer_matrices,
    read_layer,
    read_shape,
    tensor_name,
)
from server.requantize.transformer import (
    MATRICES,
    Array,
    LayerTrace,
    Taps,
    backward_layer,
    distilled_head,
    forward_layer,
    rms_norm,
)

Tokens = npt.NDArray[np.int32]

RUNS_A_STEP: Final = 4
RUN_TOKENS: Final = 160
"""Some hundred tokens a step are enough where every step sees others; each run is one thread's work at a time."""

STEPS_MAX: Final = 2_000

RATE: Final = 0.002
"""Steps of a code that a typical latent goes at the start; at the end a twentieth."""

_RATE_END: Final = 0.05
_WARM_UP: Final = 5
"""Steps until the rate is reached: the first gradients are of little text."""

_SEED: Final = 11
_REPORT_EVERY: Final = 4


def check_distillable(installed: ModelFile, text: Tokens) -> None:
    """Refuse what cannot be distilled.

    Args:
        installed: A quantized file; a candidate has its layouts.
        text: What is to be read.

    Raises:
        RequestError: The text is too short, or no matrix has codes.
        ModelFileError: As `read_shape`.
    """
    if len(text) < RUN_TOKENS:
        raise RequestError(
            f"distillation reads runs of {RUN_TOKENS} tokens, the calibration text has {len(text)}",
            hint="give more text",
        )
    if not coded_matrices(installed):
        raise RequestError(
            f"{installed.path}: no matrix of a layer has codes that distillation can move",
            hint="leave out --distill",
        )


def coded_matrices(model: ModelFile) -> list[str]:
    """The matrices of layers whose codes distillation moves."""
    return [name for name in layer_matrices(model) if model.region(name).layout in LINEAR_LAYOUTS]


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
        runs = self._runs(steps)
        wanted = self._wanted(runs.reshape(-1, RUN_TOKENS)).reshape(*runs.shape, -1)
        head = self.new.floats(head_of(self.new))
        divergences: list[float] = []
        for step in range(steps):
            self.room_for(room)
            divergences.append(self._step(runs[step], wanted[step], head, _rate(step, steps), step))
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

    def _runs(self, steps: int) -> Tokens:
        """Runs of tokens from anywhere in the text, shape (steps, runs, tokens)."""
        draws = np.random.default_rng(_SEED)
        starts = draws.integers(0, len(self.text) - RUN_TOKENS + 1, (steps, RUNS_A_STEP))
        return np.asarray(self.text[starts[..., None] + np.arange(RUN_TOKENS)], np.int32)

    def _wanted(self, runs: Tokens) -> Array:
        """What the float model's head takes, for all runs at once, shape (runs, tokens, width)."""
        shape = read_shape(self.new)
        hidden = list(self.new.floats(EMBEDDING)[runs][:, None])
        for layer in range(shape.layers):
            self.report(f"distillation: float model, layer {layer + 1} of {shape.layers}")
            weights = read_layer(self.new, layer)
            hidden = list(self.pool.map(lambda one, w=weights: forward_layer(shape, w, one)[0], hidden))
        return rms_norm(np.concatenate(hidden), self.new.floats(OUTPUT_NORM), shape.epsilon)[0]

    def _step(self, runs: Tokens, wanted: Array, wanted_head: Array, rate: float, step: int) -> float:
        """One way through the candidate and back, on which its latents move; says what the divergence was, nats per token."""
        shape, model = read_shape(self.candidate), self.candidate
        hidden = list(model.values(EMBEDDING)[runs][:, None])
        traces: list[list[LayerTrace]] = []
        for layer in range(shape.layers):
            weights = self._layer(layer)
            passed = list(self.pool.map(partial(forward_layer, shape, weights), hidden))
            hidden = [after for after, _ in passed]
            traces.append([trace for _, trace in passed])
        norm, head = model.values(OUTPUT_NORM), model.values(head_of(model))
        said = list(
            self.pool.map(
                lambda one, want: distilled_head(one[0], norm, head, shape.epsilon, want, wanted_head),
                hidden,
                wanted,
            )
        )
        upstream = [at_hidden[None] for _, at_hidden in said]
        for layer in reversed(range(shape.layers)):
            weights = self._layer(layer)
            back = list(self.pool.map(partial(backward_layer, shape, weights), traces.pop(), upstream))
            upstream = [at_input for at_input, _ in back]
            follow = partial(self._follow, layer, [taps for _, taps in back], rate, step)
            list(self.pool.map(follow, MATRICES))
        return sum(each for each, _ in said) / runs.size

    def _follow(self, layer: int, taps: list[Taps], rate: float, step: int, name: str) -> None:
        """Move the latents of a matrix against the gradient that was measured of it."""
        full = tensor_name(layer, name)
        latents = self._latents.get(full)
        if latents is None:
            return
        inputs = np.concatenate([each[name][0] for each in taps])
        at_outputs = np.concatenate([each[name][1] for each in taps])
        gradient = at_outputs.T @ inputs
        gradient *= self._rows(full).steps / np.float32(len(inputs))
        latents.follow(gradient, rate, step)

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


def _rate(step: int, steps: int) -> float:
    """Warm-up, then half a cosine."""
    falling = _RATE_END + (1 - _RATE_END) * 0.5 * (1 + math.cos(math.pi * step / steps))
    return RATE * min(1.0, (step + 1) / _WARM_UP) * falling
