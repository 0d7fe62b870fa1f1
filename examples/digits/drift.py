"""Trains a digit classifier further and further, so that one can see what a delta costs: `python -m examples.digits.drift --out DIR`.

Writes into DIR, each trained on from the one before and quantized to int8 ONNX:
  base.onnx       trained on the first images
  polished.onnx   one epoch at a learning rate of 1e-6
  tuned.onnx      one epoch at 1e-5
  retrained.onnx  four epochs at 1.5e-3, as from scratch
  accuracy.json   held-out accuracy of each
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Final

import numpy as np
from threadpoolctl import threadpool_limits

from examples.digits.build import PIXEL_MAX, split_digits
from examples.digits.export import float_model, predictions, quantized
from examples.digits.network import Network

SIZES: Final = (64, 1024, 1024, 10)
BATCH: Final = 64
FIRST_IMAGES: Final = 240
STAGES: Final = (("polished", 1, 1e-6), ("tuned", 1, 1e-5), ("retrained", 4, 1.5e-3))


def build(out: Path, seed: int) -> None:
    """Write all versions into a folder that exists."""
    rng = np.random.default_rng(seed)
    digits = split_digits(rng)
    train, held_out = digits.train, digits.held_out
    images = train.images / np.float32(PIXEL_MAX)
    network = Network.initialized(SIZES, rng)
    accuracy = {}

    def write(name: str) -> None:
        model = quantized(float_model(network, pixel_max=PIXEL_MAX), train.images)
        (out / f"{name}.onnx").write_bytes(model)
        accuracy[name] = float(np.mean(predictions(model, held_out.images) == held_out.labels))

    first = slice(0, FIRST_IMAGES)
    network.train(images[first], train.labels[first], epochs=4, rate=3e-4, batch=BATCH, rng=rng)
    write("base")
    for name, epochs, rate in STAGES:
        network.train(images, train.labels, epochs=epochs, rate=rate, batch=BATCH, rng=rng)
        write(name)
    (out / "accuracy.json").write_text(json.dumps(accuracy) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder that exists")
    parser.add_argument("--seed", type=int, default=7, metavar="S")
    options = parser.parse_args()
    # The order of additions depends on the number of threads; one thread makes the files repeatable.
    with threadpool_limits(limits=1):
        build(options.out, options.seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
