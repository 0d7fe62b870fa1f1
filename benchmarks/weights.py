"""Arithmetic on whole sets of weights, by tensor name."""

import math
from collections.abc import Mapping

import numpy as np

from server.requantize.transformer import Array


def round_bf16(values: Array) -> Array:
    """float32 rounded to the nearest bfloat16, ties to even, still as float32."""
    bits: Array = np.ascontiguousarray(values, np.float32).view(np.uint32).astype(np.uint64)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16
    return np.asarray(bits.astype(np.uint32).view(np.float32).reshape(values.shape))


def extrapolate(base: Mapping[str, Array], trained: Mapping[str, Array], factor: float) -> dict[str, Array]:
    """The base plus `factor` times what training changed: a model that moved further, and not a good one."""
    return {name: round_bf16(base[name] + factor * (trained[name] - base[name])) for name in base}


def relative_change(base: Mapping[str, Array], trained: Mapping[str, Array]) -> float:
    """Root of the summed squares of the change over that of the base."""
    change = sum(float(np.square(trained[name] - base[name], dtype=np.float64).sum()) for name in base)
    return math.sqrt(change / sum(float(np.square(base[name], dtype=np.float64).sum()) for name in base))
