"""What a model's layers see and what their outputs are worth: the metric in which a quantized file is chosen.

For each matrix, with inputs x and gradients g at its outputs of the loss of labels drawn from the model itself (so that their
squares are the Fisher information, the curvature of the KL divergence):

- H = sum |g|^2 x x^T / sum |g|^2, the second moments of the inputs. The weight takes out tokens that nothing depends on: the
  huge activations of the first token ("attention sinks", Xiao et al., 2023) would own H otherwise.
- G = E[g_i^2], what an error of output i is worth, in nats per token.

An error E of the weights then costs 1/2 sum_i G_i E_i H E_i^T nats per token (the factors of Martens and Grosse, 2015). The model
goes layer by layer, forward and back, with the states between layers on disk: memory holds one layer, and what was interrupted goes on.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from protocol.errors import RequestError, StorageError
from server.adapters.blobs import storage_errors, write_file
from server.adapters.lock import FolderLock
from server.requantize.model import (
    EMBEDDING,
    OUTPUT_NORM,
    head_of,
    opened_gguf,
    read_shape,
    sha256_of,
    tensor_name,
)
from server.requantize.passes import LayerPass, save
from server.requantize.texts import digest_of_tokens
from server.requantize.transformer import (
    Array,
    Shape,
    Taps,
    Weights,
    backward_layer,
    forward_layer,
    sampled_head,
)

CALIBRATED_BY: Final = 1
"""Grows when something else is computed, so that nothing from before is believed."""

SEQUENCES: Final = 40
SEQUENCE_TOKENS: Final = 256

INPUTS_OF: Final = {
    "attn_q": "attn_in",
    "attn_k": "attn_in",
    "attn_v": "attn_in",
    "attn_output": "attn_mixed",
    "ffn_gate": "ffn_in",
    "ffn_up": "ffn_in",
    "ffn_down": "ffn_mid",
}
"""Matrices that see the same inputs share their second moments."""

_HEAD: Final = "head"
_NORMED: Final = "head.normed"
_RUNS: Final = "runs"
_LABEL_SEED: Final = 5
_DONE: Final = "calibration.json"
_STATES: Final = "states"
_LOCK: Final = "lock"


@dataclass(frozen=True, slots=True)
class Calibration:
    """Moments on disk, read where they are needed.

    Attributes:
        folder: Where they lie.
        model_sha256: Of the float model that was looked at.
        tokens_sha256: Of the tokens, as little-endian int32.
        sequences: How many runs of tokens were looked at.
        sequence_tokens: Tokens of each.
        text: All tokens that were given, which the runs are taken from.
    """

    folder: Path
    model_sha256: str
    tokens_sha256: str
    sequences: int
    sequence_tokens: int
    text: npt.NDArray[np.int32] = field(repr=False, compare=False)

    @property
    def identity(self) -> tuple[str, str, str]:
        """What a choice depends on: digests of the model, of the runs, and of all of the text, which some choices read."""
        return self.model_sha256, self.tokens_sha256, digest_of_tokens(self.text)

    def inputs(self, name: str) -> Array | None:
        """H of a matrix: second moments of its inputs, shape (columns, columns); None if it is only looked up in."""
        return self._array(f"{inputs_key(name)}.inputs")

    def outputs(self, name: str) -> Array | None:
        """G of a matrix: worth of an error of each output, shape (rows,)."""
        return self._array(f"{name}.outputs")

    def lookups(self, name: str) -> Array | None:
        """Worth of an error of any weight of a row that is looked up, shape (rows,); None of what is no embedding."""
        return self._array(f"{name}.lookups")

    def normed(self) -> Array:
        """What the head of the float model takes, shape (tokens of all runs, width)."""
        return _there(self._array(_NORMED), self.folder)

    def runs(self) -> npt.NDArray[np.int32]:
        """The tokens that were looked at, shape (runs, tokens)."""
        return _there(self._array(_RUNS), self.folder)

    def _array(self, key: str) -> Array | None:
        path = self.folder / f"{key}.npy"
        with storage_errors(path):
            return np.load(path, mmap_mode="r") if path.exists() else None


class _Record(msgspec.Struct, frozen=True):
    """What is written when everything is there."""

    model_sha256: str
    tokens_sha256: str
    sequences: int
    sequence_tokens: int


def calibrate(
    model: Path,
    tokens: npt.NDArray[np.int32],
    folder: Path,
    report: Callable[[str], None],
    *,
    sequences: int = SEQUENCES,
    sequence_tokens: int = SEQUENCE_TOKENS,
    workers: int | None = None,
) -> Calibration:
    """Measure the moments of a float model on some text, or read back what was measured before.

    The same model and tokens give the same moments, whatever the number of workers.

    Args:
        model: A GGUF file with float weights.
        tokens: Text in the model's vocabulary; runs of it are taken at even distances.
        folder: Keeps moments by the digest of model and tokens; made when it is not there.
        report: Takes lines about the progress.
        sequences: Runs of tokens, fewer if the text is short.
        sequence_tokens: Tokens of each run.
        workers: Threads; None for as many as there are processors.

    Raises:
        RequestError: The text is too short, has tokens that the model does not know, or another process calibrates here.
        ModelFileError: The model is quantized, damaged, or of an architecture that is not computed.
        StorageError: The folder cannot be written.
    """
    runs = _runs(tokens, sequences, sequence_tokens)
    with opened_gguf(model) as opened:
        shape = read_shape(opened)
        vocabulary = opened.region(EMBEDDING).dims[0]
        if runs.min() < 0 or runs.max() >= vocabulary:
            raise RequestError(
                f"calibration has the token {runs.max()}, the vocabulary of {model} ends at {vocabulary - 1}",
                hint="make the tokens with the tokenizer of that model",
            )
        digest = digest_of_tokens(runs)
        record = _Record(sha256_of(model), digest, *runs.shape)
        name = f"{CALIBRATED_BY}-{record.model_sha256[:16]}-{digest[:16]}-{sequence_tokens}"
        place = folder / name
        found = Calibration(place, record.model_sha256, digest, runs.shape[0], runs.shape[1], tokens)
        with storage_errors(place):
            place.mkdir(parents=True, exist_ok=True)
            is_done = (place / _DONE).exists()
        if not is_done:
            with _alone(place):
                save(place / f"{_RUNS}.npy", runs)
                with (
                    threadpool_limits(1),
                    ThreadPoolExecutor(workers or len(os.sched_getaffinity(0))) as pool,
                    _states(place) as states,
                ):
                    _measure(LayerPass(opened, shape, runs, states, pool, report, "calibration"), place)
                    write_file(place / _DONE, msgspec.json.encode(record))
    return found


@contextmanager
def _alone(place: Path) -> Iterator[None]:
    """As long as nobody else writes here."""
    try:
        lock = FolderLock(place / _LOCK)
    except RequestError as error:
        raise RequestError(
            f"{place}: another process calibrates for this model and text",
            hint="wait for it: what it measures is used again",
        ) from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _states(place: Path) -> Iterator[Path]:
    """The folder of what is on its way between layers: there again for a run that goes on, gone after one that has ended."""
    states = place / _STATES
    with storage_errors(states):
        states.mkdir(exist_ok=True)
    yield states
    shutil.rmtree(states, ignore_errors=True)


def _there(values: Array | None, folder: Path) -> Array:
    if values is None:
        raise StorageError(
            f"{folder}: a part of the calibration is missing", hint="remove it, and calibrate again"
        )
    return values


def _runs(tokens: npt.NDArray[np.int32], sequences: int, length: int) -> npt.NDArray[np.int32]:
    count = min(sequences, len(tokens) // length)
    if tokens.ndim != 1 or count < 1:
        raise RequestError(
            f"calibration has {tokens.size} tokens, {length} are needed at least", hint="give more text"
        )
    starts = np.linspace(0, len(tokens) - length, count).astype(np.int64)
    return np.stack([tokens[start : start + length] for start in starts])


def _measure(through: LayerPass, folder: Path) -> None:
    """Forward, and back with moments, all of which end up in the folder."""
    if not through.is_backward:
        _measure_head(through, folder)
    size = through.runs.size

    def keep(layer: int, parts: list[_Moments]) -> None:
        keys = list(dict.fromkeys(INPUTS_OF.values()))
        moments = through.pool.map(lambda key: _input_moments(parts, key), keys)
        for key, values in zip(keys, moments, strict=True):
            save(folder / f"blk.{layer}.{key}.inputs.npy", values)
        for name in INPUTS_OF:
            worth = np.sum([part.squares[name] for part in parts], axis=0) / size
            save(folder / f"{tensor_name(layer, name)}.outputs.npy", worth.astype(np.float32))

    upstream = through.backward(_layer_moments, keep)
    # Each token's share of the text times the squared gradient at its embedding, per weight.
    squares = np.square(upstream, dtype=np.float64).sum(axis=-1).reshape(-1)
    vocabulary = through.model.region(EMBEDDING).dims[0]
    worth = np.bincount(through.runs.reshape(-1), squares, minlength=vocabulary) / (size * upstream.shape[-1])
    save(folder / f"{EMBEDDING}.lookups.npy", worth.astype(np.float32))


def _measure_head(through: LayerPass, folder: Path) -> None:
    hidden = through.forward()
    through.report("calibration: head")
    name = head_of(through.model)
    head = through.model.floats(name)
    norm = through.model.floats(OUTPUT_NORM)
    draws = np.random.default_rng(_LABEL_SEED).random(through.runs.shape)
    epsilon = through.shape.epsilon
    traces = list(
        through.pool.map(
            lambda run: sampled_head(hidden[run], draws[run], norm, head, epsilon), range(len(hidden))
        )
    )
    normed = np.concatenate([trace.normed for trace in traces])
    save(folder / f"{_NORMED}.npy", normed)
    save(folder / f"{_HEAD}.inputs.npy", normed.T @ normed / np.float32(len(normed)))
    worth = np.sum([trace.variance for trace in traces], axis=0) / through.runs.size
    save(folder / f"{name}.outputs.npy", worth.astype(np.float32))
    through.begin_backward(np.stack([trace.at_hidden for trace in traces]))


@dataclass(frozen=True, slots=True)
class _Moments:
    """Of one layer and some sequences: inputs times the root of their weight, the weights' sums, squares of gradients."""

    scaled: dict[str, Array]
    weights: dict[str, float]
    squares: dict[str, Array]


