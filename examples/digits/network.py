"""A multilayer perceptron in numpy: forward, backward, Adam. No files, no formats.

Everything is float32 and every random draw comes from the generator that the caller passes, so one seed gives one
network on one machine.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Self

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]

# Adam's constants as published (Kingma and Ba, 2015, algorithm 1).
_FIRST_MOMENT_DECAY = 0.9
_SECOND_MOMENT_DECAY = 0.999
_EPSILON = 1e-8


@dataclass(slots=True)
class Network:
    """Weights of a classifier with ReLU between its layers, and the optimizer's moments.

    Attributes:
        weights: One matrix per layer, shape (inputs, outputs).
        biases: One vector per layer, shape (outputs,).
    """

    weights: list[Floats]
    biases: list[Floats]
    _steps: int = 0
    _moments: list[tuple[Floats, Floats]] = field(default_factory=list)

    @classmethod
    def initialized(cls, sizes: Sequence[int], rng: np.random.Generator) -> Self:
        """Draws the weights as He et al. (2015) do for ReLU; the biases are zero."""
        pairs = list(pairwise(sizes))
        return cls(
            [
                rng.normal(0.0, np.sqrt(2.0 / inputs), (inputs, outputs)).astype(np.float32)
                for inputs, outputs in pairs
            ],
            [np.zeros(outputs, np.float32) for _, outputs in pairs],
        )

    def activations(self, images: Floats) -> list[Floats]:
        """The input of each layer, and the logits last."""
        layers = [images]
        for position, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            out = layers[-1] @ weight + bias
            layers.append(out if position == len(self.weights) - 1 else np.maximum(out, 0.0))
        return layers

    def gradients(self, images: Floats, labels: Integers) -> tuple[float, list[Floats]]:
        """Mean cross-entropy and its gradients, for all weights and then for all biases."""
        layers = self.activations(images)
        logits = layers[-1] - layers[-1].max(axis=1, keepdims=True)
        log_probabilities = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        rows = np.arange(len(labels))
        loss = -float(log_probabilities[rows, labels].mean())
        upstream = np.exp(log_probabilities)
        upstream[rows, labels] -= 1.0
        upstream /= len(labels)
        of_weights: list[Floats] = []
        of_biases: list[Floats] = []
        for position in reversed(range(len(self.weights))):
            of_weights.insert(0, layers[position].T @ upstream)
            of_biases.insert(0, upstream.sum(axis=0))
            if position:
                upstream = (upstream @ self.weights[position].T) * (layers[position] > 0.0)
        return loss, of_weights + of_biases

    def train(
        self,
        images: Floats,
        labels: Integers,
        *,
        epochs: int,
        rate: float,
        batch: int,
        rng: np.random.Generator,
    ) -> None:
        """Runs Adam over shuffled batches; called again, it goes on where it was.

        Args:
            images: Shape (n, inputs).
            labels: Shape (n,), class numbers.
            epochs: How often every image is seen.
            rate: Adam's step size.
            batch: Images per step.
            rng: Decides the order of the images.
        """
        for _ in range(epochs):
            order = rng.permutation(len(images))
            for start in range(0, len(order), batch):
                chosen = order[start : start + batch]
                _, gradients = self.gradients(images[chosen], labels[chosen])
                self._step(gradients, rate)

    def _step(self, gradients: list[Floats], rate: float) -> None:
        parameters = self.weights + self.biases
        if not self._moments:
            self._moments = [(np.zeros_like(each), np.zeros_like(each)) for each in parameters]
        self._steps += 1
        correction = np.sqrt(1.0 - _SECOND_MOMENT_DECAY**self._steps) / (
            1.0 - _FIRST_MOMENT_DECAY**self._steps
        )
        rate_now = np.float32(rate * correction)
        for parameter, (first, second), gradient in zip(parameters, self._moments, gradients, strict=True):
            np.add(first * _FIRST_MOMENT_DECAY, gradient * (1.0 - _FIRST_MOMENT_DECAY), out=first)
            np.add(second * _SECOND_MOMENT_DECAY, gradient**2 * (1.0 - _SECOND_MOMENT_DECAY), out=second)
            np.subtract(parameter, rate_now * first / (np.sqrt(second) + np.float32(_EPSILON)), out=parameter)
