"""A quantized model reads text beside the float model, some hundred tokens at a time: how far from it it is, and the gradient of that by each weight.

The float model is the teacher, the quantized one its student (Hinton et al., 2015). What the student's weights are is for others to say, layer by
layer, and so is what becomes of the gradients: `distillation.py` moves codes, `extrapolation.py` moves what they aim at.
"""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Final, Self

import numpy as np
import numpy.typing as npt

from protocol.errors import RequestError
from server.diagnosis.weights import Floats
from server.requantize.codes import LINEAR_LAYOUTS
from server.requantize.model import (
    EMBEDDING,
    OUTPUT_NORM,
    ModelFile,
    head_of,
    layer_matrices,
    read_layer,
    read_shape,
)
from server.requantize.transformer import (
    Array,
    LayerTrace,
    Taps,
    Weights,
    backward_layer,
    distilled_head,
    forward_layer,
    rms_norm,
)

Tokens = npt.NDArray[np.int32]

RUNS_A_STEP: Final = 4
RUN_TOKENS: Final = 160
"""Some hundred tokens a step are enough where every step sees others; each run is one thread's work at a time."""

_SEED: Final = 11


def check_readable(installed: ModelFile, text: Tokens, option: str) -> None:
    """Refuse what cannot be read, or has nothing that could be learned from it.

    Args:
        installed: A quantized file; a candidate has its layouts.
        text: What is to be read.
        option: Of the command, which asks for it.

    Raises:
        RequestError: The text is too short, or no matrix has codes.
        ModelFileError: As `read_shape`.
    """
    if len(text) < RUN_TOKENS:
        raise RequestError(
            f"{option} reads runs of {RUN_TOKENS} tokens, the calibration text has {len(text)}",
            hint="give more text",
        )
    if not coded_matrices(installed):
        raise RequestError(
            f"{installed.path}: no matrix of a layer has codes that could move",
            hint=f"leave out {option}",
        )


def coded_matrices(model: ModelFile) -> list[str]:
    """The matrices of layers whose codes can be chosen."""
    return [name for name in layer_matrices(model) if model.region(name).layout in LINEAR_LAYOUTS]


@dataclass(frozen=True, slots=True)
class Student:
    """A model that reads, and what its teacher says of the same text.

    Attributes:
        model: The quantized file.
        runs: Tokens, shape (steps, runs, tokens).
        wanted: What the teacher's output matrix takes there, shape (steps, runs, tokens, width).
        teacher_head: That matrix.
        embedding: The student's token embedding.
        norm: Its last normalization.
        head: Its output matrix.
        pool: Threads; how many changes nothing but the time.
    """

    model: ModelFile
    runs: Tokens
    wanted: Array
    teacher_head: Array
    embedding: Array
    norm: Array
    head: Array
    pool: ThreadPoolExecutor

    @classmethod
    def begin(
        cls,
        teacher: ModelFile,
        model: ModelFile,
        text: Tokens,
        steps: int,
        pool: ThreadPoolExecutor,
        report: Callable[[str], None],
        seed: int = 0,
    ) -> Self:
        """Take runs of tokens from anywhere in a text, and let the teacher read all of them.

        Args:
            teacher: The float model.
            model: The quantized file.
            text: At least `RUN_TOKENS` tokens.
            steps: How often `step` will be called.
            pool: Threads.
            report: Takes lines about the progress.
            seed: Another one takes other runs.
        """
        draws = np.random.default_rng((_SEED, seed) if seed else _SEED)
        starts = draws.integers(0, len(text) - RUN_TOKENS + 1, (steps, RUNS_A_STEP))
        runs = np.asarray(text[starts[..., None] + np.arange(RUN_TOKENS)], np.int32)
        shape = read_shape(teacher)
        hidden = list(teacher.floats(EMBEDDING)[runs.reshape(-1, RUN_TOKENS)][:, None])
        for layer in range(shape.layers):
            report(f"float model: layer {layer + 1} of {shape.layers}")
            weights = read_layer(teacher, layer)
            hidden = list(pool.map(lambda one, w=weights: forward_layer(shape, w, one)[0], hidden))
        wanted = rms_norm(np.concatenate(hidden), teacher.floats(OUTPUT_NORM), shape.epsilon)[0]
        embedding, head = model.values(EMBEDDING), head_of(model)
        return cls(
            model,
            runs,
            wanted.reshape(*runs.shape, -1),
            teacher.floats(head_of(teacher)),
            embedding,
            model.values(OUTPUT_NORM),
            embedding if head == EMBEDDING else model.values(head),
            pool,
        )

    def step(
        self,
        number: int,
        weights_of: Callable[[int], Weights],
        follow: Callable[[int, list[Taps]], None],
    ) -> float:
        """One way through the student and back.

        Args:
            number: Of the step, whose runs are read.
            weights_of: What a layer's weights are; asked on the way forward and on the way back.
            follow: Takes a layer's number and, of each run, what its matrices took and the gradients at their outputs of the divergence, summed
                over the tokens; from the last layer to the first, after the layer's weights were asked for.

        Returns:
            KL(teacher || student), nats per token.
        """
        shape = read_shape(self.model)
        hidden = list(self.embedding[self.runs[number]][:, None])
        traces: list[list[LayerTrace]] = []
        for layer in range(shape.layers):
            weights = weights_of(layer)
            passed = list(self.pool.map(partial(forward_layer, shape, weights), hidden))
            hidden = [after for after, _ in passed]
            traces.append([trace for _, trace in passed])
        norm, head, epsilon = self.norm, self.head, shape.epsilon
        said = list(
            self.pool.map(
                lambda one, want: distilled_head(one[0], norm, head, epsilon, want, self.teacher_head),
                hidden,
                self.wanted[number],
            )
        )
        upstream = [at_hidden[None] for _, at_hidden in said]
        for layer in reversed(range(shape.layers)):
            weights = weights_of(layer)
            back = list(self.pool.map(partial(backward_layer, shape, weights), traces.pop(), upstream))
            upstream = [at_input for at_input, _ in back]
            follow(layer, [taps for _, taps in back])
        divergence = sum(each for each, _ in said)
        return divergence / int(self.runs[number].size)


def gradient_of(taps: list[Taps], name: str, units: Floats | None = None) -> Floats:
    """Of the divergence by the weights of a matrix, from what `Student.step` gives of a layer.

    Args:
        taps: Of all runs.
        name: Of the matrix, without its layer.
        units: What each weight is counted in, of the matrix's shape; None for 1.

    Returns:
        Nats per token and unit, of the matrix's shape.
    """
    inputs = np.concatenate([each[name][0] for each in taps])
    at_outputs = np.concatenate([each[name][1] for each in taps])
    gradient = at_outputs.T @ inputs
    gradient /= np.float32(len(inputs))
    if units is not None:
        gradient *= units
    return np.asarray(gradient)


def rate_at(step: int, steps: int, warm_up: int, end: float) -> float:
    """Share of the full rate: a warm-up, then half a cosine down to a share that is left at the end."""
    falling = end + (1 - end) * 0.5 * (1 + math.cos(math.pi * step / steps))
    return min(1.0, (step + 1) / warm_up) * falling