def _layer_moments(shape: Shape, weights: Weights, hidden: Array, upstream: Array) -> tuple[Array, _Moments]:
    _, trace = forward_layer(shape, weights, hidden)
    before, taps = backward_layer(shape, weights, trace, upstream)
    scaled: dict[str, Array] = {}
    total: dict[str, float] = {}
    for key in dict.fromkeys(INPUTS_OF.values()):
        inputs, weight = _weighted(taps, key)
        scaled[key] = inputs * np.sqrt(weight)[:, None]
        total[key] = float(weight.sum(dtype=np.float64))
    squares: dict[str, Array] = {
        name: np.square(gradient, dtype=np.float64).sum(axis=0) for name, (_, gradient) in taps.items()
    }
    return before, _Moments(scaled, total, squares)


def _weighted(taps: Taps, key: str) -> tuple[Array, Array]:
    """Inputs that some matrices share, and what each token's are worth to all of them."""
    names = [name for name, inputs in INPUTS_OF.items() if inputs == key]
    weight = sum(np.square(taps[name][1]).sum(axis=1) for name in names)
    return taps[names[0]][0], np.asarray(weight)


def _input_moments(parts: list[_Moments], key: str) -> Array:
    scaled = np.concatenate([part.scaled[key] for part in parts])
    total = sum(part.weights[key] for part in parts)
    return np.asarray(scaled.T @ scaled / np.float32(max(total, np.finfo(np.float32).tiny)))


def inputs_key(name: str) -> str:
    """Which file has the moments of a tensor's inputs."""
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in INPUTS_OF:
        return f"blk.{parts[1]}.{INPUTS_OF[parts[2]]}"
    return _HEAD
