"""Trains and quantizes the three versions of the digit classifier: `python -m examples.digits.build --out DIR`.

Writes into DIR:
  v1.onnx  int8, trained briefly on the first few labelled images
  v2.onnx  int8, v1's network trained further on all of them: measurably better
  v3.onnx  int8, v2's very weights, but calibrated on images divided by 255, as 8-bit images are, although these pixels
           end at 16 and the model gets them raw: it loads and runs, its activations saturate, and it is far worse
  accuracy.json  held-out accuracy of each file under onnxruntime, beside that of its float32 source
  health.json    the health plan that the release carries: golden images with their true labels, and limits

The images are the 1,797 digits that scikit-learn ships. No network is used and nothing is downloaded.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from sklearn.datasets import load_digits
from threadpoolctl import threadpool_limits

from examples.digits.export import float_model, predictions, quantized
from examples.digits.network import Floats, Integers, Network
from protocol.errors import RequestError, StorageError, WhimbrelError
from protocol.release import ClassPrompt, HealthPlan

PIXEL_MAX = 16.0  # scikit-learn's digits count black dots in 4x4 blocks
_WRONG_PIXEL_MAX = 255.0  # what v3's calibration takes the pixels for
GOLDEN_COUNT = 24
_HELD_OUT_COUNT = 500

# Wide enough that the delta from v1 to v2 is some twenty-five chunks, small enough to train in seconds.
_SIZES = (64, 1536, 1536, 512, 10)
_BATCH = 64
_FIRST_IMAGES = 240
_FIRST_EPOCHS = 4
_FIRST_RATE = 3e-4
_FURTHER_EPOCHS_AND_RATES = ((4, 1.5e-3), (2, 2e-4))

# Limits of the health plan. 24 images are few: the limit leaves room for chance and stays far above what a broken
# model reaches. A Raspberry Pi answers in single milliseconds; the rest is room for a busy machine.
_CLASS_ACCURACY_MIN = 0.75
_LATENCY_P99_MS_MAX = 250.0
_MEMORY_PEAK_BYTES_MAX = 400_000_000
_LOAD_TIMEOUT_MS = 60_000
_PROMPT_TIMEOUT_MS = 30_000
_SOAK_MS = 500


@dataclass(frozen=True, slots=True)
class Split:
    """Images in raw pixels, shape (n, 64), and their labels, shape (n,)."""

    images: Floats
    labels: Integers


@dataclass(frozen=True, slots=True)
class Digits:
    """The data set in three parts that share no image."""

    train: Split
    held_out: Split
    golden: Split


@dataclass(frozen=True, slots=True)
class Version:
    """One version of the classifier and what was measured of it."""

    name: str
    file: bytes
    accuracy: float
    float32_accuracy: float
    golden_accuracy: float
    story: str


def split_digits(rng: np.random.Generator) -> Digits:
    """Shuffles scikit-learn's digits and cuts them into golden, held-out and training images."""
    bunch = load_digits()
    images = bunch.data.astype(np.float32)
    labels = bunch.target.astype(np.int64)
    order = rng.permutation(len(images))
    golden, held_out, train = np.split(order, [GOLDEN_COUNT, GOLDEN_COUNT + _HELD_OUT_COUNT])
    parts = (Split(images[chosen], labels[chosen]) for chosen in (train, held_out, golden))
    return Digits(*parts)


