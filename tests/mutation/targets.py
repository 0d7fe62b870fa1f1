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
        only: Pairs of a module and a function: of these modules nothing else counts.
        without: Names of tests that are left out because they take seconds; others find the same.
        is_sampled: A sample of its mutants is tried whenever all tests are run.
    """

    modules: tuple[str, ...]
    tests: tuple[str, ...]
    only: tuple[tuple[str, str], ...] = ()
    without: tuple[str, ...] = ()
    is_sampled: bool = False

    def counts(self, module: str, function: str) -> bool:
        """Whether a function of one of the modules has to be watched."""
        return (module, function) in self.only or module not in {path for path, _ in self.only}


GROUPS: Final[dict[str, Group]] = {
    "trust": Group(
        modules=("protocol/trust.py", "protocol/director.py", "device/assignments.py"),
        only=(  # the rest says when to look
            ("device/assignments.py", "signer_of"),
            ("device/assignments.py", "is_news"),
            ("device/assignments.py", "check_wish"),
            ("device/assignments.py", "_prove"),
        ),
        tests=(
            "tests/device/test_director.py",
            "tests/device/test_wishes.py",
            "tests/protocol/test_trust_director.py",
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
        modules=(
            "protocol/chunks.py",
            "device/blobs.py",
            "device/download.py",
            "device/transfer.py",
            "protocol/identity.py",
        ),
        # What takes a chunk from the air; the rest says when to ask for which.
        only=(
            ("device/download.py", "BlobDownload.receive"),
            ("device/transfer.py", "Artifact.blobs"),
            ("device/transfer.py", "Transfer.receive"),
            ("device/transfer.py", "Transfer.read"),
            ("device/transfer.py", "Transfer._open_artifact"),
        ),
        tests=(
            "tests/protocol/test_chunks.py",
            "tests/protocol/test_chunk_limits.py",
            "tests/device/test_blobs.py",
            "tests/device/test_chunks_taken.py",
            "tests/device/test_download.py",
            "tests/protocol/test_identity.py",
            "tests/protocol/test_identity_limits.py",
        ),
        is_sampled=True,
    ),
    "readers": Group(
        modules=(
            "protocol/tensors/cursor.py",
            "protocol/tensors/regions.py",
            "protocol/tensors/gguf.py",
            "protocol/tensors/safetensors.py",
        ),
        tests=(
            "tests/protocol/test_tensors_cursor.py",
            "tests/protocol/test_tensors_gguf.py",
            "tests/protocol/test_tensors_gguf_arrays.py",
            "tests/protocol/test_tensors_limits.py",
            "tests/protocol/test_tensors_maps.py",
        ),
        without=(
            "onnx",
            "test_any_byte_of_the_header_may_be_anything",
            "fields_are_refused",
            "nothing_but_names",
        ),
    ),
    "onnx": Group(
        modules=("protocol/tensors/onnx.py",),
        tests=(
            "tests/protocol/test_tensors_files.py",
            "tests/protocol/test_tensors_maps.py",
            "tests/protocol/test_tensors_onnx_limits.py",
            "tests/security/test_hostile_models.py",
        ),
        without=("gguf", "safetensors", "test_any_byte_of_an_onnx_file", "test_very_many_fields_are_refused"),
    ),
    "importer": Group(
        modules=("server/releases/importer.py", "server/releases/model_files.py"),
        tests=(
            "tests/server/test_importer.py",
            "tests/server/test_importer_limits.py",
            "tests/security/test_hostile_models.py",
            "tests/server/test_adapter_files.py",
        ),
        without=("test_row_70_onnx_address_in_memory_kills_no_device",),
    ),
    "delta": Group(
        modules=("protocol/delta/format.py", "protocol/delta/reader.py", "protocol/delta/codecs.py"),
        tests=(
            "tests/protocol/test_delta_format_limits.py",
            "tests/protocol/test_delta_reader_limits.py",
            "tests/protocol/test_delta_reader.py",
            "tests/protocol/test_delta_damage.py",
            "tests/security/test_hostile_deltas.py",
        ),
        without=(
            "test_bytes_changed_together",
            "test_no_byte_can_be_flipped",
            "test_inspection_notices",
            "test_self_compressed",
            "test_memory_stays_below",
            "test_a_copy_takes_memory",
            "many_copies",
            "ends_anywhere_too_early",
            "interruption_at_any_byte",
            "row_22",
            "row_23",
            "row_66",
        ),
    ),
    "codecs": Group(
        modules=("protocol/delta/bsdiff.py", "protocol/delta/compression.py"),
        tests=(
            "tests/protocol/test_delta_codecs.py",
            "tests/protocol/test_delta_codecs_limits.py",
            "tests/protocol/test_delta_reader_limits.py",
        ),
        # What is read; what is written is read before it leaves the server.
        only=(
            ("protocol/delta/bsdiff.py", "decode_bsdiff"),
            ("protocol/delta/bsdiff.py", "_unpack_control"),
            ("protocol/delta/bsdiff.py", "_instructions"),
            ("protocol/delta/bsdiff.py", "_check"),
            ("protocol/delta/compression.py", "decompress"),
            ("protocol/delta/compression.py", "decompress_up_to"),
        ),
        without=("test_any_bytes_as", "tensor_payload", "come_back", "moved_tensor"),
    ),
    "journal": Group(
        modules=("protocol/delta/undo_journal.py",), tests=("tests/protocol/test_undo_journal.py",)
    ),
}
