"""Which pairs of model versions there are, and which files they are made of. Data only; `pairs.py` makes the files."""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

CACHE = Path(".cache") / "pairs"
FORMATS = ("q4_0", "q4_k_m", "q8_0")
VERSIONS = ("large", "tiny", "lora", "last2", "x4")


@dataclass(frozen=True, slots=True)
class Pair:
    """Two versions of a model.

    Attributes:
        name: As the table shows it.
        base: File that devices have, in the cache folder.
        new: File that they shall have.
        weights: The files that the two were quantized from, where they are kept.
    """

    name: str
    base: str
    new: str
    weights: tuple[str, str] | None = None


def _fine_tune(version: str, kind: str) -> Pair:
    weights = ("v1.bf16.gguf", f"v2_{version}.bf16.gguf")
    return Pair(f"{version}.{kind}", f"v1.{kind}.gguf", f"v2_{version}.{kind}.gguf", weights)


PAIRS = (
    *(_fine_tune(version, kind) for version in VERSIONS for kind in FORMATS),
    *(
        Pair(f"minilm-{version}.{kind}", f"minilm-v1.{kind}.onnx", f"minilm-v2_{version}.{kind}.onnx")
        for version in ("large", "tiny")
        for kind in ("int8", "int8pc", "int4")
    ),
    *(
        Pair(
            f"minilm-{version}.{kind}",
            f"minilm-v1.{kind}.safetensors",
            f"minilm-v2_{version}.{kind}.safetensors",
        )
        for version in ("large", "tiny")
        for kind in ("awq", "gptq")
    ),
    Pair("silero-5.1-6.0", "silero-5.1.2.onnx", "silero-6.0.onnx"),
    Pair("silero-6.0-6.2", "silero-6.0.onnx", "silero-6.2.onnx"),
    Pair("magika-3.2-3.3", "magika-3.2.onnx", "magika-3.3.onnx"),
    Pair("grown.q4_0", "v1.q4_0.gguf", "grown.q4_0.gguf"),
    Pair("metadata.q4_0", "v1.q4_0.gguf", "renamed.q4_0.gguf"),
    Pair("reordered.q4_0", "v1.q4_0.gguf", "reordered.q4_0.gguf"),
    Pair("retyped.q4_0", "v1.q4_0.gguf", "retyped.q4_0.gguf"),
    Pair("random", "random-1.bin", "random-2.bin"),
)

CHAIN_VERSIONS = 10

CHOICE_PAIRS = (
    _fine_tune("facts", "q4_0"),
    *(_fine_tune(f"chain{number}", "q4_0") for number in range(1, CHAIN_VERSIONS + 1)),
)
"""Only for `make bench-requantize`: `facts` changes answers and little else; `chain1` to `chain10` are one training, released ten times."""


def select(patterns: list[str], pairs: Sequence[Pair] = PAIRS) -> list[Pair]:
    """The pairs whose names match one of the patterns (`*` and `?`), in the catalog's order."""
    return [pair for pair in pairs if any(fnmatchcase(pair.name, pattern) for pattern in patterns)]


def missing(pair: Pair, cache: Path) -> list[str]:
    """The pair's files that are not in the cache folder."""
    return [name for name in (pair.base, pair.new, *(pair.weights or ())) if not (cache / name).is_file()]