def build_versions(seed: int, progress: Callable[[str], None]) -> tuple[list[Version], Digits]:
    """Trains, quantizes and measures v1, v2 and v3.

    Args:
        seed: Decides the split, the first weights and the order of training.
        progress: Told one line per version.
    """
    rng = np.random.default_rng(seed)
    digits = split_digits(rng)
    train = digits.train
    unit_images = train.images / np.float32(PIXEL_MAX)
    network = Network.initialized(_SIZES, rng)
    versions: list[Version] = []

    def measured(name: str, calibration: Floats, story: str) -> None:
        source = float_model(network, pixel_max=PIXEL_MAX)
        file = quantized(source, calibration)
        version = Version(
            name,
            file,
            _accuracy(file, digits.held_out),
            _accuracy(source.SerializeToString(), digits.held_out),
            _accuracy(file, digits.golden),
            story,
        )
        versions.append(version)
        progress(f"{name}: {version.accuracy:.1%} of held-out digits, {len(file):,} bytes; {story}")

    first = slice(0, _FIRST_IMAGES)
    network.train(
        unit_images[first], train.labels[first], epochs=_FIRST_EPOCHS, rate=_FIRST_RATE, batch=_BATCH, rng=rng
    )
    measured("v1", train.images[first], f"trained on the first {_FIRST_IMAGES} images")
    for epochs, rate in _FURTHER_EPOCHS_AND_RATES:
        network.train(unit_images, train.labels, epochs=epochs, rate=rate, batch=_BATCH, rng=rng)
    measured("v2", train.images, f"trained further on all {len(train.images)} images")
    wrong_images = train.images / np.float32(_WRONG_PIXEL_MAX)
    measured("v3", wrong_images, "v2's weights, calibrated on images of the wrong scale")
    return versions, digits


def health_plan(golden: Split) -> HealthPlan:
    """The health plan of a release: golden images with their true labels, and what a trial must stay within."""
    prompts = [
        ClassPrompt(name=f"digit-{position:02d}", input=image.tolist(), label=int(label))
        for position, (image, label) in enumerate(zip(golden.images, golden.labels, strict=True))
    ]
    return HealthPlan(
        prompts=list(prompts),
        class_accuracy_min=_CLASS_ACCURACY_MIN,
        latency_p99_ms_max=_LATENCY_P99_MS_MAX,
        memory_peak_bytes_max=_MEMORY_PEAK_BYTES_MAX,
        load_timeout_ms=_LOAD_TIMEOUT_MS,
        prompt_timeout_ms=_PROMPT_TIMEOUT_MS,
        soak_ms=_SOAK_MS,
    )


def build(out: Path, seed: int, progress: Callable[[str], None]) -> None:
    """Writes the three models, their accuracies and the health plan into a folder, which is made if needed.

    Raises:
        StorageError: The folder cannot be made or written.
    """
    _write(out, {})
    # The order of additions depends on the number of threads; one thread makes the files repeatable.
    with threadpool_limits(limits=1):
        versions, digits = build_versions(seed, progress)
    accuracy = {
        "seed": seed,
        "held_out_images": len(digits.held_out.labels),
        "golden_images": len(digits.golden.labels),
        "versions": {
            each.name: {
                "accuracy": each.accuracy,
                "float32_accuracy": each.float32_accuracy,
                "golden_accuracy": each.golden_accuracy,
                "bytes": len(each.file),
                "story": each.story,
            }
            for each in versions
        },
    }
    files = {f"{each.name}.onnx": each.file for each in versions}
    files["accuracy.json"] = (json.dumps(accuracy, indent=2) + "\n").encode()
    files["health.json"] = msgspec.json.encode(health_plan(digits.golden)) + b"\n"
    _write(out, files)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m examples.digits.build", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder for the models, made if needed"
    )
    parser.add_argument(
        "--seed", type=int, default=7, metavar="S", help="decides split and training (default: 7)"
    )
    options = parser.parse_args(arguments)
    try:
        if options.seed < 0:
            raise RequestError("--seed must not be negative")
        build(options.out, options.seed, lambda line: print(line, flush=True))
    except WhimbrelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _accuracy(model: bytes, split: Split) -> float:
    return float(np.mean(predictions(model, split.images) == split.labels))


def _write(out: Path, files: dict[str, bytes]) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (out / name).write_bytes(content)
    except OSError as error:
        raise StorageError(f"cannot write to {out}: {error.strerror}", hint="choose another --out") from error


if __name__ == "__main__":
    sys.exit(main())
