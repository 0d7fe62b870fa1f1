"""What has to be watched by tests, check by check, and which tests watch it: the only place that says so."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[2]

KILLED_MIN: Final = 0.95
"""Of all mutants, those that are known to change nothing included."""


@dataclass(frozen=True, slots=True)
class Group:
    """Modules with the tests that are run for their mutants.

    Attributes:
        modules: Paths of source files.
        tests: Paths of test files; only quick ones.
        without: Names of tests that are left out because they take seconds; others find the same.
        is_sampled: A sample of its mutants is tried whenever all tests are run.
    """

    modules: tuple[str, ...]
    tests: tuple[str, ...]
    without: tuple[str, ...] = ()
    is_sampled: bool = False


GROUPS: Final[dict[str, Group]] = {
    "trust": Group(
        modules=("protocol/trust.py",),
        tests=(
            "tests/protocol/test_trust.py",
            "tests/protocol/test_trust_attacks.py",
            "tests/protocol/test_trust_limits.py",
        ),
        without=(
            "test_flipping_any_byte_of_any_document_never_changes_what_is_believed",
            "test_flipping_any_byte_of_the_root_never_lets_another_key_in",
        ),
        is_sampled=True,
    ),
    "chunks": Group(
        modules=("protocol/chunks.py", "device/blobs.py", "protocol/identity.py"),
        tests=(
            "tests/protocol/test_chunks.py",
            "tests/protocol/test_chunk_limits.py",
            "tests/device/test_blobs.py",
            "tests/protocol/test_identity.py",
            "tests/protocol/test_identity_limits.py",
        ),
        is_sampled=True,
    ),
    "importers": Group(
        modules=(
            "protocol/tensors/cursor.py",
            "protocol/tensors/regions.py",
            "protocol/tensors/gguf.py",
            "protocol/tensors/safetensors.py",
            "protocol/tensors/onnx.py",
            "server/releases/importer.py",
            "server/releases/model_files.py",
        ),
        tests=(
            "tests/protocol/test_tensors_files.py",
            "tests/protocol/test_tensors_gguf.py",
            "tests/protocol/test_tensors_maps.py",
            "tests/security/test_hostile_models.py",
            "tests/server/test_importer.py",
        ),
    ),
    "delta": Group(
        modules=("protocol/delta/format.py", "protocol/delta/reader.py", "protocol/delta/codecs.py"),
        tests=(
            "tests/protocol/test_delta_reader.py",
            "tests/protocol/test_delta_damage.py",
            "tests/security/test_hostile_deltas.py",
        ),
    ),
}
